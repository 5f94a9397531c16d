"""Projections on a GPU.

Few tokens: one launch streams the base weight and, beside it in the same grid, the A pages of the step's adapters, both
at the rate of the memory; what is left in rank space is expanded by whoever reads the projection. More tokens: cuBLAS,
with the shrink on a second stream beside it.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.expand import adjusted, expand_pair, expand_rest, held_pages, load_b
from aiolora.ops.kernels.launch import PDL, ceil_div, launch, power_of_2, processors

SKINNY = 64  # tokens up to which our own product is as fast as cuBLAS
SMALL = 4  # tokens up to which a product is cut for latency
AHEAD = 64  # tokens up to which a shrink is launched ahead of a product that does not wait for it
TOGETHER = 16  # tokens up to which a shrink fits into the launch of the product
LARGE = (64, 4)  # columns and warps of a program that completes a tile of more than 16 tokens
COUNTED = 1 << 16  # items of work whose parts can be counted
MOST_PARTS = 1 << 26  # elements of all parts of sums of a launch: 256 MB
FORK = 512  # tokens up to which a shrink runs on a second stream beside the product, in graphs: there a fork is free


class Tiling(NamedTuple):
    """How a skinny product is cut."""

    columns: int  # of the weight's rows a program
    depth: int  # of K a turn of its loop
    stages: int
    warps: int
    rows: int = 16  # at least; with 64 the tensor cores read the weight straight from shared memory


def product(x: Tensor, weight: Tensor) -> Tensor:
    """See `linear.product`."""
    if x.shape[0] > SKINNY or not _whole(x, weight):
        return F.linear(x, weight)
    return skinny(x, weight, tiling_of(x.shape[0], weight.shape[0], weight.shape[1], x.dtype))


def product_shrink(
    x: Tensor, weight: Tensor, a: Tensor, routing: list[Tensor], where: list[int]
) -> tuple[Tensor, Tensor]:
    """See `linear.product_shrink`."""
    tokens = x.shape[0]
    if tokens <= AHEAD and PDL and _whole(x, weight):
        h = _empty_h(x, a, routing)
        _shrink(x, a, h, routing, where, pdl=True)
        return skinny(x, weight, tiling_of(tokens, weight.shape[0], weight.shape[1], x.dtype), late=True), h
    if tokens <= TOGETHER and _whole(x, weight):
        h = _empty_h(x, a, routing)
        return skinny(x, weight, tiling_of(tokens, weight.shape[0], weight.shape[1], x.dtype), a, h, routing, where), h
    if tokens > FORK or not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return F.linear(x, weight), shrink(x, a, routing, where)
    here, beside = torch.cuda.current_stream(), _beside(x.device)
    h = _empty_h(x, a, routing)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        _shrink(x, a, h, routing, where)
    y = F.linear(x, weight)
    here.wait_stream(beside)
    return y, h


def shrink(x: Tensor, a: Tensor, routing: list[Tensor], where: list[int]) -> Tensor:
    """See `linear.shrink`."""
    h = _empty_h(x, a, routing)
    _shrink(x, a, h, routing, where)
    return h


def complete(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """See `linear.complete`."""
    if not owed:
        return y.clone() if bias is None else y + bias
    h, b, vectors, perm, tiles, pages, vector_pages, _ = owed
    kind, tile, *bounds = where
    strides = b.stride(0), b.stride(1), vectors.stride(0)
    width = y.shape[1]
    out = torch.empty_like(y)
    columns, warps = (128, 4) if tile <= 16 else LARGE
    slices = len(bounds) - 1
    kinds, most = pages.shape[1:]
    for part, (low, high) in enumerate(pairwise(bounds)):  # slices of any widths: a launch each
        launch(
            _complete_kernel, (tiles.shape[0], ceil_div(high - low, columns)),
            (y, bias, out, h, b, vectors, perm, tiles, pages, vector_pages, kind, kinds, *strides),
            N=width, PART=part, LOW=low, HIGH=high, S=slices, W=most, W_BLOCK=power_of_2(most), BM=max(16, tile),
            BN=columns, PRECISION=precision(b), BIASED=bias is not None, num_warps=warps,
        )  # fmt: skip
    return out


def chained(tokens: int, owing: bool) -> bool:
    """Whether a product of so many tokens, and who reads it, are set up while the kernel before them still runs.

    Not behind cuBLAS (nothing gained), nor where one to four tokens owe (measured: 5.0 ms a step against 4.7).
    """
    return PDL and (SMALL < tokens <= AHEAD if owing else tokens <= SKINNY)


def precision(x: Tensor) -> str:
    """Float32 stays float32 on the tensor cores."""
    return "ieee" if x.dtype is torch.float32 else "tf32"


def tiling_of(tokens: int, columns: int, depth: int, dtype: torch.dtype) -> Tiling:
    """What suits a weight [columns, depth] and so many tokens; found by `benchmarks/tune.py` on an H200."""
    if dtype.itemsize > 2:  # as many bytes a turn
        return Tiling(32, 64, 3, 4)
    if columns > 12288:
        return Tiling(64, 64, 6, 4, rows=64)
    if tokens <= SMALL:
        return Tiling(32, 256, 4, 4)
    return Tiling(64, 128, 4, 4, rows=64) if columns > 5120 else Tiling(32, 128, 6, 4, rows=64)


def skinny(
    x: Tensor,
    weight: Tensor,
    tiling: Tiling,
    a: Tensor | None = None,
    h: Tensor | None = None,
    routing: list[Tensor] | None = None,
    where: list[int] | None = None,
    *,
    late: bool = False,
) -> Tensor:
    """The product of at most 64 tokens; with `a` the shrink into `h` [T, S, W * 8] in the same launch.

    `late`: the kernel in front is the shrink of the same x. It waited for x before it let this one start, so x may be
    read at once; only the end waits for the shrink, so that whoever waits for this one finds h, too.
    """
    tokens, depth = x.shape
    columns = weight.shape[0]
    y = x.new_empty((tokens, columns))
    blocks = ceil_div(columns, tiling.columns)
    rest: tuple[object, ...]
    if a is None or h is None or routing is None or where is None:
        workers, slices, splits, span, most, lora = 0, 1, 1, depth, 2, False
        rest = (x, y, x, x, x, x, x, x, 0, 0, 0, 0, 0)
    else:
        perm, _, items, pages, scales = routing
        slices, most, lora = a.shape[0], pages.shape[2], True
        part = 16 * power_of_2(16 * slices)
        splits, span = _splits(depth, len(items), part)
        units = len(items) * splits
        workers = min(units, 2 * processors(x.device))
        scratch = _scratch(x, units if splits > 1 else 0, part)
        rest = (a, h, *scratch, perm, items, pages, scales, units, where[0], pages.shape[1], a.stride(0), a.stride(1))
    widest = a if a is not None and a.dtype is torch.float32 else weight
    pdl = late or chained(tokens, owing=lora)
    launch(
        _skinny_kernel, (workers + blocks,),
        (x, weight, y, *rest, tokens, workers),
        N=columns, K=depth, S=slices, J=power_of_2(16 * slices), W=most, SPLITS=splits, SPAN=span,
        BM=max(tiling.rows, power_of_2(tokens)), BN=tiling.columns, BK=tiling.depth, LORA=lora,
        BEHIND=lora and blocks <= 2 * processors(x.device), PRECISION=precision(widest), LATE=late, pdl=pdl,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return y


def _shrink(x: Tensor, a: Tensor, h: Tensor, routing: list[Tensor], where: list[int], *, pdl: bool = False) -> None:
    perm, _, items, pages, scales = routing
    kind, tile = where
    slices, depth = a.shape[0], x.shape[1]
    rows, joined = max(16, tile), power_of_2(16 * slices)
    splits, span = _splits(depth, len(items), rows * joined)
    scratch = _scratch(x, len(items) * splits if splits > 1 else 0, rows * joined)
    launch(
        _shrink_kernel, (len(items) * splits,),
        (x, a, h, *scratch, perm, items, pages, scales, kind, pages.shape[1], a.stride(0), a.stride(1)),
        K=depth, S=slices, J=joined, W=pages.shape[2], SPLITS=splits, SPAN=span, BM=rows,
        BK=128 if rows == 16 else 64, STAGES=4, PRECISION=precision(a), pdl=pdl, num_warps=4,
    )  # fmt: skip


def _splits(depth: int, items: int, part: int) -> tuple[int, int]:
    """(parts of K, elements of a part): as many programs as keep the memory busy; `part`: elements of a part's sums.

    One part where so many items want it that their sums would take the memory that requests live in.
    """
    span = 512 if items <= 64 else 1024
    splits = ceil_div(depth, span)
    if items > COUNTED or items * splits * part > MOST_PARTS:
        return 1, ceil_div(depth, 128) * 128  # whole turns of the loop
    return splits, span


def _scratch(x: Tensor, units: int, part: int) -> tuple[Tensor, Tensor]:
    """Where parts of sums lie until the last has come, and how many have (zeros, left as zeros)."""
    if x.device not in _ARRIVED:
        _ARRIVED[x.device] = torch.zeros(COUNTED, dtype=torch.int32, device=x.device)
    return x.new_empty((units, part), dtype=torch.float32), _ARRIVED[x.device]


def _empty_h(x: Tensor, a: Tensor, routing: list[Tensor]) -> Tensor:
    return x.new_empty((x.shape[0], a.shape[0], routing[3].shape[2] * a.shape[2]), dtype=torch.float32)


def _whole(x: Tensor, weight: Tensor) -> bool:
    return x.is_contiguous() and weight.is_contiguous() and x.dtype is weight.dtype and x.shape[0] > 0


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_ARRIVED: dict[torch.device, Tensor] = {}


def _beside(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


@triton.jit
def _shrink_unit(
    x, a, h, parts, arrived, perm, items, pages, scales, unit, kind, kinds, a_slice, a_page,
    K: tl.constexpr, S: tl.constexpr, J: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One pair of pages (16 ranks of every slice) times one tile of tokens, over one part of K.

    Whoever comes last of an item's parts adds them up, in their order, and leaves the count at zero.
    """
    item, split = unit // SPLITS, unit % SPLITS
    tile, pair = tl.load(items + item * 4), tl.load(items + item * 4 + 1)
    first, count = tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3)
    if tile >= 0:
        m = tl.arange(0, BM)
        ok = m < count
        tokens = tl.load(perm + first + m, ok, 0)
        x_rows = x + (tokens.to(tl.int64) if BM > 16 else tokens) * K  # T * K of a long step may be over 2^31
        j = tl.arange(0, J)  # slices of 16 ranks
        part, r = j // 16, j % 16
        at = (tile * kinds + kind) * W + pair * 2 + r // 8
        page = tl.load(pages + at, pair * 2 + r // 8 < W, -1)
        there = (page >= 0) & (part < S)
        if tl.max(page) >= 0:
            a_rows = a + part.to(tl.int64) * a_slice + page.to(tl.int64) * a_page + (r % 8) * K
            acc = tl.zeros((BM, J), tl.float32)
            for k0 in tl.range(0, SPAN, BK, num_stages=STAGES):
                k = split * SPAN + k0 + tl.arange(0, BK)
                if K == SPLITS * SPAN:
                    x_MK = tl.load(x_rows[:, None] + k[None, :], ok[:, None], 0.0)
                    a_KJ = tl.load(a_rows[None, :] + k[:, None], there[None, :], 0.0)
                else:
                    x_MK = tl.load(x_rows[:, None] + k[None, :], ok[:, None] & (k < K)[None, :], 0.0)
                    a_KJ = tl.load(a_rows[None, :] + k[:, None], there[None, :] & (k < K)[:, None], 0.0)
                acc = tl.dot(x_MK.to(a_KJ.dtype), a_KJ, acc, input_precision=PRECISION)
            last = True
            if SPLITS > 1:
                inner = m[:, None] * J + j[None, :]
                tl.store(parts + unit * (BM * J) + inner, acc, ok[:, None])
                tl.debug_barrier()
                last = tl.atomic_add(arrived + item, 1, sem="acq_rel") == SPLITS - 1
                if last:
                    tl.store(arrived + item, 0)
                    acc = tl.zeros((BM, J), tl.float32)
                    for other in tl.range(0, SPLITS, 1, num_stages=1, loop_unroll_factor=4):
                        of = parts + (item * SPLITS + other) * (BM * J)
                        acc += tl.load(of + inner, ok[:, None], 0.0, cache_modifier=".cg")
            if last:
                scale = tl.load(scales + at, there, 0.0)
                to = h + (tokens * S * (W * 8) + pair * 16)[:, None] + (part * (W * 8) + r)[None, :]
                tl.store(to, acc * scale[None, :], ok[:, None] & there[None, :])


@triton.jit(do_not_specialize=["kind", "kinds"])
def _shrink_kernel(
    x, a, h, parts, arrived, perm, items, pages, scales, kind, kinds, a_slice, a_page,
    K: tl.constexpr, S: tl.constexpr, J: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    _shrink_unit(
        x, a, h, parts, arrived, perm, items, pages, scales, tl.program_id(0), kind, kinds, a_slice, a_page,
        K, S, J, W, SPLITS, SPAN, BM, BK, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "units", "workers", "kind", "kinds"])
def _skinny_kernel(
    x, w, y, a, h, parts, arrived, perm, items, pages, scales, units, kind, kinds, a_slice, a_page, T, workers,
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, J: tl.constexpr, W: tl.constexpr, SPLITS: tl.constexpr,
    SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LORA: tl.constexpr, BEHIND: tl.constexpr,
    PRECISION: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`workers` programs shrink, unit after unit; each of the others makes BN columns of the product.

    Who shrinks comes first where products take turns on the processors, and behind them where each has its own.
    """
    pid = tl.program_id(0)
    if BEHIND:
        blocks: tl.constexpr = (N + BN - 1) // BN
        pid = tl.where(pid < blocks, pid + workers, pid - blocks)
    n = (pid - workers) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if PDL:
        if not LATE:
            gdc_wait()
        gdc_launch_dependents()
    if LORA and pid < workers:
        for unit in range(pid, units, workers):
            _shrink_unit(
                x, a, h, parts, arrived, perm, items, pages, scales, unit, kind, kinds, a_slice, a_page,
                K, S, J, W, SPLITS, SPAN, 16, 128, 4, PRECISION,
            )  # fmt: skip
    else:
        m = tl.arange(0, BM)
        ok = m < T
        x_at = x + m[:, None] * K + k[None, :]
        w_at = w + (n.to(tl.int64) * K)[None, :] + k[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            if K % BK == 0 and N % BN == 0:
                x_MK = tl.load(x_at, ok[:, None], 0.0)
                w_KN = tl.load(w_at)
            else:
                x_MK = tl.load(x_at, ok[:, None] & (k0 + k < K)[None, :], 0.0)
                w_KN = tl.load(w_at, (n < N)[None, :] & (k0 + k < K)[:, None], 0.0)
            acc = tl.dot(x_MK, w_KN, acc, input_precision=PRECISION)
            x_at += BK
            w_at += BK
        if PDL and LATE:
            gdc_wait()
        tl.store(y + m[:, None] * N + n[None, :], acc.to(y.dtype.element_ty), ok[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["kind", "kinds"])
def _complete_kernel(
    y, bias, out, h, b, vectors, perm, tiles, pages, vector_pages, kind, kinds, b_page, b_rank, v_page,
    N: tl.constexpr, PART: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, S: tl.constexpr, W: tl.constexpr,
    W_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, BIASED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Columns of one slice of one tile of tokens: y with what is owed, + bias."""
    tile = tl.program_id(0)
    first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
    held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
    vector = tl.load(vector_pages + tile * kinds + kind)
    if count > 0:
        n = LOW + tl.program_id(1) * BN + tl.arange(0, BN)
        inside = n < HIGH
        b_RN = load_b(b, pages, tile, kind, kinds, 0, n, inside, b_page, b_rank, W)
        m = tl.arange(0, BM)
        ok = m < count
        tokens = tl.load(perm + first + m, ok, 0)
        at = tokens.to(tl.int64)[:, None] * N + n[None, :]
        mask = ok[:, None] & inside[None, :]
        acc = tl.load(y + at, mask, 0.0).to(tl.float32)
        if held > 0:
            more = expand_pair(tl.zeros((BM, BN), tl.float32), b_RN, h, held, 0, tokens, ok, PART, S, W, PRECISION)
            acc += expand_rest(
                more, b, pages, tile, kind, kinds, h, held, tokens, ok, n, inside, PART, b_page, b_rank, S, W, PRECISION
            )
        if vector >= 0:
            acc = adjusted(acc, vectors, vector, n, inside, v_page, N)
        if BIASED:
            acc += tl.load(bias + n, inside, 0.0).to(tl.float32)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask)
