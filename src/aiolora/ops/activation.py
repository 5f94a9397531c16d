"""The gated activation of the MLP: silu(gate) * up (SwiGLU, Shazeer, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.linear import Partial, paid
from aiolora.ops.registration import define


def silu_mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """silu(gate) * up of a Partial's value [T, 2 I] = (gate, up): [T, I] in y's dtype."""
    gate, up = paid(y, bias, owed, where).to(y.dtype).chunk(2, dim=-1)
    return F.silu(gate) * up


def _silu_mul_fake(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[1] // 2))


def _silu_mul_cpu(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    out = None if owed else native.silu_mul(y, bias)
    return silu_mul(y, bias, owed, where) if out is None else out


silu_mul_op = define(silu_mul, fake=_silu_mul_fake, cuda="aiolora.ops.kernels.activation", cpu=_silu_mul_cpu)


def gated(partial: Partial) -> Tensor:
    """Pay what gate and up owe and apply silu(gate) * up."""
    return silu_mul_op(*partial.flat)
