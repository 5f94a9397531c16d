"""AdapterPool: the store of rank pages on the device, attached once to the model's Linears."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiolora.lora.layout import EMBEDDING, Layout, Room
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.rows import Block
from aiolora.models.decoder import Decoder
from aiolora.ops.blocks import ROWS_PER_BLOCK
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

    And pages of blocks of rows: [P, 128, H].
    One page is one contiguous copy a factor, written whole before it is read. Which page holds what is `Residency`'s
    business. A GPU copies in a stream of its own while steps run: nothing launched reads the pages of an evicted
    version, and no step reads a version that is launched before its `Arrival` is done, so neither stream waits for the
    other. Engine thread only.
    """

    def __init__(self, layout: Layout, room: Room, device: str) -> None:
        self.layout = layout
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []
        *counts, num_blocks = layout.pages(room)
        for kind, num_pages in zip(layout.kinds, counts):
            a = (num_pages, kind.layers, kind.slices, RANKS_PER_PAGE, kind.inputs)
            b = (num_pages, kind.layers, RANKS_PER_PAGE, kind.bounds[-1])
            self._a.append(torch.empty(a, dtype=layout.dtype, device=device))
            self._b.append(torch.empty(b, dtype=layout.dtype, device=device))
        base = layout.weights[EMBEDDING].base
        self.rows = base.new_empty((num_blocks, ROWS_PER_BLOCK, base.shape[1]))
        self._copies = torch.cuda.Stream() if device.startswith("cuda") else None  # type: ignore[no-untyped-call]

    def attach(self, model: Decoder) -> None:
        """Give every Linear inside the layers, the embedding and the head their Sites."""
        for layer, linear in model.linears():
            linear.site = self._site(self.layout.kind_of(layer, linear), layer)
        ends = self.layout.ends
        model.embed.site = self._site(ends.embedding, 0) if ends.embedding >= 0 else None
        model.head.site = self._site(ends.head, 0) if ends.head >= 0 else None

    def _site(self, kind: int, layer: int) -> Site:
        a, b = self._a[kind][:, layer].transpose(0, 1), self._b[kind][:, layer]
        return Site(kind, a, b, list(self.layout.kinds[kind].bounds))

    def write(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> Arrival:
        """Begin to copy every page of `weights` to its place (kind -> page numbers)."""
        if self._copies is None:
            self._copy(weights, pages)
            return Arrival(weights, None)
        with torch.cuda.stream(self._copies):
            self._copy(weights, pages)
            return Arrival(weights, self._copies.record_event())

    def _copy(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> None:
        for kind, numbers in pages.items():
            if kind == self.layout.ends.blocks:
                self._copy_blocks(weights.blocks, numbers)
                continue
            for source, page in enumerate(numbers):
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
