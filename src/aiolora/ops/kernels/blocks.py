"""Logits of rows that adapters have in the place of the base's: a program for each tile of positions and block."""

import triton
import triton.language as tl
from torch import Tensor

from aiolora.ops.kernels.launch import launch, power_of_2
from aiolora.ops.kernels.linear import precision


def own_logits(
    logits: Tensor, hidden: Tensor, rows: Tensor, table: Tensor, owners: Tensor, perm: Tensor, tiles: Tensor, tile: int
) -> None:
    """See `blocks.own_logits`."""
    hidden = hidden.contiguous()
    launch(
        _own_logits, (tiles.shape[0], table.shape[1]),
        (logits, hidden, rows, table, owners, perm, tiles, table.shape[1], logits.shape[1], logits.stride(0)),
        K=hidden.shape[1], BM=max(16, power_of_2(tile)), BN=rows.shape[1], BK=64, PRECISION=precision(hidden),
        num_warps=4, num_stages=3 if hidden.dtype.itemsize == 2 else 2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "V"])
def _own_logits(
    logits, hidden, rows, table, owners, perm, tiles, blocks, V, row,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN logits of a tile of positions, if their owner has that block."""
    tile, block = tl.program_id(0), tl.program_id(1)
    first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    if count > 0:
        page = tl.load(table + tl.load(owners + tl.load(perm + first)) * blocks + block)
        if page >= 0:
            m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
            ok = m < count
            positions = tl.load(perm + first + m, ok, 0).to(tl.int64)
            x_at = hidden + positions[:, None] * K + k[None, :]
            w_at = rows + (page.to(tl.int64) * BN + n)[None, :] * K + k[:, None]
            acc = tl.zeros((BM, BN), tl.float32)
            for k0 in range(0, K, BK):
                x_MK = tl.load(x_at + k0, ok[:, None] & (k0 + k < K)[None, :], 0.0)
                w_KN = tl.load(w_at + k0, (k0 + k < K)[:, None], 0.0)
                acc = tl.dot(x_MK, w_KN.to(x_MK.dtype), acc, input_precision=PRECISION)
            v = block * BN + n
            to = logits + positions[:, None] * row + v[None, :]
            tl.store(to, acc.to(logits.dtype.element_ty), ok[:, None] & (v < V)[None, :])
