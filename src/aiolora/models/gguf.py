"""Reading a GGUF file (version 3) with NumPy: metadata, and tensors dequantised to float32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiolora.errors import WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}  # F32, F16, Q4_1, Q8_0: (values, bytes) of a block


class _Reader:
    """A cursor over little-endian bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.take("Q")
        raw = self._data[self.position : self.position + length]
        self.position += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.take("I"), self.take("Q")
            return [self.value(of) for _ in range(count)]
        return self.take(_SCALARS[kind])


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """(metadata, tensors): tensors as float32 in row-major order. F32, F16, Q4_1 and Q8_0 blocks are read.

    Raises `WeightsError` for another version or block type.
    """
    reader = _Reader(data)
    if data[:4] != b"GGUF":
        raise WeightsError("not a GGUF file: the first four bytes are not 'GGUF'")
    reader.position = 4
    if (version := reader.take("I")) != 3:
        raise WeightsError(f"GGUF version {version} is not read, only version 3")
    num_tensors, num_values = reader.take("Q"), reader.take("Q")
    metadata = {}
    for _ in range(num_values):
        key = reader.text()
        metadata[key] = reader.value(reader.take("I"))
    headers = []
    for _ in range(num_tensors):
        name = reader.text()
        dims = [reader.take("Q") for _ in range(reader.take("I"))]
        headers.append((name, dims, reader.take("I"), reader.take("Q")))
    align = metadata.get("general.alignment", 32)
    start = -(-reader.position // align) * align
    raw = np.frombuffer(data, np.uint8)
    tensors = {}
    for name, dims, kind, offset in headers:
        if kind not in _BLOCKS:
            raise WeightsError(f"GGUF tensor {name!r} has block type {kind}, which is not read (F32, F16, Q4_1, Q8_0)")
        values, size = _BLOCKS[kind]
        count = int(np.prod(dims))
        blocks = raw[start + offset : start + offset + count // values * size].reshape(-1, size)
        tensors[name] = _dequantise(blocks, kind).reshape(dims[::-1])  # GGUF lists the fastest dimension first
    return metadata, tensors


def _dequantise(blocks: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    if kind == 0:
        return blocks.reshape(-1).view(np.float32).copy()  # not a view of the read-only bytes
    if kind == 1:
        return blocks.reshape(-1).view(np.float16).astype(np.float32)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)  # low halves first
    return scale * nibbles + minimum
