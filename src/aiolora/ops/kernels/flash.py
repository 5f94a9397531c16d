"""FlashAttention 3 (arXiv 2407.08608) for steps with prompts, where the extra `fa3` is installed and runs (Hopper).

Only its package knows what it needs of the machine: whatever keeps it from being imported means that it is not there.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_HEAD_DIMS = (64, 128, 192, 256)
_DTYPES = (torch.bfloat16, torch.float16)
LEAST = 1024
"""Tokens of a step: shorter ones are CUDA graphs (engine/plan.py), where this would have to be planned ahead."""


def prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    kv_lengths: Tensor,
    query_starts: Tensor,
    scale: float,
    window: int,
    cap: float,
) -> Tensor | None:
    """`attention` of a whole step, as the reference; None where this package is not there or not made for it.

    One split of the keys: more would sum up in an order that depends on the other sequences of the step.
    """
    if q.shape[0] < LEAST or q.shape[2] not in _HEAD_DIMS or q.dtype not in _DTYPES or k_cache.dtype is not q.dtype:
        return None
    if cap > 0:  # the package may be built without
        return None
    function = _function(q.device)
    if function is None:
        return None
    out = function(
        q,
        k_cache,
        v_cache,
        cache_seqlens=kv_lengths,
        page_table=block_tables,
        cu_seqlens_q=query_starts,
        max_seqlen_q=q.shape[0] - block_tables.shape[0] + 1,  # at most: the others have one query each
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window > 0 else (-1, -1),
        num_splits=1,
    )
    return out.flatten(1)


@functools.cache
def _function(device: torch.device) -> Callable[..., Tensor] | None:
    if device.type == "meta" or torch.cuda.get_device_capability(device) != (9, 0):  # meta: an outline of a model
        return None
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except (ImportError, OSError) as error:
        _log.debug("FlashAttention 3 is not used: %s", error)
        return None
    _log.info("prompts attend by FlashAttention 3")
    found: Callable[..., Tensor] = flash_attn_with_kvcache
    return found
