"""Attention of transformers' models over our pages.

transformers calls whatever function is registered under the name in `config._attn_implementation`, with q, k and v as
the layer made them. Ours looks at the calling module for what it is to do: there a `Audience` notes once how the layer
calls, later a `Seat` writes keys and values to the layer's cache and attends over its pages. No masks are built for our
name: the rehearsal goes by another, under which the model's mask functions come to us and are held against those we
know.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from aiolora.errors import UnsupportedModelError
from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.ops.attention import attention_op, rope_store_op
from aiolora.ops.linear import Routing
from aiolora.ops.plain_attention import Shape, plain_attention, sees

OURS, REHEARSED = "aiolora", "aiolora_rehearsed"
_SLOT = "aiolora"  # the attribute of an attention module by which it is served

# what layers hand on and changes nothing here: dropout is for training, positions are in q and k already
_IDLE = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
_IDLE |= {"is_causal", "deterministic", "cache_position", "output_router_logits", "position_embeddings"}


@dataclass(frozen=True, kw_only=True)
class Holds:
    """What one layer keeps of a token."""

    index: int  # of its cache
    kv_heads: int
    head_dim: int  # of q and k
    value_dim: int

    @property
    def width(self) -> int:
        """Of a head in the cache: keys and values lie alike, and halves of it are even."""
        widest = max(self.head_dim, self.value_dim)
        return widest + widest % 2

    def of(self, cache: Tensor) -> Tensor:
        """The layer's cache [P, page_size, G, D] in the memory of one that is as large or larger."""
        pages, page_size = cache.shape[:2]
        wanted = (pages, page_size, self.kv_heads, self.width)
        return cache if cache.shape == wanted else cache.view(-1)[: torch.Size(wanted).numel()].view(wanted)


@dataclass(frozen=True, kw_only=True)
class Attends(Holds):
    """How one layer attends."""

    heads: int
    shape: Shape
    sinks: str | None = None  # the attribute of the module that holds them

    @property
    def plain(self) -> bool:
        """Whether it takes what the kernels do not do."""
        return self.shape.chunk > 0


@dataclass(slots=True)
class Turn:
    """The step that a model runs at the moment. One a model; its Linears and attention layers look here.

    transformers' modules call each other with hidden states alone, so the step cannot be an argument of theirs.
    """

    step: StepInputs | None = None
    routing: Routing | None = None  # of the tokens that are under way
    kv: Sequence[LayerKV] = ()
    still: Tensor = field(default_factory=lambda: torch.empty(0))  # [T] int32 zeros: where nothing is rotated

    def of_rows(self, count: int) -> Routing | None:
        """The routing of the rows that a projection of the model sees, which are the tokens under way."""
        routing = self.routing
        assert routing is None or count == len(routing.owners), "a projection of other rows than the step's tokens"
        return routing

    @contextmanager
    def of(self, step: StepInputs, kv: Sequence[LayerKV]) -> Iterator[None]:
        """Let it be `step`, as long as this lasts."""
        self.step, self.routing, self.kv, self.still = step, step.routing, kv, torch.zeros_like(step.positions)
        try:
            yield
        finally:
            self.step, self.routing, self.kv = None, None, ()


@dataclass(frozen=True)
class Seat:
    """An attention module's place: what it does, and where the step is."""

    how: Attends
    turn: Turn
    unrotated: Tensor  # [1, D] float32, cos | sin of no rotation

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        """Of q [1, H, T, D], k [1, G, T, D], v [1, G, T, Dv] -> [1, T, H, Dv]."""
        how, step = self.how, self.turn.step
        assert step is not None, "the model runs outside of a step"
        q, k, v = (_wide(x[0].transpose(0, 1), how.width) for x in (query, key, value))
        kv = self.turn.kv[how.index]
        k_cache, v_cache = how.of(kv.k), how.of(kv.v)
        y = torch.cat((q, k, v), dim=1).flatten(1)
        still = self.turn.still
        q = rope_store_op(
            y, None, [], [], None, None, 0.0, self.unrotated, still, step.slots, k_cache, v_cache, how.heads
        )
        where = step.block_tables, step.kv_lengths, step.query_starts
        sinks = None if how.sinks is None else getattr(module, how.sinks)
        if how.plain:
            seen = plain_attention(q, k_cache, v_cache, *where, how.shape, sinks)
        else:
            scale, window, _, cap = how.shape
            seen = attention_op(q, k_cache, v_cache, *where, scale, window, cap, sinks)
        return seen.view(1, -1, how.heads, how.width)[..., : how.value_dim]


@dataclass
class Audience:
    """Notes how each attention module calls, in the order of the calls; returns zeros."""

    longest: int  # positions over which masks are compared
    found: dict[nn.Module, Attends] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        name = type(module).__name__
        if module in self.found:
            raise UnsupportedModelError(f"{name} attends more than once a token: its cache would have to be divided")
        if len(query) != 1 or query.shape[2] != key.shape[2]:
            raise UnsupportedModelError(f"{name} attends to other than the tokens of the step")
        heads, kv_heads = query.shape[1], key.shape[1]
        scale = asked.pop("scaling", None)
        asked.pop("sliding_window", None)  # the mask says it, too, and to those that take none of the rest of it
        device = torch.device("cpu") if query.is_meta else query.device
        window, chunk = _looks(name, mask, self.longest, device)
        softcap = float(asked.pop("softcap", None) or 0.0)
        sinks = asked.pop("s_aux", None)
        at = None if sinks is None else next((n for n, p in module.named_parameters(recurse=False) if p is sinks), None)
        if sinks is not None and at is None:
            raise UnsupportedModelError(f"{name} makes attention sinks anew each step")
        if strange := sorted(key for key, value in asked.items() if key not in _IDLE and value is not None):
            raise UnsupportedModelError(f"{name} asks attention for {', '.join(strange)}, which is not served")
        self.found[module] = Attends(
            index=len(self.found),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=query.shape[3],
            value_dim=value.shape[3],
            shape=Shape(query.shape[3] ** -0.5 if scale is None else float(scale), window, chunk, softcap),
            sinks=at,
        )
        return value.new_zeros((1, query.shape[2], heads, value.shape[3]))


def seat(module: nn.Module, served_by: Callable[..., Tensor] | None) -> None:
    """Let `served_by` (a Seat or an Audience) answer when `module` attends; None: nobody any more."""
    if served_by is None:
        vars(module).pop(_SLOT, None)
    else:
        vars(module)[_SLOT] = served_by


def answer_by(model: nn.Module, name: str) -> None:
    """Let every attention layer in `model` call the function registered as `name`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


def _wide(x: Tensor, width: int) -> Tensor:
    """`x` [T, H, D], filled up with zeros to `width`: they add nothing to a product."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **asked: Any
) -> tuple[Tensor, None]:
    return vars(module)[_SLOT](module, query, key, value, attention_mask, asked), None


@dataclass(frozen=True)
class _Mask:
    """In the place of a mask: the function of (batch, head, query, key) that it would have been made by."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


MASK = _Mask.__name__  # in errors of code that takes it for a tensor


def _mask_of(*_: object, mask_function: Any, **__: object) -> _Mask:
    return _Mask(mask_function)


def _looks(name: str, mask: object, longest: int, device: torch.device) -> tuple[int, int]:
    """(window, chunk) by which `mask` lets tokens see each other; raises `UnsupportedModelError` for other masks."""
    if mask is None:
        raise UnsupportedModelError(f"{name} attends without a mask of transformers' making")
    if not isinstance(mask, _Mask):
        raise UnsupportedModelError(f"{name} makes its attention mask itself")
    zero, key = torch.zeros((), dtype=torch.long, device=device), torch.arange(longest, device=device)
    first_seen = mask.function(zero, zero, key, zero)
    blind = int((~first_seen).nonzero()[:1].sum())  # the first position that does not see token 0; 0: all do
    query = torch.tensor(sorted({0, 1, longest // 2, longest - 1, blind, max(0, blind - 1)}), device=device)
    seen = mask.function(zero, zero, query.unsqueeze(1), key)
    for window, chunk in ((blind, 0), (0, blind)):
        if torch.equal(seen, sees(query.unsqueeze(1), key, window, chunk)):
            return window, chunk
    raise UnsupportedModelError(f"{name} has an attention mask that is neither causal nor one of a window or of chunks")


AttentionInterface.register(OURS, _attend)
AttentionInterface.register(REHEARSED, _attend)
AttentionMaskInterface.register(REHEARSED, _mask_of)
