"""From the host to a device without waiting for what the device does."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: str | torch.device) -> Tensor:
    """`tensor` of the host on `device`, there once its current stream has come so far; itself where it is there.

    A copy out of memory that is not locked would first wait for all that the stream has before it: the step before.
    """
    target = torch.device(device)
    if target.type != "cuda":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)  # torch keeps the locked copy until it was read
