"""Paged attention: rotary positions and the KV write in one op, then attention over the pages of each sequence.

Shapes: T tokens of all sequences of the step, B sequences, H query heads, G key-value heads, D head size,
P pages of `page_size` tokens. Caches are [P, page_size, G, D], one for keys and one for values a layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.linear import Partial, paid
from aiolora.ops.norm import rms_norm
from aiolora.ops.registration import define


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
    """Split a Partial's value [T, (H + 2 G) D] into q, k, v; norm, rotate and store: returns q [T, H, D].

    `q_norm` and `k_norm` are of one head, [D] (Qwen3), or of all of them together, [H D] and [G D] (OLMo 2);
    `norm_offset` as in `norm.rms_norm`. `cos_sin` [positions, R] float32 holds cos | sin of half of a head's first R
    values; halves are rotated (the Llama layout, RoFormer arXiv 2104.09864), the rest stays. k and v of token t go to
    cache slot `slots[t]` = page * page_size + offset; -1: nowhere.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    qkv = paid(y, bias, owed, where).to(y.dtype).view(y.shape[0], -1, head_dim)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = (
            rms_norm(x.reshape(len(x), -1, len(weight)), weight, eps, norm_offset).view(x.shape)
            for x, weight in ((q, q_norm), (k, k_norm))
        )
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    kept = slots >= 0
    k_cache.flatten(0, 1)[slots[kept]] = _rotate(k, cos, sin).to(k_cache.dtype)[kept]
    v_cache.flatten(0, 1)[slots[kept]] = v.to(v_cache.dtype)[kept]
    return _rotate(q, cos, sin)


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
    """Causal attention of q [T, H, D] over each sequence's own pages: [T, H * D].

    Sequence b has queries `query_starts[b] : query_starts[b + 1]`, the last of its `kv_lengths[b]` tokens, whose keys
    lie in pages `block_tables[b]` [B, max pages]. `window` > 0: a token sees itself and the window - 1 before it.
    `cap` > 0: a score is cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). `sinks` [H]: each query of a head sees a
    key of this score, too, whose value is zero (gpt-oss, arXiv 2508.10925).
    """
    out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
    _attend(out, q, k_cache, v_cache, block_tables, kv_lengths, query_starts, scale, window, cap, sinks)
    return out


def _attend(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: Tensor | None,
    over: int = 0,
) -> None:
    """Write the rows of `out` whose sequence has more than `over` queries."""
    page_size = k_cache.shape[1]
    starts, lengths = query_starts.tolist(), kv_lengths.tolist()
    for b, length in enumerate(lengths):
        low, high = starts[b], starts[b + 1]
        if high - low <= over:
            continue
        pages = block_tables[b, : -(-length // page_size)]
        k = k_cache[pages].flatten(0, 1)[:length].transpose(0, 1).to(q.dtype)
        v = v_cache[pages].flatten(0, 1)[:length].transpose(0, 1).to(q.dtype)
        key = torch.arange(length, device=q.device)
        query = torch.arange(length - (high - low), length, device=q.device).unsqueeze(1)
        mask = key <= query
        if window > 0:
            mask &= key > query - window
        mine = q[low:high].transpose(0, 1)
        if cap > 0 or sinks is not None:
            wide, shared = torch.promote_types(q.dtype, torch.float32), len(mine) // len(k)
            k, v = k.to(wide).repeat_interleave(shared, 0), v.to(wide).repeat_interleave(shared, 0)
            scores = mine.to(wide) @ k.mT * scale
            if cap > 0:
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(~mask, -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks.to(wide).view(-1, 1, 1).expand(-1, high - low, 1)), -1)
            seen = scores.softmax(-1)[..., :length] @ v
        else:
            one = mine.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask
            seen = F.scaled_dot_product_attention(*one, scale=scale, enable_gqa=True).squeeze(0)
        out[low:high] = seen.transpose(0, 1).flatten(1)


def _rope_store_cpu(
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
    if not owed:
        norms, caches = (q_norm, k_norm), (k_cache, v_cache)
        q = native.rope_store(y, bias, norms, eps, cos_sin, positions, slots, caches, num_heads, norm_offset)
        if q is not None:
            return q
    terms = q_norm, k_norm, eps, cos_sin, positions, slots, k_cache, v_cache, num_heads, norm_offset
    return rope_store(y, bias, owed, where, *terms)


def _attention_cpu(
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
    caches, where = (k_cache, v_cache), (block_tables, kv_lengths, query_starts)
    served = native.attention(q, caches, *where, scale, window, cap, sinks)
    if served is None:
        return attention(q, *caches, *where, scale, window, cap, sinks)
    out, left = served
    if left:
        over = native.MAX_QUERIES
        _attend(out, q, *caches, *where, scale, window, cap, sinks, over)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = 2 * cos.shape[-1]
    low, high = x[..., :turned].float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, x[..., turned:]), dim=-1).to(x.dtype)


def _rope_store_fake(
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
    return y.new_empty((y.shape[0], num_heads, k_cache.shape[3]))


def _attention_fake(
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
    return q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))


rope_store_op = define(
    rope_store,
    fake=_rope_store_fake,
    mutates=("k_cache", "v_cache"),
    cuda="aiolora.ops.kernels.rope",
    cpu=_rope_store_cpu,
)
attention_op = define(attention, fake=_attention_fake, cuda="aiolora.ops.kernels.attention", cpu=_attention_cpu)


def stored(
    partial: Partial,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    norm_offset: float = 0.0,
) -> Tensor:
    """Pay what q, k and v owe, rotate q and k, write k and v to their slots: q [T, H, D]."""
    q_norm, k_norm = norms or (None, None)
    return rope_store_op(
        *partial.flat, q_norm, k_norm, eps, cos_sin, positions, slots, k_cache, v_cache, num_heads, norm_offset
    )
