"""RMSNorm, alone and behind the residual addition that pays what the projection before it owes."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.expand import held_pages, load_b
from aiolora.ops.kernels.launch import PDL, power_of_2
from aiolora.ops.kernels.linear import TOGETHER, complete

BY_TOKEN = 64  # tokens up to which each pays alone: more share the reading of B in a launch of its own


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x.view(-1, x.shape[-1]), None, [], [], None, weight, out, None, eps)
    return out


def add_norm(
    y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `norm.add_norm`."""
    slices = len(where) - 3
    if owed and (y.shape[0] > BY_TOKEN or slices > 1):
        y, bias, owed, where = complete(y, bias, owed, where), None, [], []
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    _launch(y, bias, owed, where, residual, weight, out, total, eps)
    return out, total


def _launch(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    tokens, width = y.shape
    programs, most = tokens, 2
    rest: tuple[object, ...] = (y, y, y, y, y, 0, 0, 0, 0, 1)
    if owed:
        h, b, perm, tiles, pages = owed
        kind, tile = where[:2]
        programs, most = tiles.shape[0] * tile, pages.shape[2]
        rest = (h, b, perm, tiles, pages, kind, pages.shape[1], b.stride(0), b.stride(1), tiles.shape[0])
    block = power_of_2(width)
    pdl = PDL and not (owed and tokens > TOGETHER)  # behind a join of two streams a launch waits as any other
    _add_norm_kernel[(programs,)](
        y, bias, residual, weight, out, total, *rest, eps,
        N=width, BLOCK=block, W=most, W_BLOCK=power_of_2(most),
        LORA=bool(owed), PDL=pdl, launch_pdl=pdl, num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tiles"])
def _add_norm_kernel(
    y, bias, residual, weight, out, total, h, b, perm, tiles, pages, kind, kinds, b_page, b_rank, num_tiles, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr, LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program. With adapters: the m-th token of a tile, the first of every tile in front."""
    n = tl.arange(0, BLOCK)
    inside = n < N
    scale = tl.load(weight + n, inside, 0.0)
    token = tl.program_id(0)
    there = True
    if LORA:
        tile, m = token % num_tiles, token // num_tiles
        there = m < tl.load(tiles + tile * 2 + 1)
        held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
        token = tl.load(perm + tl.load(tiles + tile * 2) + m, there, 0)
        b_RN = load_b(b, pages, tile, kind, kinds, held, 0, n, inside & there, b_page, b_rank, W)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if there:
        at = token.to(tl.int64) * N + n
        acc = tl.load(y + at, inside, 0.0).to(tl.float32)
        if residual is not None:
            before = tl.load(residual + at, inside, 0.0).to(tl.float32)
        if LORA:
            acc = _pay(acc, b_RN, h, held, 0, token, W)
            if W > 2:
                for pair in range(1, (held + 1) // 2):
                    b_RN = load_b(b, pages, tile, kind, kinds, held, pair, n, inside, b_page, b_rank, W)
                    acc = _pay(acc, b_RN, h, held, pair, token, W)
        if bias is not None:
            acc += tl.load(bias + n, inside, 0.0).to(tl.float32)
        if residual is not None:
            summed = (acc.to(out.dtype.element_ty).to(tl.float32) + before).to(out.dtype.element_ty)
            tl.store(total + at, summed, inside)
            acc = summed.to(tl.float32)
        root = tl.rsqrt(tl.sum(acc * acc) / N + eps)
        normed = (acc * root).to(out.dtype.element_ty).to(tl.float32) * scale.to(tl.float32)
        tl.store(out + at, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _pay(acc, b_RN, h, held, pair, token, W: tl.constexpr):
    """`acc` [BLOCK] plus 16 ranks of one token, without the tensor cores."""
    r = tl.arange(0, 16)
    h_R = tl.load(h + token * (W * 8) + pair * 16 + r, pair * 2 + r // 8 < held, 0.0).to(b_RN.dtype)
    return acc + tl.sum(b_RN.to(tl.float32) * h_R.to(tl.float32)[:, None], 0)
