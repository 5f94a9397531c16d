"""Routed experts on a GPU: a grouped product, one tile of one expert's rows a program, that pays what its rows owe.

A tile's rows may belong to several mixes: one after the other is expanded, by the pages of whoever of the rows is the
first that is left. Few rows are shrunk each by itself, more by tiles in the same way. Nothing is summed by atomics.

Of few tokens, a product is set up and begins while the shrink of the same x still runs: that one waited for x and for
the choice of experts before it let the product start. Only what a program owes at its end waits for the shrink.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.experts import APART
from aiolora.ops.kernels.expand import expand_mixes, next_mix, two_pages
from aiolora.ops.kernels.launch import ceil_div, launch, power_of_2
from aiolora.ops.kernels.linear import chained, precision
from aiolora.ops.kernels.routes import choose_experts

__all__ = ["choose_experts", "gated_experts", "summed_experts"]


class Tiling(NamedTuple):
    """How a product of a tile of rows is cut."""

    columns: int  # of the result a program; of gate and of up each
    depth: int  # of K a turn of its loop
    stages: int
    warps: int


GATED = {16: Tiling(32, 128, 4, 4), 64: Tiling(64, 64, 3, 4)}  # by rows of a tile
SUMMED = {16: Tiling(64, 128, 4, 4), 64: Tiling(128, 64, 3, 4)}


def gated_experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
    alpha: float = 1.0,
    limit: float = 0.0,
) -> Tensor:
    """See `experts.gated_experts`."""
    experts, rows, tiles = chosen
    depth, width, top_k = x.shape[1], weight.shape[1] // 2, experts.shape[1]
    x = x.contiguous()
    h, rest, most = _shrunk(x, experts, rows, tiles, adapters, where, divisor=top_k)
    out = x.new_empty((rows.shape[0], width))
    tile = where[0]
    cut = GATED[tile]
    launch(
        _gated_kernel, (ceil_div(width, cut.columns), tiles.shape[0]),
        (x, weight, bias, out, h, rows, tiles, *rest),
        N=width, K=depth, TOPK=top_k, W=most, BM=tile, BN=cut.columns, BK=cut.depth, LORA=bool(adapters),
        ALPHA=alpha, LIMIT=limit, PRECISION=_precision(x, adapters), pdl=chained(x.shape[0], bool(adapters)),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def summed_experts(
    inner: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    chosen: list[Tensor],
    adapters: list[Tensor],
    where: list[int],
) -> Tensor:
    """See `experts.summed_experts`."""
    experts, rows, tiles = chosen
    depth, width, top_k = inner.shape[1], weight.shape[1], experts.shape[1]
    inner = inner.contiguous()
    h, rest, most = _shrunk(inner, experts, rows, tiles, adapters, where, divisor=1)
    parts = inner.new_empty((rows.shape[0], width))
    tile = where[0]
    cut = SUMMED[tile]
    launch(
        _summed_kernel, (ceil_div(width, cut.columns), tiles.shape[0]),
        (inner, weight, bias, weights, parts, h, rows, tiles, *rest),
        N=width, K=depth, TOPK=top_k, W=most, BM=tile, BN=cut.columns, BK=cut.depth, LORA=bool(adapters),
        PRECISION=_precision(inner, adapters), pdl=chained(len(weights), bool(adapters)),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    out = inner.new_empty((weights.shape[0], width))
    columns = min(1024, power_of_2(width))
    launch(
        _sum_kernel, (out.shape[0], ceil_div(width, columns)),
        (parts, out),
        N=width, TOPK=top_k, BN=columns, pdl=chained(len(weights), bool(adapters)),
    )  # fmt: skip
    return out


def _precision(x: Tensor, adapters: list[Tensor]) -> str:
    """Of the product and what is added to it: float32 stays it, whichever of both is."""
    return precision(x if x.dtype is torch.float32 or not adapters else adapters[0])


def _shrunk(
    x: Tensor, experts: Tensor, rows: Tensor, tiles: Tensor, adapters: list[Tensor], where: list[int], *, divisor: int
) -> tuple[Tensor, tuple[object, ...], int]:
    """H [R, S, W * 8], what an expanding kernel takes behind it, and W; row r of R is row r // divisor of x."""
    if not adapters:
        return x, (x, x, x, 0, 0, 0, 0, 0), 2
    a, b, pages, scales, owners = adapters
    slices, depth, (kinds, most) = a.shape[2], x.shape[1], pages.shape[1:]
    h = torch.empty((rows.shape[0], slices, most * 8), dtype=torch.float32, device=x.device)
    tables = pages, scales, owners, where[1], kinds, a.stride(0), a.stride(1), a.stride(2)
    if rows.shape[0] <= APART:
        launch(
            _shrink_row_kernel, (rows.shape[0], slices, ceil_div(most, 2)),
            (x, a, h, experts, *tables),
            K=depth, DIVISOR=divisor, TOPK=experts.shape[1], S=slices, W=most, BK=min(512, power_of_2(depth)),
            pdl=chained(len(experts), owing=True), num_warps=4,
        )  # fmt: skip
    else:
        launch(
            _shrink_tile_kernel, (tiles.shape[0], ceil_div(most, 2)),
            (x, a, h, rows, tiles, *tables),
            K=depth, DIVISOR=divisor, TOPK=experts.shape[1], S=slices, J=power_of_2(16 * slices), W=most, BM=where[0],
            BK=64, PRECISION=precision(a), pdl=chained(len(experts), owing=True), num_warps=4, num_stages=3,
        )  # fmt: skip
    return h, (b, pages, owners, where[1], kinds, b.stride(0), b.stride(1), b.stride(2)), most


@triton.jit(do_not_specialize=["kind", "kinds"])
def _shrink_row_kernel(
    x, a, h, experts, pages, scales, owners, kind, kinds, a_page, a_expert, a_slice,
    K: tl.constexpr, DIVISOR: tl.constexpr, TOPK: tl.constexpr, S: tl.constexpr, W: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A pair of pages of one slice times one row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = tl.arange(0, 16)
    w = pair * 2 + j // 8
    at = (tl.load(owners + row // TOPK) * kinds + kind) * W + w
    page = tl.load(pages + at, w < W, -1)
    if tl.max(page) >= 0:
        expert = tl.load(experts + row).to(tl.int64)
        a_rows = a + expert * a_expert + part * a_slice + page.to(tl.int64) * a_page + (j % 8) * K
        x_row = x + (row // DIVISOR).to(tl.int64) * K
        acc = tl.zeros((16, BK), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            x_K = tl.load(x_row + k, k < K, 0.0).to(a.dtype.element_ty).to(tl.float32)
            a_JK = tl.load(a_rows[:, None] + k[None, :], (page >= 0)[:, None] & (k < K)[None, :], 0.0)
            acc += a_JK.to(tl.float32) * x_K[None, :]
        scale = tl.load(scales + at, w < W, 0.0)
        to = h + (row.to(tl.int64) * S + part) * (W * 8) + pair * 16 + j
        tl.store(to, tl.sum(acc, 1) * scale, page >= 0)


@triton.jit(do_not_specialize=["kind", "kinds"])
def _shrink_tile_kernel(
    x, a, h, rows, tiles, pages, scales, owners, kind, kinds, a_page, a_expert, a_slice,
    K: tl.constexpr, DIVISOR: tl.constexpr, TOPK: tl.constexpr, S: tl.constexpr, J: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A pair of pages of every slice times a tile, mix after mix."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile, pair = tl.program_id(0), tl.program_id(1)
    expert, start, count = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if count > 0:
        m, j = tl.arange(0, BM), tl.arange(0, J)
        ok = m < count
        row = tl.load(rows + start + m, ok, 0)
        x_rows = x + (row // DIVISOR).to(tl.int64) * K
        part, r = j // 16, j % 16
        at = (tl.load(owners + row // TOPK, ok, 0) * kinds + kind) * W
        first, second, left = two_pages(pages, at, ok, pair, W)
        a_rows = a + expert.to(tl.int64) * a_expert + part.to(tl.int64) * a_slice + (r % 8) * K
        while tl.sum(left.to(tl.int32)) > 0:
            one, two, mine = next_mix(left, first, second, m, BM)
            page = tl.where(r < 8, one, two)
            there = (page >= 0) & (part < S)
            a_at = a_rows + page.to(tl.int64) * a_page
            acc = tl.zeros((BM, J), tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                x_MK = tl.load(x_rows[:, None] + k[None, :], mine[:, None] & (k < K)[None, :], 0.0)
                a_KJ = tl.load(a_at[None, :] + k[:, None], there[None, :] & (k < K)[:, None], 0.0)
                acc = tl.dot(x_MK.to(a_KJ.dtype), a_KJ, acc, input_precision=PRECISION)
            some = mine[:, None] & there[None, :]
            scale = tl.load(scales + at[:, None] + (pair * 2 + r // 8)[None, :], some, 0.0)
            to = h + (row.to(tl.int64) * (S * W * 8) + pair * 16)[:, None] + (part * (W * 8) + r)[None, :]
            tl.store(to, acc * scale, some)
            left = left & (mine == 0)


@triton.jit
def _begin(tiles, LORA: tl.constexpr, PDL: tl.constexpr):
    """Expert, first position in rows and count of the tile of a product's program; what owes waits at its end."""
    if PDL:
        if not LORA:
            gdc_wait()
        gdc_launch_dependents()
    at = tiles + tl.program_id(1) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit(do_not_specialize=["kind", "kinds"])
def _gated_kernel(
    x, w, bias, out, h, rows, tiles, b, pages, owners, kind, kinds, b_page, b_expert, b_rank,
    N: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, LORA: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of gate and of up for a tile of rows, and one opened by the other: `experts.Gate`."""
    expert, start, count = _begin(tiles, LORA, PDL)
    if count > 0:
        m, k = tl.arange(0, BM), tl.arange(0, BK)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        ok, inside = m < count, n < N
        row = tl.load(rows + start + m, ok, 0)
        x_at = (x + (row // TOPK).to(tl.int64) * K)[:, None] + k[None, :]
        w_at = (w + expert.to(tl.int64) * (2 * N * K) + n.to(tl.int64) * K)[None, :] + k[:, None]
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            if K % BK == 0 and N % BN == 0:
                x_MK = tl.load(x_at + k0, ok[:, None], 0.0)
                gate_KN = tl.load(w_at + k0)
                up_KN = tl.load(w_at + (N * K + k0))
            else:
                some = inside[None, :] & (k0 + k < K)[:, None]
                x_MK = tl.load(x_at + k0, ok[:, None] & (k0 + k < K)[None, :], 0.0)
                gate_KN = tl.load(w_at + k0, some, 0.0)
                up_KN = tl.load(w_at + (N * K + k0), some, 0.0)
            gate = tl.dot(x_MK, gate_KN, gate, input_precision=PRECISION)
            up = tl.dot(x_MK, up_KN, up, input_precision=PRECISION)
        if LORA:
            if PDL:
                gdc_wait()
            at = (tl.load(owners + row // TOPK, ok, 0) * kinds + kind) * W
            own = b + expert.to(tl.int64) * b_expert
            gate = expand_mixes(
                gate, h, own, pages, at, row, ok, m, n, inside, 0, b_page, b_rank, 2, W, BM, PRECISION
            )  # fmt: skip
            up = expand_mixes(
                up, h, own, pages, at, row, ok, m, N + n, inside, 1, b_page, b_rank, 2, W, BM, PRECISION
            )  # fmt: skip
        if bias is not None:
            at_bias = bias + expert.to(tl.int64) * (2 * N) + n
            gate += tl.load(at_bias, inside, 0.0).to(tl.float32)[None, :]
            up += tl.load(at_bias + N, inside, 0.0).to(tl.float32)[None, :]
        gate = gate.to(out.dtype.element_ty).to(tl.float32)
        up = up.to(out.dtype.element_ty).to(tl.float32)
        if LIMIT > 0:  # by comparison: NaN stays NaN
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
            opened = gate / (1.0 + tl.exp(-ALPHA * gate))
        else:
            opened = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
        to = (out + row.to(tl.int64) * N)[:, None] + n[None, :]
        tl.store(to, (opened * up).to(out.dtype.element_ty), ok[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["kind", "kinds"])
def _summed_kernel(
    x, w, bias, weights, out, h, rows, tiles, b, pages, owners, kind, kinds, b_page, b_expert, b_rank,
    N: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, LORA: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of a tile of rows, times the weight of each."""
    expert, start, count = _begin(tiles, LORA, PDL)
    if count > 0:
        m, k = tl.arange(0, BM), tl.arange(0, BK)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        ok, inside = m < count, n < N
        row = tl.load(rows + start + m, ok, 0)
        x_at = (x + row.to(tl.int64) * K)[:, None] + k[None, :]
        w_at = (w + expert.to(tl.int64) * (N * K) + n.to(tl.int64) * K)[None, :] + k[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            if K % BK == 0 and N % BN == 0:
                x_MK = tl.load(x_at + k0, ok[:, None], 0.0)
                w_KN = tl.load(w_at + k0)
            else:
                x_MK = tl.load(x_at + k0, ok[:, None] & (k0 + k < K)[None, :], 0.0)
                w_KN = tl.load(w_at + k0, inside[None, :] & (k0 + k < K)[:, None], 0.0)
            acc = tl.dot(x_MK, w_KN, acc, input_precision=PRECISION)
        if LORA:
            if PDL:
                gdc_wait()
            at = (tl.load(owners + row // TOPK, ok, 0) * kinds + kind) * W
            own = b + expert.to(tl.int64) * b_expert
            acc = expand_mixes(
                acc, h, own, pages, at, row, ok, m, n, inside, 0, b_page, b_rank, 1, W, BM, PRECISION
            )  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + expert.to(tl.int64) * N + n, inside, 0.0).to(tl.float32)[None, :]
        acc = acc.to(out.dtype.element_ty).to(tl.float32) * tl.load(weights + row, ok, 0.0)[:, None]
        to = (out + row.to(tl.int64) * N)[:, None] + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), ok[:, None] & inside[None, :])


@triton.jit
def _sum_kernel(parts, out, N: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    """BN columns of one token: the sum of its rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for j in range(TOPK):
        acc += tl.load(parts + (token * TOPK + j) * N + n, n < N, 0.0).to(tl.float32)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), n < N)
