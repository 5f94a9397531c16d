"""Paged attention in plain PyTorch, for what `attention` has no kernels for: chunks, also with soft-caps and sinks.

    score = scale * q @ k;  score = cap * tanh(score / cap)  (Gemma 2, arXiv 2408.00118)
    weights = softmax([score, sink]) without the last         (a sink is a logit a head that takes weight to nowhere)

Reads lengths on the host: it cannot be captured in a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """What a layer's attention looks at, and how."""

    scale: float
    window: int = 0  # > 0: a token sees itself and the window - 1 before it
    chunk: int = 0  # > 0: a token sees itself and those before it in its chunk of so many positions
    softcap: float = 0.0  # > 0: scores lie between -softcap and softcap


def plain_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lengths: Tensor,
    query_starts: Tensor,
    shape: Shape,
    sinks: Tensor | None,
) -> Tensor:
    """`attention` of q [T, H, D] by `shape`, with `sinks` [H] where the layer has any: [T, H * D]."""
    out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    starts, lengths = query_starts.tolist(), kv_lengths.tolist()
    for b, length in enumerate(lengths):
        low, high = starts[b], starts[b + 1]
        if low == high:
            continue
        pages = block_tables[b, : -(-length // page_size)]
        k, v = (cache[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for cache in (k_cache, v_cache))
        scores = torch.einsum("thd,shd->hts", q[low:high], k.to(q.dtype)).float() * shape.scale
        if shape.softcap > 0:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        key = torch.arange(length, device=q.device)
        query = torch.arange(length - (high - low), length, device=q.device).unsqueeze(1)
        scores = scores.masked_fill(~sees(query, key, shape.window, shape.chunk), -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, high - low, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :length].to(q.dtype)
        out[low:high] = torch.einsum("hts,shd->thd", weights, v.to(q.dtype)).flatten(1)
    return out


def sees(query: Tensor, key: Tensor, window: int, chunk: int) -> Tensor:
    """Bool, broadcast over positions of queries and keys: who looks at whom, by `Shape.window` and `Shape.chunk`."""
    seen = key <= query
    if window > 0:
        seen = seen & (key > query - window)
    if chunk > 0:
        seen = seen & (key // chunk == query // chunk)
    return seen
