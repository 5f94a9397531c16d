"""The gate of a mixture of experts on a GPU: the largest of each token's logits, and all rows sorted by expert.

A token chooses an expert at most once, so who chose whom is a matrix [tokens, experts] of bits: sums along the tokens
count and order the rows of each expert. Up to 64 tokens are one program; of more, chunks are counted side by side, one
program adds the counts up and cuts the tiles, and the chunks put their rows in place. That one program also pays what
the gate's projection owes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.experts import most_tiles
from aiolora.ops.kernels.expand import expand_mixes
from aiolora.ops.kernels.launch import ceil_div, launch, power_of_2
from aiolora.ops.kernels.linear import chained, complete, precision

ALONE = 64  # tokens that one program takes
CHUNK = 32  # tokens of a program among several


def choose_experts(
    y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int], top_k: int, normalised: bool, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `experts.choose_experts`."""
    tokens, count = y.shape
    width = power_of_2(count)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=y.device)

    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=y.device)
    experts = torch.zeros((tokens, top_k), dtype=torch.int32, device=y.device)  # of NaN none may be chosen
    rows, tiles = ints(tokens * top_k), ints(most_tiles(tokens, top_k, count, tile), 3)
    turns = ceil_div(tokens, tile)  # tiles that one expert may have
    if tokens <= ALONE:
        rest: tuple[object, ...] = (y, y, y, y, y, y, 0, 0, 0, 0, 0)
        most = 2
        if owed:
            h, b, vectors, _, _, pages, vector_pages, owners = owed
            most, strides = pages.shape[2], (b.stride(0), b.stride(1), vectors.stride(0))
            rest = (h, b, vectors, pages, vector_pages, owners, where[0], pages.shape[1], *strides)
        launch(
            _alone_kernel, (1,),
            (y.contiguous(), bias, weights, experts, rows, tiles, *rest, tokens, turns, tiles.shape[0]),
            E=count, TOPK=top_k, NORMALISED=normalised, TILE=tile, W=most, BT=power_of_2(max(16, tokens)), BE=width,
            LORA=bool(owed), PRECISION=precision(owed[1] if owed else y), pdl=chained(tokens, bool(owed)), num_warps=8,
        )  # fmt: skip
        return weights, experts, rows, tiles
    logits = complete(y, bias, owed, where) if owed or bias is not None else y.contiguous()
    chunks = ceil_div(tokens, CHUNK)
    counts = ints(chunks + 1, width)  # the last: where each expert's rows begin
    launch(
        _count_kernel, (chunks,),
        (logits, counts, tokens),
        E=count, TOPK=top_k, BT=CHUNK, BE=width,
    )  # fmt: skip
    launch(
        _cut_kernel, (1,),
        (counts, tiles, chunks, turns, tiles.shape[0]),
        E=count, TILE=tile, BE=width,
    )  # fmt: skip
    launch(
        _place_kernel, (chunks,),
        (logits, counts, weights, experts, rows, tokens, chunks),
        E=count, TOPK=top_k, NORMALISED=normalised, BT=CHUNK, BE=width,
    )  # fmt: skip
    return weights, experts, rows, tiles


@triton.jit
def _logits(y, t, e, T, E: tl.constexpr):
    """[BT, BE]; zeros where no token or no expert is."""
    at = y + t.to(tl.int64)[:, None] * E + e[None, :]
    return tl.load(at, (t < T)[:, None] & (e < E)[None, :], 0.0).to(tl.float32)


@triton.jit
def _chosen(logits, t, e, T, E: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    """Of [BT, BE]: shares, not yet divided by their sum, and which of its token's choices each is (-1: none)."""
    x = tl.where((e < E)[None, :], logits, -float("inf"))
    share = tl.exp(x - tl.max(x, 1)[:, None])
    left = tl.where((e < E)[None, :], share, -1.0)
    order = tl.full((BT, BE), -1, tl.int32)
    for j in range(TOPK):
        best = e[None, :] == tl.argmax(left, 1)[:, None]
        order = tl.where(best, j, order)
        left = tl.where(best, -1.0, left)
    return share, tl.where((t < T)[:, None], order, -1)


@triton.jit
def _put(share, order, places, weights, experts, rows, t, e, TOPK: tl.constexpr, NORMALISED: tl.constexpr):
    """Write each choice to its token's row, and its row to its place among all."""
    ok = order >= 0
    total = tl.sum(tl.where(ok, share, 0.0), 1) if NORMALISED else tl.sum(share, 1)
    total = tl.where(total > 0.0, total, 1.0)  # of no token
    row = t[:, None] * TOPK + order
    tl.store(weights + row, share / total[:, None], ok)
    tl.store(experts + row, tl.where(ok, e[None, :], 0), ok)
    tl.store(rows + places, row, ok)


@triton.jit
def _cut(tiles, members, first, e, turns, most, E: tl.constexpr, TILE: tl.constexpr):
    """Tiles of each expert's `members` from `first` on, and empty ones behind them."""
    own = (members + TILE - 1) // TILE
    ends = tl.cumsum(own, 0)
    for turn in range(turns):
        at = tiles + (ends - own + turn) * 3
        ok = turn < own
        tl.store(at, e, ok)
        tl.store(at + 1, first + turn * TILE, ok)
        tl.store(at + 2, tl.minimum(members - turn * TILE, TILE), ok)
    total = tl.sum(own)
    for low in range(0, most, 128):
        g = low + tl.arange(0, 128)
        ok = (g >= total) & (g < most)
        tl.store(tiles + g * 3, 0, ok)
        tl.store(tiles + g * 3 + 1, 0, ok)
        tl.store(tiles + g * 3 + 2, 0, ok)


@triton.jit(do_not_specialize=["kind", "kinds", "T", "turns", "most"])
def _alone_kernel(
    y, bias, weights, experts, rows, tiles, h, b, vectors, pages, vector_pages, owners, kind, kinds, b_page, b_rank,
    v_page, T, turns, most,
    E: tl.constexpr, TOPK: tl.constexpr, NORMALISED: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, LORA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t, e = tl.arange(0, BT), tl.arange(0, BE)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    logits = _logits(y, t, e, T, E)
    if LORA:
        ok, inside = t < T, e < E
        mix = tl.load(owners + t, ok, 0) * kinds + kind
        logits = expand_mixes(
            logits, h, b, pages, mix * W, t, ok, t, e, inside, 0, b_page, b_rank, 1, W, BT, PRECISION
        )  # fmt: skip
        vector = tl.load(vector_pages + mix, ok, -1)
        at = vectors + vector.to(tl.int64)[:, None] * v_page + e[None, :]
        some = (vector >= 0)[:, None] & inside[None, :]
        logits = logits * tl.load(at, some, 1.0) + tl.load(at + E, some, 0.0)
    if bias is not None:
        logits += tl.load(bias + e, e < E, 0.0).to(tl.float32)[None, :]
    if LORA or bias is not None:
        logits = logits.to(y.dtype.element_ty).to(tl.float32)
    share, order = _chosen(logits, t, e, T, E, TOPK, BT, BE)
    bit = (order >= 0).to(tl.int32)
    members = tl.sum(bit, 0)
    first = tl.cumsum(members, 0) - members
    _put(share, order, tl.cumsum(bit, 0) - bit + first[None, :], weights, experts, rows, t, e, TOPK, NORMALISED)
    _cut(tiles, members, first, e, turns, most, E, TILE)


@triton.jit(do_not_specialize=["T"])
def _count_kernel(
    logits, counts, T,
    E: tl.constexpr, TOPK: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    _, order = _chosen(_logits(logits, t, e, T, E), t, e, T, E, TOPK, BT, BE)
    tl.store(counts + tl.program_id(0) * BE + e, tl.sum((order >= 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["chunks", "turns", "most"])
def _cut_kernel(
    counts, tiles, chunks, turns, most,
    E: tl.constexpr, TILE: tl.constexpr, BE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Counts become how many came in the chunks before."""
    e = tl.arange(0, BE)
    members = tl.zeros((BE,), tl.int32)
    for chunk in range(chunks):
        more = tl.load(counts + chunk * BE + e)
        tl.store(counts + chunk * BE + e, members)
        members += more
    first = tl.cumsum(members, 0) - members
    tl.store(counts + chunks * BE + e, first)
    _cut(tiles, members, first, e, turns, most, E, TILE)


@triton.jit(do_not_specialize=["T", "chunks"])
def _place_kernel(
    logits, counts, weights, experts, rows, T, chunks,
    E: tl.constexpr, TOPK: tl.constexpr, NORMALISED: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BE)
    share, order = _chosen(_logits(logits, t, e, T, E), t, e, T, E, TOPK, BT, BE)
    first = tl.load(counts + tl.program_id(0) * BE + e) + tl.load(counts + chunks * BE + e)
    bit = (order >= 0).to(tl.int32)
    _put(share, order, tl.cumsum(bit, 0) - bit + first[None, :], weights, experts, rows, t, e, TOPK, NORMALISED)
