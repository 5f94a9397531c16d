"""Which modules of the model take adapters, and the shapes of the pages of each kind (`kinds.py`).

Rank and vector pages belong to a kind of site; pages of blocks are all of one shape, whichever weight's rows they hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.errors import ConfigError
from aiolora.lora.kinds import PageKinds
from aiolora.models.encoder import Encoder
from aiolora.models.layers import Linear
from aiolora.models.model import Model
from aiolora.models.moe import ExpertLinear
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.ops.linear import RANKS_PER_PAGE

Key = tuple[str, int, tuple[int, ...]]  # of a kind: names of its slices without the layer's number, K, bounds
Place = tuple[int, int, int]  # kind, layer, slice
EMBEDDING, HEAD, NORMS = range(3)  # indices of `Layout.weights`


@dataclass(frozen=True)
class Kind:
    """One kind of site (qkv, o, gate_up, down): the same Linear in every layer, so one page serves all layers.

    The embedding and the head are kinds of one layer. The embedding's inputs are tokens. To a page, a routed expert is
    a layer: expert e of layer l is layer l * E + e of the kind.
    """

    name: str  # checkpoint names of its slices without the layer's number, joined by +
    layers: int  # up to the last that may be changed
    inputs: int  # K
    bounds: tuple[int, ...]  # ends of the slices among the out-features
    experts: int = 0  # E; 0: it is not of experts

    @property
    def slices(self) -> int:
        return len(self.bounds) - 1

    def page_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of 8 ranks over all layers and slices, both factors."""
        return RANKS_PER_PAGE * self.layers * (self.slices * self.inputs + self.bounds[-1]) * dtype.itemsize

    @property
    def vectors_nbytes(self) -> int:
        """Bytes of a vector page: gain and shift of every out-feature over all layers, float32."""
        return self.layers * 2 * self.bounds[-1] * torch.float32.itemsize


class Target(NamedTuple):
    """A module that an adapter may change."""

    kind: int
    layer: int
    slice: int
    weight: Tensor  # [N, K] of the base model, a view (the embedding's a turned one); on "meta": only its outline
    bias: Tensor | None = None  # [N]

    @property
    def place(self) -> Place:
        return self.kind, self.layer, self.slice

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]


class Fused(NamedTuple):
    """All experts of a layer as one parameter [E, N, K], which an adapter may change at once."""

    kind: int
    first: int  # layer of the kind that its first expert is
    experts: int
    inputs: int  # K
    outputs: int  # N
    taken: bool  # whether it may be changed
    in_turn: int = 1  # so many slices lie in it column by column in turn (gate and up of gpt-oss)


class Weight(NamedTuple):
    """A weight of the base of which an adapter may bring rows, or all of it."""

    rows: dict[str, int]  # checkpoint name of a module -> which row is its first
    taken: frozenset[str]  # of those modules: who may be changed
    base: Tensor  # [R, H], on the device; meta where only the base's config was read

    @property
    def blocks(self) -> int:
        return -(-len(self.base) // ROWS_PER_BLOCK)


@dataclass(frozen=True)
class Layout:
    """All kinds, and the module names that lead to them. Read by loaders in any thread."""

    kinds: tuple[Kind, ...]  # of sites
    targets: dict[str, Target]
    dtype: torch.dtype
    weights: tuple[Weight, ...] = ()  # embedding, head, norms on the residual stream
    tied: bool = False  # the head is the embedding
    fused: Mapping[str, Mapping[str, Fused]] = field(default_factory=dict)  # module -> parameters, in order
    current: Callable[[str], str] = str  # `Model.named`
    towers: int = 0  # so many kinds, behind those of the decoder's layers, are an encoder's

    @property
    def page_kinds(self) -> PageKinds:
        def number(name: str) -> int:
            return next((i for i, kind in enumerate(self.kinds) if kind.name == name), -1)

        experts = tuple(i for i, kind in enumerate(self.kinds) if kind.experts)
        ends = number(self.embed_tokens), number(self.lm_head)
        return PageKinds(len(self.kinds), *ends, experts, self.towers)

    @property
    def embed_tokens(self) -> str:
        """What the embedding is called in the model."""
        return next(iter(self.weights[EMBEDDING].rows)) if self.weights else ""

    @property
    def lm_head(self) -> str:
        """What the head is called in the model."""
        return next(iter(self.weights[HEAD].rows)) if self.weights else ""

    def named(self, module: str) -> str:
        """The name that `module` has in the model, where an adapter calls it by one of another checkpoint."""
        return module if module in self.targets else self.current(module)

    def meant(self, wanted: str) -> set[str]:
        """A name of a list in an adapter's config, the end of a module's behind a dot, and what it is in the model."""
        return {wanted, self.current(wanted), self.current(f".{wanted}")[1:]}

    @property
    def most_blocks(self) -> int:
        """Pages of blocks of an adapter that brings every row that it may."""
        return sum(weight.blocks for weight in self.weights if weight.taken)

    def kind_of(self, layer: int, linear: Linear | ExpertLinear) -> int | None:
        """Index of the kind of a Linear in `layer`; None: no adapter may change it.

        Pages reach to the last layer that may be changed: whoever is behind that has none.
        """
        wanted, last = _key(layer, linear), (layer + 1) * getattr(linear, "experts", 1)
        for number, kind in enumerate(self.kinds):
            if (kind.name, kind.inputs, kind.bounds) == wanted and last <= kind.layers:
                return number
        return None

    def page_nbytes(self, kind: int) -> int:
        """Bytes of a page of a kind of `page_kinds`."""
        sites = len(self.kinds)
        if kind < sites:
            return self.kinds[kind].page_nbytes(self.dtype)
        if kind < 2 * sites:
            return self.kinds[kind - sites].vectors_nbytes
        base = self.weights[EMBEDDING].base
        return ROWS_PER_BLOCK * base.shape[1] * base.dtype.itemsize

    def pages_nbytes(self, pages: Mapping[int, int]) -> int:
        """Bytes of so many pages (kind -> count) on the device."""
        return sum(count * self.page_nbytes(kind) for kind, count in pages.items() if count)


def layout_of(
    model: Model, dtype: torch.dtype, *, encoder: Encoder | None = None, only: tuple[str, ...] | None = None
) -> Layout:
    """Group the model's Linears into kinds; `only` narrows what may be changed, and kinds of nothing have no pages.

    A name of `only` means a module by its name, by its end or by whatever is between dots in it: "q_proj", "mlp".
    Raises `ConfigError` where it leaves no module whose low-rank factors an adapter may bring.
    """

    def taken(module: str) -> bool:
        return only is None or any(f"{model.named(f'.{part}')}." in f".{module}." for part in only)

    kinds: dict[Key, Kind] = {}
    targets: dict[str, Target] = {}

    def add(layer: int, linear: Linear) -> None:
        if not any(map(taken, linear.parts)):
            return
        name, inputs, bounds = key = _key(layer, linear)
        kinds[key] = Kind(name, layer + 1, inputs, bounds)
        number = list(kinds).index(key)
        for index, (part, low, high) in enumerate(linear.slices()):
            if taken(part):
                bias = None if linear.bias is None else linear.bias[low:high]
                targets[part] = Target(number, layer, index, linear.weight[low:high], bias)

    for layer, linear in model.linears():
        add(layer, linear)
    fused = _experts(model, taken, kinds, targets)
    of_decoder = len(kinds)
    for layer, linear in encoder.linears() if encoder else ():
        add(layer, linear)
    towers = len(kinds) - of_decoder
    embed_tokens, (lm_head,) = model.embed.name, model.head.parts
    for name, base in ((embed_tokens, model.embed.weight.T), (lm_head, model.head.weight)):
        if taken(name):
            targets[name] = Target(len(kinds), 0, 0, base)
            end = Kind(name, 1, base.shape[1], (0, base.shape[0]))
            kinds[end.name, end.inputs, end.bounds] = end

    if only is not None and not kinds:
        modules = [part for _, linear in model.linears() for part in linear.parts]
        modules += [part for _, linear in model.experts() for part in linear.parts]
        there = dict.fromkeys(name.rpartition(".")[2] for name in (*modules, embed_tokens, lm_head))
        raise ConfigError(
            f"lora_target_modules={only} names no module of the model that takes adapters (--lora-target-modules); "
            f"it has {', '.join(there)}"
        )

    def weight(rows: dict[str, int], base: Tensor) -> Weight:
        return Weight(rows, frozenset(filter(taken, rows)), base)

    norms, none = list(model.norms()), model.embed.weight[:0]
    stacked = torch.stack([norm.weight for norm in norms]) if norms else none
    weights = (
        weight({embed_tokens: 0}, model.embed.weight),
        weight({lm_head: 0}, model.head.weight),
        weight({norm.name: row for row, norm in enumerate(norms)}, stacked),
    )
    return Layout(tuple(kinds.values()), targets, dtype, weights, model.config.tied_head, fused, model.named, towers)


def _experts(
    model: Model, taken: Callable[[str], bool], kinds: dict[Key, Kind], targets: dict[str, Target]
) -> dict[str, dict[str, Fused]]:
    """Add kinds and targets of the routed experts that may be changed; the fused parameters of each layer."""
    fused: dict[str, dict[str, Fused]] = {}
    for layer, linear in model.experts():
        count, slices = linear.experts, list(linear.slices())
        parts = {
            linear.of(part, expert): (index, expert, low, high)
            for index, (part, low, high) in enumerate(slices)
            for expert in range(count)
        }
        some = [part for part in parts if taken(part)]
        if not some and not taken(linear.fused):
            continue
        name, inputs, bounds = key = _key(layer, linear)
        kinds[key] = Kind(name, (layer + 1) * count, inputs, bounds, count)
        number, first = list(kinds).index(key), layer * count
        for part in some:
            index, expert, low, high = parts[part]
            targets[part] = Target(number, first + expert, index, linear.weight[expert, low:high])
        whole = taken(linear.fused) or len(some) == len(parts)
        own = Fused(number, first, count, inputs, bounds[-1], whole, len(slices) if linear.turned else 1)
        fused.setdefault(linear.path, {})[linear.fused] = own
    return fused


def _key(layer: int, linear: Linear | ExpertLinear) -> Key:
    """What projections of one kind have in common."""

    def kind(part: str) -> str:
        where, found, name = part.partition(f".{layer}.")
        if not found:
            return part
        return name if where == "model.layers" else f"{where}.*.{name}"

    return "+".join(map(kind, linear.parts)), linear.inputs, (0, *(high for _, _, high in linear.slices()))
