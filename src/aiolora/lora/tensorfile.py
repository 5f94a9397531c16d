"""A safetensors file, never mapped: a header that is checked whole, and tensors read into the caller's own memory.

Format: https://github.com/huggingface/safetensors#format. A file truncated while it is mapped would kill the process.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from aiolora.errors import AdapterFormatError

_MAX_HEADER, _MAX_TENSORS, _MAX_DIMS, _MAX_EXTENT = 8 << 20, 50_000, 16, 1 << 48  # 48 layers of 128 experts fit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: a dict would hide a key that is there twice."""


class Entry(NamedTuple):
    """One tensor: `nbytes` bytes from `offset` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Tensors(Protocol):
    """Where an adapter's tensors are read from: a `TensorFile`, or memory. Any thread may read."""

    @property
    def adapter(self) -> str: ...

    @property
    def entries(self) -> dict[str, Entry]: ...

    @property
    def likeness(self) -> Hashable:
        """Equal where the entries are."""
        ...

    def read(self, entry: Entry, into: memoryview) -> None:
        """Fill the first `entry.nbytes` bytes of `into`. Raises `AdapterFormatError`."""
        ...

    def where(self, entries: Sequence[Entry]) -> tuple[int, npt.NDArray[np.int64]]:
        """(file descriptor, offsets) of their bytes, or (-1, addresses) of what is in memory."""
        ...


@dataclass(frozen=True)
class TensorFile:
    """An open file of tensors. Any thread may read."""

    adapter: str
    name: str
    fd: int
    size: int
    header: bytes

    @classmethod
    def open(cls, adapter: str, file: Path) -> "TensorFile":
        """Open `file` and read its header. Raises `AdapterFormatError`."""
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise AdapterFormatError(adapter, f"{file.name} cannot be read: {error.strerror}") from error
        try:
            return cls(adapter, file.name, fd, *_header(adapter, file.name, fd))
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """The tensors that the header names, which fill the file to its last byte without gap or overlap.

        Raises `AdapterFormatError` where they do not.
        """
        return _entries(self)

    @property
    def likeness(self) -> Hashable:
        """All that `entries` follow from, in few bytes: outlines are kept by it, and a header may have megabytes."""
        return self.size, sha256(self.header).digest()

    def read(self, entry: Entry, into: memoryview) -> None:
        """Fill the first `entry.nbytes` bytes of `into`. Raises `AdapterFormatError` where the file has shrunk."""
        try:
            _read(self.fd, into[: entry.nbytes], entry.offset)
        except OSError as error:
            raise AdapterFormatError(self.adapter, f"{self.name} cannot be read: {error}") from error

    def where(self, entries: Sequence[Entry]) -> tuple[int, npt.NDArray[np.int64]]:
        """(file descriptor, offsets) of their bytes."""
        return self.fd, np.array([entry.offset for entry in entries], np.int64)


def _read(fd: int, into: memoryview, offset: int) -> None:
    while into:
        count = os.preadv(fd, [into], offset)
        if count == 0:
            raise OSError("it has become shorter")
        into, offset = into[count:], offset + count


def _header(adapter: str, name: str, fd: int) -> tuple[int, bytes]:
    """(size of the file, its header)."""
    try:
        size = os.fstat(fd).st_size
        start = bytearray(min(size, 8))
        _read(fd, memoryview(start), 0)
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise AdapterFormatError(adapter, f"{name} is truncated: header of {length} bytes in a file of {size}")
        if length > _MAX_HEADER:
            raise AdapterFormatError(adapter, f"{name} has a header of {length} bytes, the limit is {_MAX_HEADER}")
        header = bytearray(length)
        _read(fd, memoryview(header), 8)
    except OSError as error:
        raise AdapterFormatError(adapter, f"{name} cannot be read: {error}") from error
    return size, bytes(header)


def _entries(file: TensorFile) -> dict[str, Entry]:
    adapter, name = file.adapter, file.name
    try:
        pairs = json.loads(file.header.decode(), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(adapter, f"{name} has no JSON header: {error}") from None
    if not isinstance(pairs, _Object):
        raise AdapterFormatError(adapter, f"{name} has a header that is no JSON object")
    if len(pairs) > _MAX_TENSORS:
        raise AdapterFormatError(adapter, f"{name} names over {_MAX_TENSORS} tensors")
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise AdapterFormatError(adapter, f"{name} names {twice[0]!r} twice")
    entries: dict[str, Entry] = {}
    end = 8 + len(file.header)
    try:
        found = [_entry(key, value, end) for key, value in pairs if key != "__metadata__"]
        for entry in sorted(found, key=lambda entry: (entry.offset, entry.nbytes)):
            if entry.offset != end:
                raise ValueError(f"{entry.name!r} begins at byte {entry.offset}, what is before it ends at {end}")
            entries[entry.name] = entry
            end += entry.nbytes
        if end != file.size:
            raise ValueError(f"its tensors end at byte {end} of {file.size}")
    except ValueError as error:
        raise AdapterFormatError(adapter, f"{name} is truncated or malformed: {error}") from None
    return entries


def _entry(name: str, value: object, start: int) -> Entry:
    """One value of the header; `start`: where the tensors begin in the file. Raises `ValueError`."""
    if not isinstance(value, _Object):
        raise ValueError(f"{name!r} is described by no object")
    fields = dict(value)
    if len(fields) != len(value):
        raise ValueError(f"{name!r} has a field twice")
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields.get("dtype"), str) else None
    if dtype is None:
        raise ValueError(f"{name!r} has the dtype {fields.get('dtype')!r}")
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(f"{name!r} has no shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has no two data_offsets")
    low, high = offsets
    if high - low != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {high - low} bytes for {dtype} of {shape}")
    return Entry(name, dtype, tuple(shape), start + low, high - low)


def not_finite(adapter: str, entry: Entry, dtype: torch.dtype) -> AdapterFormatError:
    """Why `entry` cannot be served in `dtype`."""
    return AdapterFormatError(
        adapter, f"{entry.name} ({entry.dtype}) holds values that are not finite floats in {dtype}"
    )


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return type(values) is list and all(type(value) is int and 0 <= value <= _MAX_EXTENT for value in values)
