"""What an adapter does to out-features one by one, as vector pages: y = gain * (W x + scale * B A x) + shift + bias.

DoRA (arXiv 2402.09353): gain = magnitude / ||W + scale * B A||, of each row, which does not touch the base's bias.
`lora_bias`: shift = scale * bias of lora_B. `bias`: shift = trained bias - the base's.
"""

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.errors import AdapterFormatError
from aiolora.lora.layout import Layout, Target
from aiolora.lora.paging import Pages
from aiolora.lora.tensorfile import Entry, Tensors

_BLOCK = 1 << 21  # elements of a weight in float32 at a time: 8 MB


class Vectors(NamedTuple):
    """The tensors [N] that one module has beside lora_A and lora_B."""

    module: str
    target: Target
    scale: float  # on the module's low-rank product
    magnitude: Entry | None
    factor_bias: Entry | None  # of lora_B
    bias: Entry | None  # instead of the base's


class Factors(NamedTuple):
    """The rank pages of a version and the scale of each kind: what will be served."""

    a: Pages
    b: Pages
    scales: dict[int, float]


def vector_pages(
    file: Tensors, modules: Iterable[Vectors], factors: Factors, layout: Layout, *, pinned: bool
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Kind -> vector page [L, 2, N] float32 where any module has vectors, and the sha256 of every tensor read.

    Norms are taken on the device of the base's weights; gains of a base on "meta" stay 1. Raises `AdapterFormatError`
    for values that are not finite, among them the gain of a row of zeros.
    """
    pages: dict[int, Tensor] = {}
    contents: dict[str, str] = {}
    for module in modules:
        kind, layer, index = module.target[:3]
        shape = layout.kinds[kind]
        if kind not in pages:
            pages[kind] = torch.zeros((shape.layers, 2, shape.bounds[-1]), dtype=torch.float32, pin_memory=pinned)
            pages[kind][:, 0] = 1
        gain, shift = pages[kind][layer, :, shape.bounds[index] : shape.bounds[index + 1]]
        if module.magnitude is not None:
            magnitude = _read(file, module.magnitude, contents)
            if not module.target.weight.is_meta:
                gain.copy_(magnitude / _norms(module.target, factors, layout))
        if module.factor_bias is not None:
            shift += module.scale * _read(file, module.factor_bias, contents)
        if module.bias is not None:
            bias, base = _read(file, module.bias, contents), module.target.bias
            shift += bias if base is None or base.is_meta else bias - base.float().cpu()
        if not (gain.isfinite().all() and shift.isfinite().all()):
            raise AdapterFormatError(
                file.adapter, f"{module.module} would be multiplied by, or added to, what is not finite"
            )
    return pages, contents


def _read(file: Tensors, entry: Entry, contents: dict[str, str]) -> Tensor:
    """One tensor [N], float32."""
    data = bytearray(entry.nbytes)
    file.read(entry, memoryview(data))
    contents[entry.name] = hashlib.sha256(data).hexdigest()
    values = torch.frombuffer(data, dtype=entry.dtype).float()
    if not values.isfinite().all():
        raise AdapterFormatError(file.adapter, f"{entry.name} ({entry.dtype}) holds values that are not finite floats")
    return values


def _norms(target: Target, factors: Factors, layout: Layout) -> Tensor:
    """||W + scale * B A|| of each row [N], in float32, of the factors as they will be served.

    Some rows at a time: W is never there whole in float32. On a GPU beside the steps, in a stream of its own.
    """
    kind, layer, index = target[:3]
    low, high = layout.kinds[kind].bounds[index : index + 2]
    weight = target.weight
    rows = max(1, _BLOCK // target.inputs)
    with torch.cuda.stream(_beside(weight.device) if weight.is_cuda else None):  # all of its memory, too
        norms = torch.empty(target.outputs, dtype=torch.float32, device=weight.device)
        a_RK = torch.cat([page[layer, index].to(weight.device) for page in factors.a[kind]]).float()
        b_RN = torch.cat([page[layer, :, low:high].to(weight.device) for page in factors.b[kind]]).float()
        for start in range(0, target.outputs, rows):
            part = slice(start, start + rows)
            served = torch.addmm(weight[part].float(), b_RN[:, part].T, a_RK, alpha=factors.scales[kind])
            norms[part] = torch.linalg.vector_norm(served, dim=1)
        return norms.cpu()


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
