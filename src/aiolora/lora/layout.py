"""Which modules of the model take adapters, and the shapes of the pages of each kind (`kinds.py`).

Rank and vector pages belong to a kind of site; pages of blocks are all of one shape, whichever weight's rows they hold.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.lora.kinds import PageKinds
from aiolora.models.decoder import Decoder
from aiolora.models.encoder import Encoder
from aiolora.models.layers import Linear
from aiolora.models.multimodal import current_name
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.ops.linear import RANKS_PER_PAGE

EMBED_TOKENS, LM_HEAD = "model.embed_tokens", "lm_head"
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
    towers: int = 0  # so many kinds, behind those of the decoder's layers, are an encoder's

    @property
    def page_kinds(self) -> PageKinds:
        def number(name: str) -> int:
            return next((i for i, kind in enumerate(self.kinds) if kind.name == name), -1)

        return PageKinds(len(self.kinds), number(self.embed_tokens), number(LM_HEAD), self.towers)

    @property
    def embed_tokens(self) -> str:
        """What the embedding is called in the model."""
        return next(iter(self.weights[EMBEDDING].rows)) if self.weights else EMBED_TOKENS

    def named(self, module: str) -> str:
        """The name that `module` has in the model, where an adapter calls it by one from earlier days."""
        return current_name(module) if self.towers and module not in self.targets else module

    @property
    def most_blocks(self) -> int:
        """Pages of blocks of an adapter that brings every row that it may."""
        return sum(weight.blocks for weight in self.weights if weight.taken)

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


class Placed(NamedTuple):
    """Where a Linear belongs among the pages."""

    kind: str  # its name
    layer: int
    linear: Linear


def places(model: Decoder, encoder: Encoder | None = None) -> Iterator[Placed]:
    """Every Linear inside the decoder's layers, then those of the encoder."""
    for layer, linear in model.linears():
        yield Placed("+".join(part.partition(f".{layer}.")[2] for part in linear.parts), layer, linear)
    seen: Counter[str] = Counter()
    for path, linear in encoder.linears() if encoder else ():
        shape = f"[{linear.weight.shape[0]}, {linear.inputs}]"  # layers of one name need not be of one size
        kind = f"{re.sub(r'[.][0-9]+(?=[.])', '.*', path)} {shape}"
        yield Placed(kind, seen[kind], linear)
        seen[kind] += 1


def layout_of(
    model: Decoder, dtype: torch.dtype, *, encoder: Encoder | None = None, only: tuple[str, ...] | None = None
) -> Layout:
    """Group the model's Linears into kinds; `only` (suffixes of module names) narrows what may be changed."""

    def taken(module: str) -> bool:
        return only is None or any(module.endswith(suffix) for suffix in only)

    kinds: dict[str, Kind] = {}
    targets: dict[str, Target] = {}
    of_decoder = {place.kind for place in places(model)}
    for name, layer, linear in places(model, encoder):
        bounds = (0, *(high for _, _, high in linear.slices()))
        kinds[name] = Kind(name, layer + 1, linear.inputs, bounds)
        number = list(kinds).index(name)
        for index, (part, low, high) in enumerate(linear.slices()):
            if taken(part):
                bias = None if linear.bias is None else linear.bias[low:high]
                targets[part] = Target(number, layer, index, linear.weight[low:high], bias)
    towers = len(kinds) - len(of_decoder)
    embed_tokens = model.embed.name
    for name, base in ((embed_tokens, model.embed.weight.T), (LM_HEAD, model.head.weight)):
        if taken(name):
            targets[name] = Target(len(kinds), 0, 0, base)
            kinds[name] = Kind(name, 1, base.shape[1], (0, base.shape[0]))

    def weight(rows: dict[str, int], base: Tensor) -> Weight:
        return Weight(rows, frozenset(filter(taken, rows)), base)

    norms = list(model.norms())
    weights = (
        weight({embed_tokens: 0}, model.embed.weight),
        weight({LM_HEAD: 0}, model.head.weight),
        weight({norm.name: row for row, norm in enumerate(norms)}, torch.stack([norm.weight for norm in norms])),
    )
    return Layout(tuple(kinds.values()), targets, dtype, weights, model.config.tied_head, towers)
