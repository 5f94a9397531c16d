"""Tensors into rank pages by `ops/csrc/pages.c`, so that loading leaves the interpreter to those who serve.

A load of 448 tensors takes the interpreter's lock once a thread; by numpy, in `paging.py`, some thousand times and two
to three times as long (docs/performance.md).
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import Executor, wait
from typing import NamedTuple

import numpy as np
import torch

from aiolora.errors import AdapterFormatError
from aiolora.lora.tensorfile import Entry, Tensors, not_finite
from aiolora.ops.build_native import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NOT_FINITE, _SHORTER, _FAILED = 2, 3, 1000  # states, as in pages.c
_TENSOR = np.dtype(
    [
        *((name, np.int64) for name in ("fd", "at", "nbytes", "rows", "columns", "stored", "turned")),
        ("ratio", np.float64),
        *((name, np.int64) for name in ("pages", "count", "stride")),
        ("sha256", "V32"),
        ("state", np.int64),
    ]
)


class Placed(NamedTuple):
    """One tensor, and where in memory its ranks belong."""

    entry: Entry  # [r, K], or with `turned` [N, r]
    turned: bool
    ratio: float  # to be multiplied with
    pages: list[int]  # address of the first rank of each page
    stride: int  # bytes from one rank of a page to the next


def lay_out(
    file: Tensors, tensors: Sequence[Placed], dtype: torch.dtype, threads: Executor, count: int
) -> dict[Entry, str] | None:
    """Read, digest, check and lay out all `tensors`, by `count` of `threads`: the sha256 of each.

    None, and nothing done, where the compiled code does not serve. Raises `AdapterFormatError`.
    """
    loaded, crypto = library(), _sha256()
    if loaded is None or crypto is None or not {dtype, *(placed.entry.dtype for placed in tensors)} <= _TYPES.keys():
        return None
    pages = np.array([page for placed in tensors for page in placed.pages], np.int64)
    jobs, address = [], pages.ctypes.data
    for entry, turned, ratio, places, stride in tensors:
        stored = (*file.where(entry), entry.nbytes, *entry.shape, _TYPES[entry.dtype])
        jobs.append((*stored, turned, ratio, address, len(places), stride, bytes(32), 0))
        address += pages.itemsize * len(places)
    rows = np.array(jobs, _TENSOR)
    longest = max(placed.entry.nbytes for placed in tensors)
    shared = np.array([_TYPES[dtype], len(tensors), longest, rows.ctypes.data, 0, 0, *crypto], np.int64)
    done = [threads.submit(loaded.lay_out, shared.ctypes.data) for _ in range(min(count, len(tensors)))]
    wait(done)  # all of them, also after an error: they use the file
    if all(one.result() for one in done):
        raise MemoryError(f"no {longest} bytes to read adapter {file.adapter!r}")
    for row, placed in zip(rows, tensors):
        _check(file, placed.entry, int(row["state"]), dtype)
    return {placed.entry: row["sha256"].tobytes().hex() for row, placed in zip(rows, tensors)}


def _check(file: Tensors, entry: Entry, state: int, dtype: torch.dtype) -> None:
    """Raise what `state` says; a tensor that was not looked at says nothing, another one has failed."""
    if state == _NOT_FINITE:
        raise not_finite(file.adapter, entry, dtype)
    if state == _SHORTER:
        raise AdapterFormatError(file.adapter, f"{entry.name} cannot be read: the file has become shorter")
    if state >= _FAILED:
        raise AdapterFormatError(file.adapter, f"{entry.name} cannot be read: {os.strerror(state - _FAILED)}")


@functools.cache
def _sha256() -> tuple[int, int] | None:
    """Addresses of EVP_Digest and of what EVP_sha256() returns, of the OpenSSL that hashlib uses; None: it has none."""
    try:
        import _hashlib

        crypto = ctypes.CDLL(_hashlib.__file__)
        crypto.EVP_sha256.restype = ctypes.c_void_p
        address = ctypes.cast(crypto.EVP_Digest, ctypes.c_void_p).value
        algorithm = crypto.EVP_sha256()
    except (ImportError, AttributeError, OSError):
        return None
    return (address, algorithm) if address and algorithm else None
