# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Paged attention in two kernels: sequences with one query split over their keys, the others tile by tile of queries.

Letters as in ops/attention.py. Both keep the running softmax in float32 and base 2 (FlashAttention, arXiv 2205.14135).
The one for single queries packs the H / G query heads of a key-value head into one tile for the tensor cores, and
shares a long sequence out among programs (Flash-Decoding), of which the last to arrive puts the parts together.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels import flash
from aiolora.ops.kernels.launch import PDL, ceil_div, launch, power_of_2, processors

MAX_SPLITS = 16
"""Programs that share a sequence, at most."""

MIN_SPLIT = 64
"""Keys below which another program costs more than it brings."""

LOG2_E = tl.constexpr(math.log2(math.e))

SEARCH = 256
"""Sequences looked at in one go for the owner of a tile."""


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference; every sequence has at least one query, `scale` is positive.

    A row of q that no sequence owns is left unwritten; a sequence of one query and no keys (padding) gets zeros.
    `query_starts` is not read where each sequence has one query (T = B). Calls on one device must follow each other.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_sequences, (_, page_size, num_kv_heads, _) = block_tables.shape[0], k_cache.shape
    if k_cache.stride() != v_cache.stride():
        raise ValueError(f"caches of one layout are needed, not strides {k_cache.stride()} and {v_cache.stride()}")
    if not q.stride(2) == k_cache.stride(3) == block_tables.stride(1) == 1:
        raise ValueError("heads and block tables must be contiguous")
    if num_tokens > num_sequences and sinks is None:
        theirs = flash.prefill(q, k_cache, v_cache, block_tables, kv_lengths, query_starts, scale, window, cap)
        if theirs is not None:
            return theirs
    out = q.new_empty((num_tokens, num_heads * head_dim))
    if num_tokens == 0:
        return out
    group = num_heads // num_kv_heads
    strides = (*q.stride()[:2], *k_cache.stride()[:3], block_tables.stride(0))
    step = (q, k_cache, v_cache, sinks, block_tables, kv_lengths, query_starts, out)
    shape = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, power_of_2(head_dim)),
        "PAGE": page_size,
        "WINDOWED": window > 0,
    }
    scale_2 = scale * LOG2_E.value
    splits = _splits(num_sequences * num_kv_heads, q.device)
    scratch = num_sequences * num_heads * splits * (head_dim + 1) if splits > 1 else 0
    parts = out.new_empty((scratch,), dtype=torch.float32)
    blocks = decode_blocks(group, head_dim, q.dtype)
    args = (*step, parts, _counters(q.device), scale_2, window, num_tokens, *strides)
    launch(decode_kernel, (num_kv_heads, num_sequences, splits), args, pdl=PDL, CAP=cap, **blocks, **shape)
    if num_tokens > num_sequences:
        blocks = prefill_blocks(head_dim, q.dtype)
        # enough to fill the card beside the full tiles; where there are more, a program takes several
        rest = min(num_sequences, ceil_div(2 * processors(q.device), num_heads))
        args = (*step, scale_2, window, num_sequences, *strides)
        grid = (num_heads, num_tokens // blocks["BLOCK_M"] + rest)
        launch(prefill_kernel, grid, args, pdl=PDL, CAP=cap, SEARCH=SEARCH, **blocks, **shape)
    return out


def decode_blocks(group: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of `decode_kernel` for `group` query heads a key-value head."""
    wide = dtype == torch.float32
    return {
        "BLOCK_M": max(16, power_of_2(group)),
        "BLOCK_N": 32 if wide or head_dim > 128 else 64,
        "MAX_SPLITS": MAX_SPLITS,
        "MIN_SPLIT": MIN_SPLIT,
        "num_warps": 4,
        "num_stages": 3,
    }


def prefill_blocks(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of `prefill_kernel`: queries and keys of a tile. float32 has no tensor cores here, hence small ones."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def _splits(tiles: int, device: torch.device) -> int:
    """Programs for each of `tiles` (sequence, key-value head): two a multiprocessor in all, a power of two."""
    return power_of_2(min(MAX_SPLITS, max(1, round(2 * processors(device) / tiles))))


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros, one a (sequence, key-value head) that may be split: the last program to count there leaves zero."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention must run once before it is captured: its counters outlive the graph")
    return torch.zeros(2 * processors(device), dtype=torch.int32, device=device)


@triton.jit
def _capped(products, scale, CAP: tl.constexpr):
    """The `products` q k^T so bent that `scale` (to base 2) makes CAP * tanh(score / CAP) of them. CAP 0: as they are.

    tanh x = 1 - 2 / (e^2x + 1), which an x of any size survives.
    """
    if CAP > 0:
        grown = tl.exp2(products * (scale * (2.0 / CAP)))
        products = (1.0 - 2.0 / (grown + 1.0)) * (LOG2_E * CAP / scale)
    return products


@triton.jit
def _softmax_step(acc, top, total, products, v, scale, GUARD: tl.constexpr):
    """Fold a block of q k^T `products` [M, N], -inf where unseen, and v [N, D] into the running softmax.

    acc [M, D], top [M] and total [M] float32: sum of 2^(score - top) v, largest score, sum of 2^(score - top).
    GUARD: there may be a row that has seen nothing yet.
    """
    new_top = tl.maximum(top, tl.max(products, 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    weights = tl.exp2(products * scale - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["window", "num_tokens", "stride_table"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, tables_ptr, lengths_ptr, starts_ptr, out_ptr, parts_ptr, counters_ptr, scale,
    window, num_tokens, stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr,
    CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (g, b, split): one query of sequence b, GROUP heads of it, over a part of the keys.

    Parts in scratch: the normalised sums [B * G, splits, GROUP, D], then log2 of what they were divided by.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g, b, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mixed = num_tokens > tl.num_programs(1)
    length = tl.load(lengths_ptr + b)
    token = tl.load(starts_ptr + b, mask=mixed, other=b)
    if tl.load(starts_ptr + b + 1, mask=mixed, other=b + 1) - token != 1:
        return

    first = length * 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    first_block = first // BLOCK_N
    blocks = tl.cdiv(length, BLOCK_N) - first_block
    wanted = tl.minimum(tl.num_programs(2), tl.cdiv(blocks * BLOCK_N, MIN_SPLIT))
    share = tl.cdiv(tl.maximum(blocks, 1), tl.maximum(wanted, 1))
    active = tl.maximum(tl.cdiv(blocks, share), 1)
    if split >= active:
        return

    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    valid = (m < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    rows = token.to(tl.int64) * stride_qt + (g * GROUP + m) * stride_qh
    q = tl.load(q_ptr + rows[:, None] + d[None, :], mask=valid, other=0.0)
    table = tables_ptr + b.to(tl.int64) * stride_table
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # a key without value, seen once however many share the sequence
        sink = tl.load(sinks_ptr + g * GROUP + m, mask=(m < GROUP) & (split == 0), other=float("-inf"))
        top = sink.to(tl.float32) * LOG2_E
        total = tl.where(split == 0, total + 1.0, total)
    start = (first_block + split * share) * BLOCK_N
    for low in range(start, tl.minimum(start + share * BLOCK_N, length), BLOCK_N):
        n = low + tl.arange(0, BLOCK_N)
        seen = n < length
        if WINDOWED:
            seen &= n >= first
        page = tl.load(table + n // PAGE, mask=seen, other=0).to(tl.int64)
        at = (page * stride_page + (n % PAGE) * stride_slot + g * stride_head)[:, None] + d[None, :]
        loaded = seen[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + at, mask=loaded, other=0.0).to(q.dtype)
        v = tl.load(v_ptr + at, mask=loaded, other=0.0).to(q.dtype)
        products = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, CAP)
        products = tl.where(seen[None, :], products, float("-inf"))
        acc, top, total = _softmax_step(acc, top, total, products, v, scale, False)
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]

    head = g * GROUP + m
    num_heads = tl.num_programs(0) * GROUP
    if active == 1:
        to = (token.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=valid)
        return

    tile, splits = b * tl.num_programs(0) + g, tl.num_programs(2)
    norms_ptr = parts_ptr + tl.num_programs(1) * num_heads * splits * HEAD_DIM
    part = (tile * splits + split) * GROUP + m
    tl.store(parts_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=valid)
    tl.store(norms_ptr + part, top + tl.log2(total), mask=m < GROUP)
    tl.debug_barrier()  # every thread's part is written when one thread counts
    if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") == active - 1:
        tl.store(counters_ptr + tile, 0)
        _combine(
            parts_ptr + tile * splits * GROUP * HEAD_DIM,
            norms_ptr + tile * splits * GROUP,
            out_ptr + (token.to(tl.int64) * num_heads + g * GROUP) * HEAD_DIM,
            active, GROUP, HEAD_DIM, BLOCK_D, MAX_SPLITS,
        )  # fmt: skip


@triton.jit
def _combine(
    parts_ptr, norms_ptr, out_ptr, active,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Sum out [GROUP, D] up: the first `active` of parts [splits, GROUP, D] with norms [splits, GROUP], in order."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    AT_ONCE: tl.constexpr = max(1, min(MAX_SPLITS, 4096 // (BLOCK_G * BLOCK_D)))
    r, d, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, MAX_SPLITS)
    kept = (s < active)[:, None] & (r < GROUP)[None, :]
    norms = tl.load(norms_ptr + s[:, None] * GROUP + r[None, :], mask=kept, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(norms, 0)
    top = tl.where(r < GROUP, top, 0.0)
    total = tl.sum(tl.exp2(norms - top[None, :]), 0)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for low in tl.static_range(0, MAX_SPLITS, AT_ONCE):
        if low < active:
            part = low + tl.arange(0, AT_ONCE)
            known = (part < active)[:, None] & (r < GROUP)[None, :]
            row = part[:, None] * GROUP + r[None, :]
            norm = tl.load(norms_ptr + row, mask=known, other=float("-inf"), cache_modifier=".cg")
            values = tl.load(
                parts_ptr + row[:, :, None] * HEAD_DIM + d[None, None, :],
                mask=known[:, :, None] & (d < HEAD_DIM)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            acc += tl.sum(values * tl.exp2(norm - top[None, :])[:, :, None], 0)
    acc = acc / tl.where(r < GROUP, total, 1.0)[:, None]
    to = r[:, None] * HEAD_DIM + d[None, :]
    valid = (r < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _tiles(starts_ptr, b, num_sequences, BLOCK_M: tl.constexpr):
    """Tiles of each sequence in `b`: none for one query or less."""
    known = b < num_sequences
    queries = tl.load(starts_ptr + b + 1, mask=known, other=0) - tl.load(starts_ptr + b, mask=known, other=0)
    return tl.where(queries > 1, tl.cdiv(queries, BLOCK_M), 0)


@triton.jit(do_not_specialize=["window", "num_sequences", "stride_table"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, tables_ptr, lengths_ptr, starts_ptr, out_ptr, scale, window, num_sequences,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr,
    CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, i): that head of tiles i, i + programs ..., from the last tile of the step on, the dearest."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    num_tiles = 0
    for low in range(0, num_sequences, SEARCH):
        num_tiles += tl.sum(_tiles(starts_ptr, low + tl.arange(0, SEARCH), num_sequences, BLOCK_M), 0)

    for place in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        # the owner b of the tile, the tiles before b's first: by the running count of tiles
        tile = num_tiles - 1 - place
        b, before, passed = 0, 0, 0
        for low in range(0, num_sequences, SEARCH):
            sequence = low + tl.arange(0, SEARCH)
            ends = passed + tl.cumsum(_tiles(starts_ptr, sequence, num_sequences, BLOCK_M), 0)
            behind = (ends <= tile) & (sequence < num_sequences)
            b += tl.sum(tl.where(behind, 1, 0), 0)
            before = tl.maximum(before, tl.max(tl.where(behind, ends, 0), 0))
            passed = tl.max(ends, 0)
        query = (tile - before) * BLOCK_M
        token = tl.load(starts_ptr + b)
        queries = tl.load(starts_ptr + b + 1) - token
        length = tl.load(lengths_ptr + b)
        prefix = length - queries

        valid = (query + m < queries)[:, None] & (d < HEAD_DIM)[None, :]
        rows = token.to(tl.int64) + query + m
        q = tl.load(q_ptr + rows[:, None] * stride_qt + head * stride_qh + d[None, :], mask=valid, other=0.0)
        table = tables_ptr + tl.cast(b, tl.int64) * stride_table
        keys, values = k_ptr + (head // GROUP) * stride_head, v_ptr + (head // GROUP) * stride_head
        position = prefix + query + m
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if sinks_ptr is not None:
            top = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
            total += 1.0

        # keys [first, end) are seen by some query, [full, causal) by all
        end = tl.minimum(prefix + query + BLOCK_M, length)
        causal = (prefix + query + 1) // BLOCK_N * BLOCK_N
        first, full = 0, 0
        if WINDOWED:
            first = tl.maximum(prefix + query + 1 - window, 0)
            full = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, causal)
        for low in range(full, causal, BLOCK_N):
            n = low + tl.arange(0, BLOCK_N)
            page = tl.load(table + n // PAGE).to(tl.int64)
            at = (page * stride_page + (n % PAGE) * stride_slot)[:, None] + d[None, :]
            if HEAD_DIM == BLOCK_D:
                k, v = tl.load(keys + at).to(q.dtype), tl.load(values + at).to(q.dtype)
            else:
                k = tl.load(keys + at, mask=(d < HEAD_DIM)[None, :], other=0.0).to(q.dtype)
                v = tl.load(values + at, mask=(d < HEAD_DIM)[None, :], other=0.0).to(q.dtype)
            products = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, CAP)
            acc, top, total = _softmax_step(acc, top, total, products, v, scale, False)
        left = full // BLOCK_N - first // BLOCK_N
        for i in range(left + tl.cdiv(end - causal, BLOCK_N)):
            low = tl.where(i < left, (first // BLOCK_N + i) * BLOCK_N, causal + (i - left) * BLOCK_N)
            n = low + tl.arange(0, BLOCK_N)
            needed = (n >= first) & (n < end)
            page = tl.load(table + n // PAGE, mask=needed, other=0).to(tl.int64)
            at = (page * stride_page + (n % PAGE) * stride_slot)[:, None] + d[None, :]
            loaded = needed[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(keys + at, mask=loaded, other=0.0).to(q.dtype)
            v = tl.load(values + at, mask=loaded, other=0.0).to(q.dtype)
            products = _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, CAP)
            seen = n[None, :] <= position[:, None]
            if WINDOWED:
                seen &= n[None, :] > position[:, None] - window
            products = tl.where(seen, products, float("-inf"))
            acc, top, total = _softmax_step(acc, top, total, products, v, scale, True)

        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        to = (rows * tl.num_programs(0) + head)[:, None] * HEAD_DIM + d[None, :]
        tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=valid)
