"""Activations of the MLP: silu(gate) * up, gelu(gate) * up (SwiGLU, GeGLU: Shazeer, arXiv 2002.05202), gelu alone."""

import torch.nn.functional as F
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.linear import Partial, completed, paid
from aiolora.ops.registration import define


def silu_mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """silu(gate) * up of a Partial's value [T, 2 I] = (gate, up): [T, I] in y's dtype."""
    gate, up = paid(y, bias, owed, where).to(y.dtype).chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """The same with GELU, as tanh approximates it (Hendrycks and Gimpel, arXiv 1606.08415)."""
    gate, up = paid(y, bias, owed, where).to(y.dtype).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _fake(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[1] // 2))


def _silu_mul_cpu(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    out = None if owed else native.gate_mul(y, bias, gelu=False)
    return silu_mul(y, bias, owed, where) if out is None else out


def _gelu_mul_cpu(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    out = None if owed else native.gate_mul(y, bias, gelu=True)
    return gelu_mul(y, bias, owed, where) if out is None else out


_KERNELS = "aiolora.ops.kernels.activation"
silu_mul_op = define(silu_mul, fake=_fake, cuda=_KERNELS, cpu=_silu_mul_cpu)
gelu_mul_op = define(gelu_mul, fake=_fake, cuda=_KERNELS, cpu=_gelu_mul_cpu)


def gated(partial: Partial) -> Tensor:
    """Pay what gate and up owe and apply silu(gate) * up."""
    return silu_mul_op(*partial.flat)


def gelu_gated(partial: Partial) -> Tensor:
    """Pay what gate and up owe and apply gelu(gate) * up."""
    return gelu_mul_op(*partial.flat)


def gelu(partial: Partial) -> Tensor:
    """Pay what one projection owes and apply gelu, as tanh approximates it."""
    return F.gelu(completed(partial), approximate="tanh")
