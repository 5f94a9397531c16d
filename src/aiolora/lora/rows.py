"""Rows of the base's weights that an adapter brings, into pages of blocks: read, digested, checked, a block at a time.

A weight that is saved whole is often the base's own: PEFT saves embeddings beside factors of theirs. Blocks that hold
nothing but the base's rows are left out, so they cost nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from aiolora.errors import AdapterMemoryError, AdapterMismatchError
from aiolora.lora.brought import Brought
from aiolora.lora.layout import Layout, Weight
from aiolora.lora.paging import finite
from aiolora.lora.tensorfile import Entry, Tensors
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.types import BlockSpan

_BASE_BLOCKS = 64  # of the base's rows fetched at a time, from where they lie on a GPU


@dataclass(frozen=True)
class Block:
    """A page of rows in host memory; those outside of `spans` are the base's and not filled in."""

    weight: int  # index in the layout
    number: int
    page: Tensor  # [128, H]
    spans: list[tuple[int, int]] = field(default_factory=list)  # rows of the page


def read_blocks(
    file: Tensors,
    brought: Sequence[Brought],
    layout: Layout,
    room: int,
    enough: Callable[[int], int],
    *,
    pinned: bool,
) -> tuple[list[Block], dict[str, str]]:
    """The blocks that differ from the base, in the order of weights and numbers; every tensor's sha256.

    Raises `AdapterFormatError` for values that are not finite in the base's dtype, `AdapterMismatchError` for rows of a
    module that takes no adapters, and `AdapterMemoryError` as soon as there are more blocks than the device has `room`
    for; `enough(blocks)` is the memory that has it.
    """
    blocks: list[Block] = []
    contents: dict[str, str] = {}

    def check_room(count: int) -> None:
        if count > room:
            most = sum(map(_most_blocks, brought))
            raise AdapterMemoryError(
                file.adapter,
                f"brings {count} or more blocks of {ROWS_PER_BLOCK} rows of the embedding, the head or the norms, "
                f"{layout.page_nbytes(layout.page_kinds.blocks)} bytes each; there is room for {room}; start with "
                f"--lora-ends-memory {enough(most)}",
            )

    def check_open(one: Brought, first: int) -> None:
        if first in one.closed:
            raise AdapterMismatchError(
                file.adapter, f"changes {one.closed[first]}, which takes no adapters (--lora-target-modules)"
            )

    for one in brought:
        own = _Own(one.weight, layout.weights[one.weight], pinned)
        for first, entry in one.whole.items():
            digest = hashlib.sha256()
            for row, values in _pieces(file, entry, first, own.weight, digest):
                if not own.base_has(row, values):
                    check_open(one, first)
                    own.put(row, values)
                    check_room(len(blocks) + len(own.blocks))
            contents[entry.name] = digest.hexdigest()
        if one.tokens is not None:
            check_open(one, 0)
            digest = hashlib.sha256()
            for start, values in _pieces(file, one.tokens, 0, own.weight, digest):
                for row, value in zip(one.rows[start:], values):
                    own.put(row, value.unsqueeze(0))
            contents[one.tokens.name] = digest.hexdigest()
            check_room(len(blocks) + len(own.blocks))
        blocks += [own.blocks[number] for number in sorted(own.blocks)]
    return blocks, contents


def _most_blocks(one: Brought) -> int:
    """How many it takes if nothing in it is the base's own."""
    whole = {(first + row) // ROWS_PER_BLOCK for first, entry in one.whole.items() for row in range(_rows(entry))}
    return len(whole | {row // ROWS_PER_BLOCK for row in one.rows})


def _rows(entry: Entry) -> int:
    return entry.shape[0] if len(entry.shape) == 2 else 1


def spans_of(blocks: Sequence[Block]) -> tuple[BlockSpan, ...]:
    """Their numbers, those that follow each other as one."""
    spans: list[BlockSpan] = []
    for block in blocks:
        if spans and spans[-1].weight == block.weight and spans[-1].high == block.number:
            spans[-1] = BlockSpan(block.weight, spans[-1].low, block.number + 1)
        else:
            spans.append(BlockSpan(block.weight, block.number, block.number + 1))
    return tuple(spans)


class _Own:
    """The blocks of one weight that an adapter has of its own, and the base's to hold rows against."""

    def __init__(self, index: int, weight: Weight, pinned: bool) -> None:
        self.blocks: dict[int, Block] = {}
        self.weight = weight
        self._index = index
        self._pinned = pinned
        self._fetched = (0, torch.empty(0))

    def put(self, row: int, values: Tensor) -> None:
        """Rows from `row` on are `values` [n, H], within one block."""
        number, low = divmod(row, ROWS_PER_BLOCK)
        if number not in self.blocks:
            shape, dtype = (ROWS_PER_BLOCK, values.shape[1]), values.dtype
            self.blocks[number] = Block(self._index, number, torch.empty(shape, dtype=dtype, pin_memory=self._pinned))
        self.blocks[number].page[low : low + len(values)] = values
        self.blocks[number].spans.append((low, low + len(values)))

    def base_has(self, row: int, values: Tensor) -> bool:
        """Whether those are the base's rows from `row` on."""
        base = self.weight.base
        if base.is_meta:
            return False
        if not base.is_cuda:
            return torch.equal(base[row : row + len(values)], values)
        first, rows = self._fetched
        if not first <= row <= row + len(values) <= first + len(rows):
            with torch.cuda.stream(torch.cuda.Stream(base.device)):  # type: ignore[no-untyped-call]
                rows = base[row : row + _BASE_BLOCKS * ROWS_PER_BLOCK].cpu()
            self._fetched = first, rows = row, rows
        return torch.equal(rows[row - first : row - first + len(values)], values)


def _pieces(
    file: Tensors, entry: Entry, first: int, weight: Weight, digest: "hashlib._Hash"
) -> Iterator[tuple[int, Tensor]]:
    """(row, values [n, H] in the base's dtype) of `entry`, whose first is row `first`, cut where blocks begin."""
    width, dtype = weight.base.shape[1], weight.base.dtype
    bytes_of_row = width * entry.dtype.itemsize
    buffer = np.empty(ROWS_PER_BLOCK * bytes_of_row, np.uint8)
    row, end = first, first + _rows(entry)
    while row < end:
        count = min(end, (row // ROWS_PER_BLOCK + 1) * ROWS_PER_BLOCK) - row
        start = entry.offset + (row - first) * bytes_of_row
        part = entry._replace(offset=start, nbytes=count * bytes_of_row)
        file.read(part, buffer.data)
        raw = buffer[: part.nbytes]
        digest.update(raw.data)
        yield row, torch.from_numpy(finite(file.adapter, part, raw, dtype)).view(dtype).view(count, width)
        row += count
