"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone and behind a residual addition."""

import torch
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.linear import Partial, paid
from aiolora.ops.registration import define


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * (offset + weight) over the last axis: float32 inside, x's dtype outside.

    `offset`: 1 where weights are stored around zero (Gemma), which must not be rounded around one.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (offset + weight.float())).to(x.dtype) if offset else weight * wide.to(x.dtype)


def add_norm(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + value), residual + value) of a Partial's value: both [T, H] in residual's dtype.

    `inner` [H]: the weight of a norm of the value itself, before it is added (Gemma 2).
    """
    value = paid(y, bias, owed, where).to(residual.dtype)
    total = residual + (value if inner is None else rms_norm(value, inner, eps, offset))
    return rms_norm(total, weight, eps, offset), total


def _rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    out = native.rms_norm(x, weight, eps, offset)
    return rms_norm(x, weight, eps, offset) if out is None else out


def _add_norm_cpu(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if inner is not None:
        y, bias, owed, where = _rms_norm_cpu(paid(y, bias, owed, where).to(y.dtype), inner, eps, offset), None, [], []
    both = None if owed else native.add_norm(y, bias, residual, weight, eps, offset)
    return add_norm(y, bias, owed, where, residual, weight, eps, offset) if both is None else both


def _add_norm_fake(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


_KERNELS = "aiolora.ops.kernels.norm"
rms_norm_op = define(
    rms_norm, fake=lambda x, weight, eps, offset=0.0: torch.empty_like(x), cuda=_KERNELS, cpu=_rms_norm_cpu
)
add_norm_op = define(add_norm, fake=_add_norm_fake, cuda=_KERNELS, cpu=_add_norm_cpu)


def norm_after(
    partial: Partial, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, inner: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Pay what `partial` owes into the residual stream and normalise it: (normalised, residual)."""
    return add_norm_op(*partial.flat, residual, weight, eps, offset, inner)
