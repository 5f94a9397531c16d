"""Staging: a step's numbers on their way to the device, in one copy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = Mapping[str, NDArray[Any]]  # int32 or float32, C order

_ALIGNMENT = 16  # elements between which fields begin: kernels are specialised on addresses that are multiples of 16


@dataclass(slots=True)
class _Buffer:
    """Host memory (pinned for a GPU) that the device may still be reading until `sent`."""

    tensor: Tensor  # [n] int32
    sent: torch.cuda.Event | None = None


class Staging:
    """As many buffers as are still being copied at a time, and one: nobody waits for a copy. Engine thread only.

    Two serve steps, which are laid out one ahead; the encoder of an image sends the routing of its rows besides.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._pinned = device.startswith("cuda")
        self._buffers: list[_Buffer] = []

    def send(self, numbers: Numbers) -> dict[str, Tensor]:
        """`numbers` as tensors of the device, copied behind what its current stream does; on the CPU not copied."""
        if self._device == "cpu":
            return {name: torch.from_numpy(array) for name, array in numbers.items()}
        return self.send_into(torch.empty(size_of(numbers), dtype=torch.int32, device=self._device), numbers)

    def send_into(self, target: Tensor, numbers: Numbers) -> dict[str, Tensor]:
        """The same into `target` [n] int32: fields of equal shapes come to lie at equal addresses."""
        buffer = self._next(size_of(numbers))
        host, tensors, end = buffer.tensor.numpy(), {}, 0
        for name, array in numbers.items():
            low = end
            host[low : low + array.size] = array.reshape(-1).view(np.int32)
            field = target[low : low + array.size].view(array.shape)
            tensors[name] = field if array.dtype == np.int32 else field.view(torch.float32)
            end = _aligned(low + array.size)
        target[:end].copy_(buffer.tensor[:end], non_blocking=True)
        if self._pinned:
            buffer.sent = buffer.sent or torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.sent.record()
        return tensors

    def _next(self, size: int) -> _Buffer:
        """The buffer that was sent longest ago if it is free again, else a new one; large enough."""
        oldest = self._buffers[0] if self._buffers else None
        free = oldest is not None and (oldest.sent is None or oldest.sent.query())  # type: ignore[no-untyped-call]
        buffer = self._buffers.pop(0) if free else _Buffer(torch.empty(0, dtype=torch.int32))
        self._buffers.append(buffer)
        if len(buffer.tensor) < size:
            buffer.tensor = torch.empty(2 * size, dtype=torch.int32, pin_memory=self._pinned)
        return buffer


def size_of(numbers: Numbers) -> int:
    """Elements of a target that takes `numbers`."""
    return sum(_aligned(array.size) for array in numbers.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
