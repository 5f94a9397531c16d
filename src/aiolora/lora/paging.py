"""Tensors of an adapter file into rank pages: read, digested, checked and laid out a tensor at a time, in threads.

A tensor passes through one small buffer, so that its bytes are still in the processor's cache for each of the four.
`compiled.py` does it where it can, numpy here otherwise.
"""

import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiolora.lora.compiled import Packed, Placed, lay_out
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


@dataclass(frozen=True)
class Filling:
    """What of which pages is filled from where; worked out when it is asked first, for any file that is alike."""

    layout: Layout
    modules: list[Module]
    counts: dict[int, int]  # kind -> pages of A, and of B
    later: frozenset[Place] = frozenset()  # what somebody else will fill

    @functools.cached_property
    def bare(self) -> list[Place]:
        """Slices without a module."""
        present = self.later | {module.target.place for module in self.modules}
        bare: list[Place] = []
        for kind in self.counts:
            shape = self.layout.kinds[kind]
            every = itertools.product((kind,), range(shape.layers), range(shape.slices))
            bare += [place for place in every if place not in present]
        return bare

    @functools.cached_property
    def packed(self) -> Packed:
        """The tensors, to be laid out in all pages: of each kind those of A, then those of B."""
        first, pages = {}, 0
        for kind, count in self.counts.items():
            first[kind] = pages
            pages += 2 * count
        return Packed([one for module in self.modules for one in self._placed(module, first)], self.layout.dtype)

    def _placed(self, module: Module, first: Mapping[int, int]) -> tuple[Placed, Placed]:
        kind, layer, index = module.target.place
        shape, width, count = self.layout.kinds[kind], self.layout.dtype.itemsize, self.counts[kind]
        a_stride, b_stride = shape.inputs * width, shape.bounds[-1] * width
        a_offset = (layer * shape.slices + index) * RANKS_PER_PAGE * a_stride
        b_offset = layer * RANKS_PER_PAGE * b_stride + shape.bounds[index] * width
        return (
            Placed(module.a, False, 1.0, first[kind], count, a_offset, a_stride),
            Placed(module.b, True, module.ratio, first[kind] + count, count, b_offset, b_stride),
        )


def fill(file: Tensors, filling: Filling, *, pinned: bool) -> tuple[Pages, Pages, dict[str, str]]:
    """The pages of each kind, A's [L, S, 8, K] and B's [L, 8, N], and every tensor's sha256.

    Raises `AdapterFormatError` for values that are not finite in the layout's dtype.
    """
    layout = filling.layout
    a_pages, b_pages = _empty(layout, filling.counts, pinned=pinned)
    for kind, layer, index in filling.bare:
        _clear(a_pages[kind], b_pages[kind], layer, index, layout.kinds[kind].bounds)
    if not filling.modules:
        return a_pages, b_pages, {}
    addresses = [page.data_ptr() for kind in filling.counts for page in (*a_pages[kind], *b_pages[kind])]
    contents = lay_out(file, filling.packed, addresses, _num_threads())
    if contents is None:
        contents = _fill(file, filling.modules, a_pages, b_pages, layout)
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


def _fill(file: Tensors, modules: list[Module], a_pages: Pages, b_pages: Pages, layout: Layout) -> dict[str, str]:
    """`compiled.lay_out` for any dtype, without a compiler."""
    a, b = ({kind: list(map(bits_of, some)) for kind, some in pages.items()} for pages in (a_pages, b_pages))
    work = _Fill(file, layout, a, b)
    remaining = iter(sorted(modules, key=lambda module: module.a.offset))
    longest = max(max(module.a.nbytes, module.b.nbytes) for module in modules)
    futures = [threads().submit(work.run, remaining, longest) for _ in range(min(_num_threads(), len(modules)))]
    wait(futures)  # all of them, also after an error: they use the file
    contents: dict[str, str] = {}
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

    def run(self, remaining: Iterator[Module], longest: int) -> dict[str, str]:
        """Take module after module from what all share; the sha256 of every tensor taken."""
        buffer = np.empty(longest, np.uint8)
        contents: dict[str, str] = {}
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

    def _values(self, entry: Entry, ratio: float, buffer: npt.NDArray[np.uint8], contents: dict[str, str]) -> Bits:
        """One tensor in the layout's dtype, times `ratio`; it stays in `buffer` where nothing had to be converted."""
        dtype = self._layout.dtype
        self._file.read(entry, buffer.data)
        raw = buffer[: entry.nbytes]
        contents[entry.name] = hashlib.sha256(raw.data).hexdigest()
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
    """For what is not compiled. Shared by all loads of the process."""
    return ThreadPoolExecutor(_num_threads(), thread_name_prefix="aiolora-load")
