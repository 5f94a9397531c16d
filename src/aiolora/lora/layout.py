"""Which modules of the model take adapters, and the shape of a page of each kind.

Rank pages belong to a kind of site; pages of blocks are all of one shape, whichever weight's rows they hold.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.models.decoder import Decoder
from aiolora.models.layers import Linear
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


class Target(NamedTuple):
    """A module that an adapter may change."""

    kind: int
    layer: int
    slice: int
    inputs: int
    outputs: int


class Weight(NamedTuple):
    """A weight of the base of which an adapter may bring rows, or all of it."""

    rows: dict[str, int]  # checkpoint name of a module -> which row is its first
    taken: frozenset[str]  # of those modules: who may be changed
    base: Tensor  # [R, H], on the device; meta where only the base's config was read

    @property
    def blocks(self) -> int:
        return -(-len(self.base) // ROWS_PER_BLOCK)


class Ends(NamedTuple):
    """Kinds of pages that the packer tells apart. -1: takes no adapters."""

    embedding: int = -1
    head: int = -1
    blocks: int = -1  # not of ranks


NO_ENDS = Ends()


class Room(NamedTuple):
    """Pages on the device."""

    layers: int  # rank pages of each kind inside the layers
    ends: int = 0  # of embedding and head
    blocks: int = 0


@dataclass(frozen=True)
class Layout:
    """All kinds, and the module names that lead to them. Read by loaders in any thread."""

    kinds: tuple[Kind, ...]
    targets: dict[str, Target]
    dtype: torch.dtype
    weights: tuple[Weight, ...] = ()  # embedding, head, norms on the residual stream
    tied: bool = False  # the head is the embedding

    @property
    def ends(self) -> Ends:
        def number(name: str) -> int:
            return next((i for i, kind in enumerate(self.kinds) if kind.name == name), -1)

        return Ends(number(EMBED_TOKENS), number(LM_HEAD), len(self.kinds))

    def is_end(self, kind: int) -> bool:
        """Whether a kind of rank pages is the embedding's or the head's."""
        return self.kinds[kind].name in (EMBED_TOKENS, LM_HEAD)

    def pages(self, room: Room) -> list[int]:
        """How many pages of each kind, those of blocks last."""
        return [room.ends if self.is_end(kind) else room.layers for kind in range(len(self.kinds))] + [room.blocks]

    @property
    def block_nbytes(self) -> int:
        """Bytes of a page of a block."""
        _, width = self.weights[EMBEDDING].base.shape
        return int(ROWS_PER_BLOCK * width * self.weights[EMBEDDING].base.dtype.itemsize)

    @property
    def most_blocks(self) -> int:
        """Pages of blocks of an adapter that brings every row that it may."""
        return sum(weight.blocks for weight in self.weights if weight.taken)

    def kind_of(self, layer: int, linear: Linear) -> int:
        """Index of the kind of a Linear in `layer`."""
        return next(i for i, kind in enumerate(self.kinds) if kind.name == _kind_name(layer, linear))

    def ends_nbytes(self, pages: int, blocks: int) -> int:
        """Bytes of so many rank pages of embedding and head each, and of so many pages of blocks."""
        ranks = sum(kind.page_nbytes(self.dtype) for i, kind in enumerate(self.kinds) if self.is_end(i))
        return pages * ranks + blocks * self.block_nbytes

    def pages_nbytes(self, pages: dict[int, int]) -> int:
        """Bytes of so many rank pages (kind -> count) on the device."""
        return sum(count * self.kinds[kind].page_nbytes(self.dtype) for kind, count in pages.items())


def layout_of(model: Decoder, dtype: torch.dtype, *, only: tuple[str, ...] | None = None) -> Layout:
    """Group the model's Linears into kinds; `only` (suffixes of module names) narrows what may be changed."""

    def taken(module: str) -> bool:
        return only is None or any(module.endswith(suffix) for suffix in only)

    kinds: dict[str, Kind] = {}
    targets: dict[str, Target] = {}
    for layer, linear in model.linears():
        name = _kind_name(layer, linear)
        bounds = (0, *(high for _, _, high in linear.slices()))
        kinds[name] = Kind(name, layer + 1, linear.inputs, bounds)
        number = list(kinds).index(name)
        for index, (part, low, high) in enumerate(linear.slices()):
            if taken(part):
                targets[part] = Target(number, layer, index, linear.inputs, high - low)
    vocabulary, hidden = model.embed.weight.shape
    for name, inputs, outputs in ((EMBED_TOKENS, vocabulary, hidden), (LM_HEAD, hidden, vocabulary)):
        if taken(name):
            targets[name] = Target(len(kinds), 0, 0, inputs, outputs)
            kinds[name] = Kind(name, 1, inputs, (0, outputs))

    def weight(rows: dict[str, int], base: Tensor) -> Weight:
        return Weight(rows, frozenset(filter(taken, rows)), base)

    norms = list(model.norms())
    weights = (
        weight({EMBED_TOKENS: 0}, model.embed.weight),
        weight({LM_HEAD: 0}, model.head.weight),
        weight({norm.name: row for row, norm in enumerate(norms)}, torch.stack([norm.weight for norm in norms])),
    )
    return Layout(tuple(kinds.values()), targets, dtype, weights, model.config.tied_head)


def _kind_name(layer: int, linear: Linear) -> str:
    return "+".join(part.partition(f".{layer}.")[2] for part in linear.parts)
