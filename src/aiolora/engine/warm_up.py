"""Steps of no sequence: to compile kernels before somebody waits for them, and to measure what a step takes."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aiolora.engine.batch import routing_of, step_inputs
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.plan import Plan
from aiolora.engine.staging import Staging
from aiolora.errors import ConfigError
from aiolora.models.encoder import Encoder
from aiolora.models.inputs import HeadInputs, StepInputs
from aiolora.models.layers import Linear
from aiolora.models.model import Model
from aiolora.ops.blocks import Blocks
from aiolora.ops.experts import sizes_apart
from aiolora.ops.linear import Routing, completed, tile_of
from aiolora.ops.registration import rehearsal
from aiolora.types import MediaItem

IDLE = 64  # empty tiles that make as many as those of a long prompt
_SIZES = {2, 16, 32, 64, 101, 251, 301}  # rows that kernels of projections, attention and what is around tell apart


def sizes_of(plan: Plan, model: Model) -> list[list[int]]:
    """Tokens of each sequence of some steps, one of each way in which kernels cut those that `plan` allows."""
    most = min(plan.max_num_batched_tokens, plan.max_num_seqs * plan.max_model_len)
    apart = {(linear.top_k, linear.experts) for _, linear in model.experts()}
    sizes = {min(size, most) for size in _SIZES.union(*(sizes_apart(*one, most) for one in apart))}
    longest = plan.max_model_len
    return [[1, *(min(longest, size - low) for low in range(1, size, longest))] for size in sorted(sizes)]


def walk_linears(linears: Iterable[Linear], *, kinds: int, pages: int) -> None:
    """Run one of each kind of `linears` on rows of all sizes: an image may be of any.

    `kinds`, `pages`: of a routing.
    """
    each = {(linear.site and linear.site.kind, linear.weight.shape): linear for linear in linears}
    for linear in each.values():
        weight = linear.weight
        for size in _SIZES:
            x = weight.new_zeros((size, linear.inputs))
            completed(linear(x, None))
            for idle in (0, IDLE) if linear.site is not None else ():
                completed(linear(x, blank_routing(size, kinds, pages, idle, str(weight.device))))


def blank_step(
    counts: Sequence[int],
    *,
    num_logits: int,
    page_size: int,
    device: str,
    kinds: int = 0,
    pages: int = 0,
    idle: int = 0,
) -> StepInputs:
    """Prompts of `counts` tokens that read page 0, write to none, and want `num_logits` rows of logits.

    `kinds`, `pages`: of the routing, in which no token has an adapter; 0: no routing. `idle`: empty tiles and items in
    it, for kernels are cut by how many there are.
    """
    size = sum(counts)

    def zeros(*shape: int) -> NDArray[np.int32]:
        return np.zeros(shape, dtype=np.int32)

    numbers: dict[str, NDArray[Any]] = {
        "tokens": zeros(size),
        "positions": np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        "slots": zeros(size) - 1,
        "kv_lengths": np.array(counts, dtype=np.int32),
        "query_starts": np.array([0, *counts], dtype=np.int32).cumsum(dtype=np.int32),
        "logits_at": zeros(num_logits),
        "block_tables": zeros(len(counts), -(-max(counts) // page_size)),
    }
    if kinds:
        numbers |= _routing(size, kinds, pages, idle, device)
    previous = torch.zeros(1, dtype=torch.int32, device=device)
    return step_inputs(Staging(device).send(numbers), previous, device)


def blank_head(size: int, rows: Tensor | None, step: StepInputs, *, idle: int) -> HeadInputs:
    """What adapters on the head launch, over `size` positions without one; of the widths of the routing of `step`."""
    assert step.routing is not None
    device = str(step.tokens.device)
    _, kinds, pages = step.routing.pages.shape
    nobody = torch.full((1, 1), -1, dtype=torch.int32, device=device)
    own = None if rows is None else Blocks(rows, nobody, torch.zeros(size, dtype=torch.int32, device=device))
    return HeadInputs(blank_routing(size, kinds, pages, idle, device), low_rank=True, own=own)


def blank_routing(size: int, kinds: int, pages: int, idle: int, device: str) -> Routing:
    """Of tokens without an adapter; `idle` as in `blank_step`."""
    return routing_of(Staging(device).send(_routing(size, kinds, pages, idle, device)), device)


def _routing(size: int, kinds: int, pages: int, idle: int, device: str) -> dict[str, NDArray[Any]]:
    """Of tokens without an adapter, and empty tiles and items behind them."""
    tile = tile_of(size, device)
    tiles = [(low, min(tile, size - low)) for low in range(0, size, tile)] + [(0, 0)] * idle
    table = (len(tiles), kinds, pages)
    return {
        "perm": np.arange(size, dtype=np.int32),
        "tiles": np.array(tiles, dtype=np.int32),
        "items": np.array([(-1, 0, 0, 0)] * (1 + idle), dtype=np.int32),
        "pages": np.full(table, -1, dtype=np.int32),
        "scales": np.zeros(table, dtype=np.float32),
        "vector_pages": np.full(table[:2], -1, dtype=np.int32),
        "owners": np.arange(size, dtype=np.int32) // tile,
    }


def encoding_nbytes(encoder: Encoder, items: Iterable[MediaItem]) -> int:
    """Bytes of GPU memory that the encoder takes for a while for one of `items`: by encoding each.

    Raises `ConfigError` where there are not so many.
    """
    before, peak = torch.cuda.memory_allocated(), 0
    for item in items:
        features = {name: torch.from_numpy(array) for name, array in item.features.items()}
        try:
            with torch.inference_mode():
                with rehearsal():
                    encoder(item.modality, features, None)
                torch.cuda.reset_peak_memory_stats()
                encoder(item.modality, features, None)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"beside the weights there is no memory to encode the largest {item.modality} that is taken, of "
                f"{item.count} tokens; lower --max-image-pixels or --max-model-len"
            ) from error
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
        torch.cuda.empty_cache()
    return peak


def activation_nbytes(
    model: Model, max_num_seqs: int, max_num_batched_tokens: int, *, page_size: int, rehearsed: bool = False
) -> int:
    """Bytes of GPU memory that the largest step takes for a while, beyond what is always there: by running one.

    `rehearsed`: its kernels are compiled already.
    """
    device = str(model.embed.weight.device)
    longest = model.config.max_positions
    counts = [min(longest, max_num_batched_tokens - low) for low in range(0, max_num_batched_tokens, longest)]
    dtype = model.embed.weight.dtype
    cache = KVCache(model.config, num_pages=1, page_size=page_size, dtype=dtype, device=device)
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        step = blank_step(counts, num_logits=max_num_seqs, page_size=page_size, device=device)
        if not rehearsed:
            with rehearsal():
                model(step, cache.layers)
        torch.cuda.reset_peak_memory_stats()
        model.logits(model(step, cache.layers))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del cache, step
    torch.cuda.empty_cache()
    return peak
