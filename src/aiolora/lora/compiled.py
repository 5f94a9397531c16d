"""Tensors into rank pages by `ops/csrc/pages.c`, so that loading leaves the interpreter to those who serve.

It takes the interpreter's lock once a load, whatever the number of tensors and threads; by numpy, in `paging.py`, some
thousand times and two to three times as long (docs/performance.md).
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from aiolora.errors import AdapterFormatError
from aiolora.lora.tensorfile import Entry, Tensors, not_finite
from aiolora.ops.build_native import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DONE, _NOT_FINITE, _SHORTER, _FAILED = 1, 2, 3, 1000  # states, as in pages.c
_TENSOR = np.dtype(
    [
        *((name, np.int64) for name in ("rows", "columns", "stored", "turned")),
        ("ratio", np.float64),
        *((name, np.int64) for name in ("first", "pages", "offset", "stride")),
    ]
)
_CALLS = ("EVP_MD_CTX_new", "EVP_MD_CTX_free", "EVP_DigestInit_ex", "EVP_DigestUpdate", "EVP_DigestFinal_ex")


class Placed(NamedTuple):
    """One tensor, and where its ranks belong."""

    entry: Entry  # [r, K], or with `turned` [N, r]
    turned: bool
    ratio: float  # to be multiplied with
    first: int  # number of its first page, and how many there are from it on
    pages: int
    offset: int  # of its first rank in each of them, in bytes
    stride: int  # bytes from one rank of a page to the next


class Packed:
    """Tensors as pages.c wants them: worked out once, for any file that is laid out alike and for any pages."""

    def __init__(self, tensors: Sequence[Placed], dtype: torch.dtype) -> None:
        longest = max(placed.entry.nbytes for placed in tensors)
        # large ones first, as they lie in the file: a thread left with one at the end would keep the others waiting
        tensors = sorted(tensors, key=lambda placed: (2 * placed.entry.nbytes < longest, placed.entry.offset))
        self.dtype = dtype
        self.entries = [placed.entry for placed in tensors]
        self.widest = max(placed.entry.nbytes // placed.entry.shape[0] for placed in tensors if placed.turned)
        self.served = {dtype, *(entry.dtype for entry in self.entries)} <= _TYPES.keys()
        if self.served:
            rows = [(*one.entry.shape, _TYPES[one.entry.dtype], *one[1:]) for one in tensors]
            self.rows = np.array(rows, _TENSOR)


def lay_out(file: Tensors, packed: Packed, pages: Sequence[int], threads: int) -> dict[str, str] | None:
    """Read, digest, check and lay out all tensors in `pages` (addresses), the sha256 of each.

    By so many threads, this one among them; other loads wait for them. None, and nothing done, where the compiled code
    does not serve. Raises `AdapterFormatError`.
    """
    loaded, crypto = library(), _sha256()
    if loaded is None or crypto is None or not packed.served:
        return None
    entries = packed.entries
    fd, at = file.where(entries)
    addresses = np.array(pages, np.int64)
    digests, states = np.zeros((len(entries), 32), np.uint8), np.zeros(len(entries), np.int64)
    ends = fd, at.ctypes.data, digests.ctypes.data, states.ctypes.data
    sizes = min(threads, len(entries)), _TYPES[packed.dtype], len(entries), packed.widest
    tables = packed.rows.ctypes.data, addresses.ctypes.data
    shared = np.array([*sizes, *tables, *ends, 0, 0, *crypto], np.int64)
    if loaded.lay_out(shared.ctypes.data):
        raise MemoryError(f"no memory to read adapter {file.adapter!r}")
    for number in np.flatnonzero(states != _DONE):
        _check(file, entries[number], int(states[number]), packed.dtype)
    hexadecimal = digests.tobytes().hex()
    return {entry.name: hexadecimal[64 * number : 64 * number + 64] for number, entry in enumerate(entries)}


def _check(file: Tensors, entry: Entry, state: int, dtype: torch.dtype) -> None:
    """Raise what `state` says; a tensor that was not looked at says nothing, another one has failed."""
    if state == _NOT_FINITE:
        raise not_finite(file.adapter, entry, dtype)
    if state == _SHORTER:
        raise AdapterFormatError(file.adapter, f"{entry.name} cannot be read: the file has become shorter")
    if state >= _FAILED:
        raise AdapterFormatError(file.adapter, f"{entry.name} cannot be read: {os.strerror(state - _FAILED)}")


@functools.cache
def _sha256() -> tuple[int, ...] | None:
    """Addresses of what digests, and what EVP_sha256() returns, of the OpenSSL that hashlib uses; None: it has none."""
    try:
        import _hashlib

        crypto = ctypes.CDLL(_hashlib.__file__)
        crypto.EVP_sha256.restype = ctypes.c_void_p
        calls = [ctypes.cast(getattr(crypto, name), ctypes.c_void_p).value for name in _CALLS]
        found = *calls, crypto.EVP_sha256()
    except (ImportError, AttributeError, OSError):
        return None
    return tuple(map(int, found)) if all(found) else None
