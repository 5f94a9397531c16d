"""How near a kernel must come to float64."""

import torch
from torch import Tensor

SHARE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_near(out: Tensor, exact: Tensor) -> None:
    """|out - exact| / |exact| by norm, within what the dtype of `out` allows; NaN never passes."""
    assert out.shape == exact.shape
    error = (out.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
    assert error <= SHARE[out.dtype], f"relative error {error:.2e}"
