"""Convolutions that are products: a kernel that moves by its own size sees everything once."""

import math

from torch import Tensor, nn
from torch.nn import functional as F


class Patches(nn.Module):
    """Such a convolution as one product.

    Of bfloat16 in three dimensions cuDNN has no convolution, and of float32 it rounds to TF32.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        """`conv` for which `products` is true."""
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias  # [E, C, *kernel]
        self.kernel = conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, C, *sizes] -> [N, E, *(size / kernel, rounded down)]."""
        counts = [size // part for size, part in zip(x.shape[2:], self.kernel)]
        for axis, (count, part) in enumerate(zip(counts, self.kernel), start=2):
            x = x.narrow(axis, 0, count * part)
        whole = x.reshape(*x.shape[:2], *(size for pair in zip(counts, self.kernel) for size in pair))
        dims = len(counts)
        places, inner = [2 + 2 * axis for axis in range(dims)], [3 + 2 * axis for axis in range(dims)]
        rows = whole.permute(0, *places, 1, *inner).reshape(-1, x.shape[1] * math.prod(self.kernel))
        y = F.linear(rows, self.weight.flatten(1), self.bias)
        return y.view(len(x), *counts, -1).movedim(-1, 1)


def products(module: nn.Module) -> bool:
    """Whether `module` is a convolution that `Patches` computes."""
    return (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.kernel_size == module.stride
        and module.padding in ("valid", (0,) * len(module.kernel_size))
        and set(module.dilation) == {1}
        and module.groups == 1
    )
