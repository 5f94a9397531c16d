"""q, k and v on their way to attention: what they owe, norms, rotary positions and the KV write in one launch.

They come in three slices, or fused in one; a norm over all heads at once is made in launches of its own, before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.expand import adjusted, expand_pair, expand_rest, held_pages, load_b, pay_rest, pay_token
from aiolora.ops.kernels.launch import ceil_div, launch, power_of_2
from aiolora.ops.kernels.linear import chained, complete, precision
from aiolora.ops.kernels.norm import rms_norm

BY_TOKEN = 64  # tokens up to which each pays alone


def rope_store(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    norm_offset: float = 0.0,
) -> Tensor:
    """See `attention.rope_store`."""
    tokens = y.shape[0]
    num_kv_heads, head_dim = k_cache.shape[2:]
    if q_norm is not None and k_norm is not None and q_norm.shape[0] != head_dim:
        value, widths = complete(y, bias, owed, where), (len(q_norm), len(k_norm), num_kv_heads * head_dim)
        whole_q, whole_k, v = value.split(widths, dim=1)
        whole_q, whole_k = rms_norm(whole_q, q_norm, eps, norm_offset), rms_norm(whole_k, k_norm, eps, norm_offset)
        y, bias, owed, where, q_norm, k_norm = torch.cat((whole_q, whole_k, v), dim=1), None, [], [], None, None
    q = y.new_empty((tokens, num_heads, head_dim))
    alone = bool(owed) and tokens <= BY_TOKEN
    if owed:
        h, b, vectors, perm, tiles, pages, vector_pages, owners = owed
        most, rows = pages.shape[2], 1 if alone else max(16, where[1])
        groups = tokens if alone else tiles.shape[0]
        tables = perm, tiles, pages, vector_pages, owners
        strides = b.stride(0), b.stride(1), vectors.stride(0)
        rest: tuple[object, ...] = (h, b, vectors, *tables, where[0], pages.shape[1], *strides)
        heads = 4 if groups >= 16 else 1
    else:
        most, rows = 2, min(16, power_of_2(tokens))
        groups = ceil_div(tokens, rows)
        rest = (y, y, y, y, y, y, y, y, 0, 0, 0, 0, 0)
        heads = 1
    pdl = chained(tokens, bool(owed))
    launch(
        _rope_store_kernel, (groups, ceil_div(num_heads + 2 * num_kv_heads, heads)),
        (y, bias, q_norm, k_norm, cos_sin, positions, slots, q, k_cache, v_cache, *rest, tokens, eps),
        H=num_heads, G=num_kv_heads, D=head_dim, R=cos_sin.shape[1], HALF=power_of_2(head_dim // 2),
        S=max(1, len(where) - 3), W=most, W_BLOCK=power_of_2(most), BM=rows, HEADS=heads, OFFSET=norm_offset,
        PRECISION=precision(owed[1] if owed else y), LORA=bool(owed), ALONE=alone, pdl=pdl,
        num_warps=1 if rows <= 4 else 4 if rows <= 16 else 8,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["T", "kind", "kinds"])
def _rope_store_kernel(
    y, bias, q_norm, k_norm, cos_sin, positions, slots, q, k_cache, v_cache,
    h, b, vectors, perm, tiles, pages, vector_pages, owners, kind, kinds, b_page, b_rank, v_page, T, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, S: tl.constexpr,
    W: tl.constexpr, W_BLOCK: tl.constexpr, BM: tl.constexpr, HEADS: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr, LORA: tl.constexpr, ALONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a tile of tokens, or of one token (ALONE); without adapters a tile is BM neighbours.

    A head is worked on as two halves whose values turn in pairs. Where only its first R values turn, each half has the
    half of those before a half of the others, which turn by no angle.
    """
    tile = tl.program_id(0)
    token = tile
    head = tl.program_id(1) * HEADS
    half: tl.constexpr = D // 2
    turned: tl.constexpr = R // 2
    still: tl.constexpr = 1.0 if R != D else 0.0  # cosine of what does not turn; without any, nobody reads it
    width: tl.constexpr = (H + 2 * G) * D
    m = tl.arange(0, BM)
    d = tl.arange(0, HALF)
    inside = d < half
    low_d, apart, turns = d, half, inside
    if R != D:
        turns = d < turned
        low_d = tl.where(turns, d, d + turned)
        apart = tl.where(turns, turned, half - turned)
    if LORA:
        if ALONE:
            tile = tl.load(owners + token)
            count = 1
            ok = m < 1
            tokens = token + m
        else:
            first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
            ok = m < count
            tokens = tl.load(perm + first + m, ok, 0)
        held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
        vector = tl.load(vector_pages + tile * kinds + kind)
        n = head * D + low_d
        b_low = load_b(b, pages, tile, kind, kinds, 0, n, inside & (n < width), b_page, b_rank, W)
        b_high = load_b(b, pages, tile, kind, kinds, 0, apart + n, inside & (n < width), b_page, b_rank, W)
    else:
        tokens = tile * BM + m
        ok = tokens < T
        count = 1
    slot = tl.load(slots + tokens, ok, -1).to(tl.int64)
    position = tl.load(positions + tokens, ok, 0)
    angle = cos_sin + position.to(tl.int64)[:, None] * R + d[None, :]
    cos = tl.load(angle, ok[:, None] & turns[None, :], still)
    sin = tl.load(angle + turned, ok[:, None] & turns[None, :], 0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if count > 0:
        for turn in tl.static_range(HEADS):
            n = head * D + low_d
            columns = inside & (n < width)
            mask = ok[:, None] & columns[None, :]
            at = tokens.to(tl.int64)[:, None] * width + n[None, :]
            low = tl.load(y + at, mask, 0.0).to(tl.float32)
            high = tl.load(y + at + apart, mask, 0.0).to(tl.float32)
            if LORA:
                part = head * 0
                if S == 3:
                    part = (head >= H).to(tl.int32) + (head >= H + G).to(tl.int32)
                low_now, high_now = b_low, b_high
                if turn + 1 < HEADS:  # on their way while this head is worked on
                    ahead = inside & (n + D < width)
                    b_low = load_b(b, pages, tile, kind, kinds, 0, n + D, ahead, b_page, b_rank, W)
                    b_high = load_b(b, pages, tile, kind, kinds, 0, apart + n + D, ahead, b_page, b_rank, W)
                if held > 0:
                    if ALONE:
                        more = pay_token(tl.zeros((HALF,), tl.float32), low_now, h, held, 0, token, part, S, W)
                        more = pay_rest(
                            more, b, pages, tile, kind, kinds, h, held, token, n, columns, part, b_page, b_rank, S, W
                        )
                        low += more[None, :]
                        more = pay_token(tl.zeros((HALF,), tl.float32), high_now, h, held, 0, token, part, S, W)
                        more = pay_rest(
                            more, b, pages, tile, kind, kinds, h, held, token, apart + n, columns, part, b_page, b_rank,
                            S, W,
                        )  # fmt: skip
                        high += more[None, :]
                    else:
                        none = tl.zeros((BM, HALF), tl.float32)
                        low_more = expand_pair(none, low_now, h, held, 0, tokens, ok, part, S, W, PRECISION)
                        high_more = expand_pair(none, high_now, h, held, 0, tokens, ok, part, S, W, PRECISION)
                        low += expand_rest(
                            low_more, b, pages, tile, kind, kinds, h, held, tokens, ok, n, columns, part,
                            b_page, b_rank, S, W, PRECISION,
                        )  # fmt: skip
                        high += expand_rest(
                            high_more, b, pages, tile, kind, kinds, h, held, tokens, ok, apart + n, columns, part,
                            b_page, b_rank, S, W, PRECISION,
                        )  # fmt: skip
                if vector >= 0:
                    low = adjusted(low, vectors, vector, n, columns, v_page, width)
                    high = adjusted(high, vectors, vector, apart + n, columns, v_page, width)
            if bias is not None:
                low += tl.load(bias + n, columns, 0.0).to(tl.float32)[None, :]
                high += tl.load(bias + apart + n, columns, 0.0).to(tl.float32)[None, :]
            low = low.to(y.dtype.element_ty).to(tl.float32)
            high = high.to(y.dtype.element_ty).to(tl.float32)
            kept = mask & (slot >= 0)[:, None]
            if head >= H + G:
                to = (slot[:, None] * G + head - H - G) * D + low_d[None, :]
                tl.store(v_cache + to, low.to(v_cache.dtype.element_ty), kept)
                tl.store(v_cache + to + apart, high.to(v_cache.dtype.element_ty), kept)
            else:
                if q_norm is not None:
                    weight = q_norm if head < H else k_norm
                    root = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
                    low_weight = tl.load(weight + low_d, inside, 0.0).to(tl.float32)[None, :]
                    high_weight = tl.load(weight + apart + low_d, inside, 0.0).to(tl.float32)[None, :]
                    if OFFSET != 0:
                        low, high = low * root * (low_weight + OFFSET), high * root * (high_weight + OFFSET)
                    else:
                        low = (low * root).to(y.dtype.element_ty).to(tl.float32) * low_weight
                        high = (high * root).to(y.dtype.element_ty).to(tl.float32) * high_weight
                    low = low.to(y.dtype.element_ty).to(tl.float32)
                    high = high.to(y.dtype.element_ty).to(tl.float32)
                turned_low = low * cos - high * sin
                turned_high = high * cos + low * sin
                if head < H:
                    to = (tokens.to(tl.int64)[:, None] * H + head) * D + low_d[None, :]
                    tl.store(q + to, turned_low.to(q.dtype.element_ty), mask)
                    tl.store(q + to + apart, turned_high.to(q.dtype.element_ty), mask)
                else:
                    to = (slot[:, None] * G + head - H) * D + low_d[None, :]
                    tl.store(k_cache + to, turned_low.to(k_cache.dtype.element_ty), kept)
                    tl.store(k_cache + to + apart, turned_high.to(k_cache.dtype.element_ty), kept)
            head += 1
