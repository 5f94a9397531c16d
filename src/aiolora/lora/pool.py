"""AdapterPool: the store of rank pages on the device, attached once to the model's Linears."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aiolora.lora.layout import Layout
from aiolora.lora.loader import AdapterWeights
from aiolora.models.decoder import Decoder
from aiolora.ops.linear import RANKS_PER_PAGE, Site


class AdapterPool:
    """Pages of 8 ranks of one kind of site over all layers: a [P, L, S, 8, K], b [P, L, 8, N] a kind.

    One page is one contiguous copy, written whole before it is read. Which page holds what is `Residency`'s business.
    Engine thread only.
    """

    def __init__(self, layout: Layout, num_pages: int, device: str) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []
        for kind in layout.kinds:
            a = (num_pages, kind.layers, kind.slices, RANKS_PER_PAGE, kind.inputs)
            b = (num_pages, kind.layers, RANKS_PER_PAGE, kind.bounds[-1])
            self._a.append(torch.empty(a, dtype=layout.dtype, device=device))
            self._b.append(torch.empty(b, dtype=layout.dtype, device=device))

    def attach(self, model: Decoder) -> None:
        """Give every Linear inside the layers its Site."""
        for layer, linear in model.linears():
            kind = self.layout.kind_of(layer, linear)
            linear.site = Site(
                kind,
                self._a[kind][:, layer].transpose(0, 1),
                self._b[kind][:, layer],
                list(self.layout.kinds[kind].bounds),
            )

    def write(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> None:
        """Copy every page of `weights` to its place (kind -> page numbers)."""
        for kind, numbers in pages.items():
            for source, page in enumerate(numbers):
                self._a[kind][page].copy_(weights.a[kind][source], non_blocking=True)
                self._b[kind][page].copy_(weights.b[kind][source], non_blocking=True)
