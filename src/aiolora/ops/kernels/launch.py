"""What every launch shares: programmatic dependent launch, and sizes of the card."""

import functools

import torch
import triton
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
PDL: bool = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""A kernel is set up while the one before it ends, and waits before it reads (Hopper on)."""


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; 4 in the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two: the extents of Triton's blocks."""
    return int(triton.next_power_of_2(n))
