"""Tensors of an adapter file into rank pages: read, digested, checked and laid out a tensor at a time, in threads.

A tensor passes through one small buffer, so that its bytes are still in the processor's cache for each of the four.
`compiled.py` does it where it can, numpy here otherwise.
"""

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiolora.lora.compiled import Placed, lay_out
from aiolora.lora.layout import Layout, Place, Target
from aiolora.lora.tensorfile import Entry, Tensors, not_finite
from aiolora.ops.build_native import library
from aiolora.ops.linear import RANKS_PER_PAGE

_log = logging.getLogger(__name__)

_MAX_THREADS = 8  # of all loads together, and half of the cores at most: others are being served
_SERIAL = 1 << 15  # elements from where torch would start threads of its own

Bits = npt.NDArray[np.signedinteger[Any]]  # floats by their bits, which numpy has for bfloat16 too
Pages = dict[int, list[Tensor]]  # kind -> pages

# integers of the same width, and infinity by its bits: whatever is not finite is not below it
_BITS = {
    torch.float32: (np.int32, np.uint32, 0x7F800000),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
}


class Module(NamedTuple):
    """One Linear of the base model that the adapter changes."""

    a: Entry  # [r, K]
    b: Entry  # [N, r]
    target: Target
    ratio: float  # to be folded into B


def fill(
    file: Tensors,
    modules: list[Module],
    counts: dict[int, int],
    layout: Layout,
    *,
    pinned: bool,
    later: frozenset[Place] = frozenset(),
) -> tuple[Pages, Pages, dict[Entry, str]]:
    """`counts` pages of each kind, A's [L, S, 8, K] and B's [L, 8, N], and every tensor's sha256.

    `later`: what the caller will fill.
    Raises `AdapterFormatError` for values that are not finite in the layout's dtype.
    """
    a_pages, b_pages = _empty(layout, counts, pinned=pinned)
    modules = sorted(modules, key=lambda module: module.a.offset)
    present = later | {module.target.place for module in modules}
    for kind in counts:
        shape = layout.kinds[kind]
        for layer in range(shape.layers):
            for index in range(shape.slices):
                if (kind, layer, index) not in present:
                    _clear(a_pages[kind], b_pages[kind], layer, index, shape.bounds)
    if not modules:
        return a_pages, b_pages, {}
    a, b = _addresses(a_pages), _addresses(b_pages)
    placed = [
        one for module in modules for one in _places(module, a[module.target.kind], b[module.target.kind], layout)
    ]
    contents = lay_out(file, placed, layout.dtype, threads(), _num_threads())
    if contents is None:
        contents = _fill(file, modules, a_pages, b_pages, layout)
    return a_pages, b_pages, contents


def reserve(layout: Layout, counts: Mapping[int, int]) -> None:
    """See that so many more page-locked pages (kind -> count) can be had at once.

    Locking takes longer than reading a file. Torch keeps what is given back to it, block by block, and pages of one
    kind have one size whatever the rank: blocks of an adapter that was evicted serve the next.
    """
    began_s = time.monotonic()
    pages = _empty(layout, counts, pinned=True)
    nbytes = sum(page.nbytes for kinds in pages for some in kinds.values() for page in some)
    _log.info("locked %.0f MiB for adapters in %.1f s", nbytes / 2**20, time.monotonic() - began_s)


def reserve_soon(layout: Layout, counts: Mapping[int, int]) -> None:
    """The same, and what compiles the loader, in threads: an engine that starts has other things to do."""
    threads().submit(library)
    threads().submit(reserve, layout, counts)


def _fill(file: Tensors, modules: list[Module], a_pages: Pages, b_pages: Pages, layout: Layout) -> dict[Entry, str]:
    """`compiled.lay_out` for any dtype, without a compiler."""
    a, b = ({kind: list(map(bits_of, some)) for kind, some in pages.items()} for pages in (a_pages, b_pages))
    work = _Fill(file, layout, a, b)
    remaining = iter(modules)
    longest = max(max(module.a.nbytes, module.b.nbytes) for module in modules)
    futures = [threads().submit(work.run, remaining, longest) for _ in range(min(_num_threads(), len(modules)))]
    wait(futures)  # all of them, also after an error: they use the file
    contents: dict[Entry, str] = {}
    for future in futures:
        contents |= future.result()
    return contents


class _Fill:
    """The work on one adapter that several threads share."""

    def __init__(self, file: Tensors, layout: Layout, a: dict[int, list[Bits]], b: dict[int, list[Bits]]) -> None:
        self._file = file
        self._layout = layout
        self._a = a
        self._b = b

    def run(self, remaining: Iterator[Module], longest: int) -> dict[Entry, str]:
        """Take module after module from what all share; the sha256 of every tensor taken."""
        buffer = np.empty(longest, np.uint8)
        contents: dict[Entry, str] = {}
        for module in remaining:
            kind, layer, index = module.target[:3]
            low, high = self._layout.kinds[kind].bounds[index : index + 2]
            a = self._values(module.a, 1.0, buffer, contents)
            for page, start in zip(self._a[kind], range(0, len(self._a[kind]) * RANKS_PER_PAGE, RANKS_PER_PAGE)):
                _put(page[layer, index], a[start : start + RANKS_PER_PAGE])
            b = self._values(module.b, module.ratio, buffer, contents).T
            for page, start in zip(self._b[kind], range(0, len(self._b[kind]) * RANKS_PER_PAGE, RANKS_PER_PAGE)):
                _put(page[layer, :, low:high], b[start : start + RANKS_PER_PAGE])
        return contents

    def _values(self, entry: Entry, ratio: float, buffer: npt.NDArray[np.uint8], contents: dict[Entry, str]) -> Bits:
        """One tensor in the layout's dtype, times `ratio`; it stays in `buffer` where nothing had to be converted."""
        dtype = self._layout.dtype
        self._file.read(entry, buffer.data)
        raw = buffer[: entry.nbytes]
        contents[entry] = hashlib.sha256(raw.data).hexdigest()
        bits = finite(self._file.adapter, entry, raw, dtype)
        if ratio != 1:
            bits = scaled(raw, entry.dtype, dtype, ratio)
        return bits.reshape(entry.shape)


def finite(adapter: str, entry: Entry, raw: npt.NDArray[np.uint8], dtype: torch.dtype) -> Bits:
    """Bytes of `entry` as floats [n] in `dtype`, no copy where that is how they are stored.

    Raises `AdapterFormatError` for values that are not finite in it.
    """
    integer, unsigned, infinity = _BITS[dtype]
    bits: Bits = raw.view(integer) if entry.dtype == dtype else scaled(raw, entry.dtype, dtype)
    # below zero the sign bit is set: the largest unsigned number is then the negative furthest from zero, or NaN
    if bits.max() >= infinity or int(bits.view(unsigned).max()) >= infinity + (1 << 8 * bits.itemsize - 1):
        raise not_finite(adapter, entry, dtype)
    return bits


def _addresses(pages: Pages) -> dict[int, list[int]]:
    return {kind: [page.data_ptr() for page in some] for kind, some in pages.items()}


def _places(module: Module, a: list[int], b: list[int], layout: Layout) -> tuple[Placed, Placed]:
    """Where both tensors of a module belong in the pages at the addresses `a` and `b`."""
    kind, layer, index = module.target[:3]
    shape, width = layout.kinds[kind], layout.dtype.itemsize
    a_stride, b_stride = shape.inputs * width, shape.bounds[-1] * width
    a_offset = (layer * shape.slices + index) * RANKS_PER_PAGE * a_stride
    b_offset = layer * RANKS_PER_PAGE * b_stride + shape.bounds[index] * width
    return (
        Placed(module.a, False, 1.0, [page + a_offset for page in a], a_stride),
        Placed(module.b, True, module.ratio, [page + b_offset for page in b], b_stride),
    )


def _clear(a_pages: list[Tensor], b_pages: list[Tensor], layer: int, index: int, bounds: tuple[int, ...]) -> None:
    """Zeros for a slice without a module."""
    for a, b in zip(a_pages, b_pages):
        a[layer, index] = 0
        b[layer, :, bounds[index] : bounds[index + 1]] = 0


def _put(target: Bits, part: Bits) -> None:
    """Write the ranks there are, and zeros for those of the page that the module has not."""
    target[: len(part)] = part
    if len(part) < len(target):
        target[len(part) :] = 0


def scaled(raw: npt.NDArray[np.uint8], stored: torch.dtype, dtype: torch.dtype, ratio: float = 1.0) -> Bits:
    """Floats [n] of the dtype `stored`, in `dtype` and times `ratio`.

    In pieces, or each of our threads would start as many as torch has.
    """
    source = torch.from_numpy(raw).view(stored)
    values = torch.empty(len(source), dtype=dtype)
    for start in range(0, len(source), _SERIAL):
        piece = source[start : start + _SERIAL]
        values[start : start + _SERIAL] = piece if ratio == 1 else piece.float() * ratio
    return bits_of(values)


def bits_of(tensor: Tensor) -> Bits:
    """The memory of `tensor` (on the CPU) as integers."""
    bits: Bits = tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16).numpy()
    return bits


def _empty(layout: Layout, counts: Mapping[int, int], *, pinned: bool) -> tuple[Pages, Pages]:
    a_pages: Pages = {}
    b_pages: Pages = {}
    for kind, count in counts.items():
        shape = layout.kinds[kind]
        a = (shape.layers, shape.slices, RANKS_PER_PAGE, shape.inputs)
        b = (shape.layers, RANKS_PER_PAGE, shape.bounds[-1])
        a_pages[kind] = [torch.empty(a, dtype=layout.dtype, pin_memory=pinned) for _ in range(count)]
        b_pages[kind] = [torch.empty(b, dtype=layout.dtype, pin_memory=pinned) for _ in range(count)]
    return a_pages, b_pages


def _num_threads() -> int:
    return max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2))


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Shared by all loads of the process."""
    return ThreadPoolExecutor(_num_threads(), thread_name_prefix="aiolora-load")
