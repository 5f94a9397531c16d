"""AdapterPool: the store of adapters' pages on the device, attached once to the model's Linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiolora.lora.kinds import Room
from aiolora.lora.layout import EMBEDDING, Layout
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.rows import Block
from aiolora.models.encoder import Encoder
from aiolora.models.model import Model
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.ops.experts import ExpertSite
from aiolora.ops.linear import RANKS_PER_PAGE, Site


@dataclass(frozen=True)
class Arrival:
    """Copies to the device that were begun; `event`: after the last of them (None: they were done at once)."""

    weights: AdapterWeights  # read until then
    event: torch.cuda.Event | None

    def done(self) -> bool:
        """Whether every byte has landed. Does not wait."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block until it has, other threads running on."""
        if self.event is not None:
            self.event.synchronize()


class AdapterPool:
    """Pages of 8 ranks of one kind of site over all layers: a [P, L, S, 8, K], b [P, L, 8, N] a kind.

    And vector pages [V, L, 2, N], float32: gain and shift, and pages of blocks of rows [P, 128, H]. A page is one
    contiguous copy, written whole before it is read. Which page holds what is `Residency`'s business. A GPU copies in
    a stream of its own while steps run: nothing launched reads the pages of an evicted version, and no step reads a
    version that is launched before its `Arrival` is done, so neither stream waits for the other. Engine thread only.
    """

    def __init__(self, layout: Layout, room: Room, device: str) -> None:
        self.layout = layout
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []
        self._vectors: list[Tensor] = []
        page_kinds = layout.page_kinds
        counts = room.pages(page_kinds)
        for number, kind in enumerate(layout.kinds):
            num_pages, num_vectors = counts[number], counts[page_kinds.vectors_of(number)]
            a = (num_pages, kind.layers, kind.slices, RANKS_PER_PAGE, kind.inputs)
            b = (num_pages, kind.layers, RANKS_PER_PAGE, kind.bounds[-1])
            vectors = (num_vectors, kind.layers, 2, kind.bounds[-1])
            self._a.append(torch.empty(a, dtype=layout.dtype, device=device))
            self._b.append(torch.empty(b, dtype=layout.dtype, device=device))
            self._vectors.append(torch.empty(vectors, dtype=torch.float32, device=device))
        base = layout.weights[EMBEDDING].base
        self.rows = base.new_empty((counts[page_kinds.blocks], ROWS_PER_BLOCK, base.shape[1]))
        self._copies = torch.cuda.Stream() if device.startswith("cuda") else None  # type: ignore[no-untyped-call]

    def attach(self, model: Model, encoder: Encoder | None = None) -> None:
        """Give Linears, routed experts, the embedding and the head their Sites; none where there is no room."""
        for layer, linear in (*model.linears(), *(encoder.linears() if encoder else ())):
            kind = self.layout.kind_of(layer, linear)
            linear.site = None if kind is None else self._site(kind, layer)
        for layer, experts in model.experts():
            kind, count = self.layout.kind_of(layer, experts), experts.experts
            if kind is not None and len(self._a[kind]):
                own = slice(layer * count, (layer + 1) * count)
                experts.site = ExpertSite(kind, self._a[kind][:, own], self._b[kind][:, own])
        kinds = self.layout.page_kinds
        model.embed.site = self._end(kinds.embedding)
        model.head.site = self._end(kinds.head)

    def _end(self, kind: int) -> Site | None:
        return self._site(kind, 0) if kind >= 0 and len(self._a[kind]) else None

    def _site(self, kind: int, layer: int) -> Site:
        return Site(
            kind,
            self._a[kind][:, layer].transpose(0, 1),
            self._b[kind][:, layer],
            self._vectors[kind][:, layer],
            list(self.layout.kinds[kind].bounds),
        )

    def write(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> Arrival:
        """Begin to copy every page of `weights` to its place (kind -> page numbers)."""
        if self._copies is None:
            self._copy(weights, pages)
            return Arrival(weights, None)
        with torch.cuda.stream(self._copies):
            self._copy(weights, pages)
            return Arrival(weights, self._copies.record_event())

    def _copy(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> None:
        kinds = self.layout.page_kinds
        for kind, vectors in weights.vectors.items():
            (page,) = pages[kinds.vectors_of(kind)]
            self._vectors[kind][page].copy_(vectors, non_blocking=True)
        if weights.blocks:
            self._copy_blocks(weights.blocks, pages[kinds.blocks])
        for kind in weights.a:
            for source, page in enumerate(pages[kind]):
                self._a[kind][page].copy_(weights.a[kind][source], non_blocking=True)
                self._b[kind][page].copy_(weights.b[kind][source], non_blocking=True)

    def _copy_blocks(self, blocks: Sequence[Block], numbers: Sequence[int]) -> None:
        """Rows of an adapter, and the base's where a block is not the adapter's throughout."""
        for block, number in zip(blocks, numbers):
            page = self.rows[number]
            base = self.layout.weights[block.weight].base[block.number * ROWS_PER_BLOCK :][:ROWS_PER_BLOCK]
            if sum(high - low for low, high in block.spans) < len(base):
                page[: len(base)].copy_(base)
            for low, high in block.spans:
                page[low:high].copy_(block.page[low:high], non_blocking=True)
