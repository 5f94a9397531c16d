"""Which adapter goes when room is needed: one rule for both levels. Pure."""

FROM_DISK = (
    8  # a byte read from an NVMe disk (6 GB/s, and checked again) against one copied out of host memory (50 GB/s)
)


def worth(cost: float, age: int) -> float:
    """Recent use times the cost to bring it back; who is worth least goes first.

    `cost`: of bringing it back, for as much room as it takes. Host memory counts adapters, so there it is the bytes to
    be read; the device counts bytes, so there it is 1, or `FROM_DISK` where host memory has it no more. `age`: uses of
    any adapter since its own last one, at least 1. At equal cost, the least recently used goes first.
    """
    return cost / age
