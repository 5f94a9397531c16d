"""One sequence of a step after the other, by attention of the model's own over keys and values out of our pages.

For models older than transformers' attention interface (ALiBi, local attention), or with an attention that is no
softmax over one product. A step takes a run of the model for each of its sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.utils import ModelOutput

from aiolora.errors import UnsupportedModelError
from aiolora.models.adopted import PROBE, Rows
from aiolora.models.attends import Holds, Turn
from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.models.together import not_run
from aiolora.ops.linear import Routing


@dataclass(frozen=True)
class OneByOne:
    """A trunk that keeps keys and values in transformers' cache, and nothing else."""

    output: type[ModelOutput]  # what the trunk returns
    rows: list[str]  # its projections that see a row a token
    holds: list[Holds]
    reason: str  # why not `Together`

    @classmethod
    def rehearsed(cls, trunk: nn.Module, weight: Tensor, reason: str) -> "OneByOne":
        """As `Together.rehearsed`, with a cache."""
        rows, cache = Rows(trunk), Cache(layer_class_to_replicate=DynamicLayer)
        try:
            x = weight.new_zeros((1, PROBE, weight.shape[1]))
            with torch.no_grad():
                for _ in range(2):  # a projection of what is cached sees more rows the second time
                    output = trunk(inputs_embeds=x, past_key_values=cache, use_cache=True)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise not_run(error, weight) from error
        finally:
            found = list(rows.done())
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        if not kept or any(k is None or k.dim() != 4 or k.shape[2] != 2 * PROBE for k, _ in kept):
            raise UnsupportedModelError("its layers do not keep keys and values of each token in transformers' cache")
        holds = [
            Holds(index=index, kv_heads=k.shape[1], head_dim=k.shape[3], value_dim=v.shape[3])
            for index, (k, v) in enumerate(kept)
        ]
        return cls(type(output), found, holds, reason)

    def begin(self, trunk: nn.Module, turn: Turn, device: str) -> None:
        """From now on `run` is what `trunk` is for."""

    def run(self, trunk: nn.Module, x: Tensor, turn: Turn) -> Tensor:
        """Hidden states [T, H] of the vectors `x` [T, E] of the step that it is the turn of."""
        step, kv = turn.step, turn.kv
        assert step is not None
        starts, lengths, routing = step.query_starts.tolist(), step.kv_lengths.tolist(), step.routing
        parts = []
        for sequence, length in enumerate(lengths):
            low, high = starts[sequence], starts[sequence + 1]
            if low == high:
                continue
            turn.routing = None if routing is None else narrowed(routing, low, high)
            layers = [PagedLayer(one, kv[one.index], step, sequence, slice(low, high), length) for one in self.holds]
            out = trunk(inputs_embeds=x[low:high].unsqueeze(0), past_key_values=Cache(layers=layers), use_cache=True)
            parts.append(out.last_hidden_state[0])
        return torch.cat(parts)


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of one sequence, which lie in our pages."""

    is_sliding = False

    def __init__(self, holds: Holds, kv: LayerKV, step: StepInputs, sequence: int, tokens: slice, length: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._holds = holds
        self._caches = holds.of(kv.k), holds.of(kv.v)
        self._slots = step.slots[tokens]
        self._table = step.block_tables[sequence]
        self._length: int = length - (tokens.stop - tokens.start)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pages are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write those [1, G, n, D] of the step; all [1, G, L, D] that there are then."""
        self._length += key_states.shape[2]
        kept = self._slots >= 0
        pages = self._table[: -(-self._length // self._caches[0].shape[1])]
        held = []
        for states, cache in zip((key_states, value_states), self._caches):
            width = states.shape[3]
            cache.flatten(0, 1)[self._slots[kept], :, :width] = states[0].transpose(0, 1).to(cache.dtype)[kept]
            all_of_it = cache[pages].flatten(0, 1)[: self._length, :, :width]
            held.append(all_of_it.transpose(0, 1).unsqueeze(0).to(states.dtype))
        return held[0], held[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1


def narrowed(routing: Routing, low: int, high: int) -> Routing:
    """`routing` of the tokens from `low` to `high` alone, as tokens 0 and on; tiles without any are empty."""
    owners = routing.owners[low:high]
    perm = owners.argsort(stable=True).int()
    counts = torch.bincount(owners, minlength=len(routing.tiles))[: len(routing.tiles)]
    tiles = torch.stack((counts.cumsum(0) - counts, counts), dim=1).int()
    tile = routing.items[:, :1]
    items = torch.where(tile >= 0, torch.cat((routing.items[:, :2], tiles[tile[:, 0].clamp(min=0)]), dim=1), -1)
    return routing._replace(perm=perm, tiles=tiles, items=items.int(), owners=owners)
