"""Which modules of the model take adapters, and the shapes of the pages of each kind of site."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.models.decoder import Decoder
from aiolora.models.layers import Linear
from aiolora.ops.linear import RANKS_PER_PAGE


@dataclass(frozen=True)
class Kind:
    """One kind of site (qkv, o, gate_up, down): the same Linear in every layer, so one page serves all layers."""

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
    weight: Tensor  # [N, K] of the base model, a view; on "meta" where there is only its outline
    bias: Tensor | None = None  # [N]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Layout:
    """All kinds, and the module names that lead to them. Read by loaders in any thread.

    Pages of a version are numbered by kind: rank pages by that of their site, vector pages by `vectors_of` it.
    """

    kinds: tuple[Kind, ...]
    targets: dict[str, Target]
    dtype: torch.dtype

    def kind_of(self, layer: int, linear: Linear) -> int:
        """Index of the kind of a Linear in `layer`."""
        return next(i for i, kind in enumerate(self.kinds) if kind.name == _kind_name(layer, linear))

    def vectors_of(self, kind: int) -> int:
        """The kind of the vector pages that go with rank pages of `kind`."""
        return len(self.kinds) + kind

    def pages_nbytes(self, pages: dict[int, int]) -> int:
        """Bytes of so many pages (kind -> count) on the device."""
        sizes = [kind.page_nbytes(self.dtype) for kind in self.kinds] + [kind.vectors_nbytes for kind in self.kinds]
        return sum(count * sizes[kind] for kind, count in pages.items())


def layout_of(model: Decoder, dtype: torch.dtype, *, only: tuple[str, ...] | None = None) -> Layout:
    """Group the model's Linears into kinds; `only` (suffixes of module names) narrows what may be changed."""
    kinds: dict[str, Kind] = {}
    targets: dict[str, Target] = {}
    for layer, linear in model.linears():
        name = _kind_name(layer, linear)
        bounds = (0, *(high for _, _, high in linear.slices()))
        kinds[name] = Kind(name, layer + 1, linear.inputs, bounds)
        number = list(kinds).index(name)
        for index, (part, low, high) in enumerate(linear.slices()):
            if only is None or any(part.endswith(suffix) for suffix in only):
                bias = None if linear.bias is None else linear.bias[low:high]
                targets[part] = Target(number, layer, index, linear.weight[low:high], bias)
    return Layout(tuple(kinds.values()), targets, dtype)


def _kind_name(layer: int, linear: Linear) -> str:
    return "+".join(part.partition(f".{layer}.")[2] for part in linear.parts)
