"""Which modules of the model take adapters, and the shapes of the pages of each kind (`kinds.py`).

Rank and vector pages belong to a kind of site; pages of blocks are all of one shape, whichever weight's rows they hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.lora.kinds import PageKinds
from aiolora.models.layers import Linear
from aiolora.models.model import Model
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.ops.linear import RANKS_PER_PAGE

EMBEDDING, HEAD, NORMS = range(3)  # indices of `Layout.weights`


@dataclass(frozen=True)
class Kind:
    """One kind of site (qkv, o, gate_up, down): the same Linear in every layer, so one page serves all layers.

    The embedding and the head are kinds of one layer. The embedding's inputs are tokens.
    """

    name: str  # checkpoint names of its slices without the layer, joined by +
    layers: int
    inputs: int  # K
    bounds: tuple[int, ...]  # ends of the slices among the out-features

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
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]


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

    @property
    def page_kinds(self) -> PageKinds:
        def number(name: str) -> int:
            return next((i for i, kind in enumerate(self.kinds) if kind.name == name), -1)

        return PageKinds(len(self.kinds), number(self.embed_tokens), number(self.lm_head))

    @property
    def embed_tokens(self) -> str:
        """What the embedding is called in the model."""
        return next(iter(self.weights[EMBEDDING].rows)) if self.weights else ""

    @property
    def lm_head(self) -> str:
        """What the head is called in the model."""
        return next(iter(self.weights[HEAD].rows)) if self.weights else ""

    @property
    def most_blocks(self) -> int:
        """Pages of blocks of an adapter that brings every row that it may."""
        return sum(weight.blocks for weight in self.weights if weight.taken)

    def kind_of(self, layer: int, linear: Linear) -> int:
        """Index of the kind of a Linear in `layer`."""
        wanted = _kind_key(layer, linear)
        return next(i for i, kind in enumerate(self.kinds) if (kind.name, kind.inputs, kind.bounds) == wanted)

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


def layout_of(model: Model, dtype: torch.dtype, *, only: tuple[str, ...] | None = None) -> Layout:
    """Group the model's Linears into kinds; `only` (suffixes of module names) narrows what may be changed."""

    def taken(module: str) -> bool:
        return only is None or any(module.endswith(suffix) for suffix in only)

    kinds: dict[tuple[str, int, tuple[int, ...]], Kind] = {}
    targets: dict[str, Target] = {}
    for layer, linear in model.linears():
        name, inputs, bounds = key = _kind_key(layer, linear)
        kinds[key] = Kind(name, layer + 1, inputs, bounds)
        number = list(kinds).index(key)
        for index, (part, low, high) in enumerate(linear.slices()):
            if taken(part):
                bias = None if linear.bias is None else linear.bias[low:high]
                targets[part] = Target(number, layer, index, linear.weight[low:high], bias)
    embed_tokens, (lm_head,) = model.embed.name, model.head.parts
    for name, base in ((embed_tokens, model.embed.weight.T), (lm_head, model.head.weight)):
        if taken(name):
            targets[name] = Target(len(kinds), 0, 0, base)
            end = Kind(name, 1, base.shape[1], (0, base.shape[0]))
            kinds[end.name, end.inputs, end.bounds] = end

    def weight(rows: dict[str, int], base: Tensor) -> Weight:
        return Weight(rows, frozenset(filter(taken, rows)), base)

    norms = list(model.norms())
    none = model.embed.weight[:0]
    stacked = torch.stack([norm.weight for norm in norms]) if norms else none
    weights = (
        weight({embed_tokens: 0}, model.embed.weight),
        weight({lm_head: 0}, model.head.weight),
        weight({norm.name: row for row, norm in enumerate(norms)}, stacked),
    )
    return Layout(tuple(kinds.values()), targets, dtype, weights, model.config.tied_head)


def _kind_key(layer: int, linear: Linear) -> tuple[str, int, tuple[int, ...]]:
    """What Linears of one kind have in common: names without the layer's number, in-features and bounds."""

    def kind(part: str) -> str:
        where, found, name = part.partition(f".{layer}.")
        if not found:
            return part
        return name if where == "model.layers" else f"{where}.*.{name}"

    return "+".join(map(kind, linear.parts)), linear.inputs, (0, *(high for _, _, high in linear.slices()))
