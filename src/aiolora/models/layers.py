"""The pieces a network is made of. Each knows the names its tensors have in a checkpoint."""

import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiolora.ops import native
from aiolora.ops.blocks import Blocks, OwnNorms, own_norm_op
from aiolora.ops.embedding import embed_op, embed_own_op, embed_shrink_op
from aiolora.ops.linear import Partial, Routing, Site, complete_op, completed, linear
from aiolora.ops.norm import norm_after, rms_norm_op


class Linear(nn.Module):
    """A projection, or several of the same input fused along the out-features. Returns a Partial: see `ops.linear`."""

    def __init__(
        self,
        inputs: int,
        parts: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: str,
        weight: nn.Parameter | None = None,
    ) -> None:
        """`parts`: checkpoint name of each projection -> its out-features, in the order they are fused.

        `weight`: share another module's (a tied head).
        """
        super().__init__()
        self.inputs = inputs
        self.parts = parts
        outputs = sum(parts.values())
        self.weight = _parameter((outputs, inputs), dtype, device) if weight is None else weight
        self.bias = _parameter((outputs,), dtype, device) if bias else None
        self.site: Site | None = None
        self._whole = native.serves(dtype, torch.device(device))

    def forward(self, x: Tensor, routing: Routing | None) -> Partial:
        """`x` [T, K] -> the Partial of [T, N]."""
        return linear(x, self.weight, self.bias, self.site, routing, whole=self._whole)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        for name, low, high in self.slices():
            yield f"{name}.weight", self.weight[low:high]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[low:high]

    def slices(self) -> Iterator[tuple[str, int, int]]:
        """(checkpoint name, first, end) of each fused projection among the out-features."""
        low = 0
        for name, outputs in self.parts.items():
            yield name, low, low + outputs
            low += outputs


class Completed(nn.Module):
    """A Linear of ours where transformers has one of torch's: what it owes is paid before anybody reads it."""

    def __init__(self, linear: Linear, routing: Callable[[int], Routing | None]) -> None:
        """`routing`: of so many rows of what is under way. Modules of transformers pass no such thing on."""
        super().__init__()
        self.linear = linear
        self._routing = routing
        self.in_features, self.out_features = linear.inputs, sum(linear.parts.values())

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return completed(self.linear(rows, self._routing(len(rows)))).view(*x.shape[:-1], -1)


class Embedding(nn.Module):
    """Token id -> vector; `weight` [V, H] may also serve as the head."""

    def __init__(self, name: str, vocab: int, hidden: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.name = name
        self.weight = _parameter((vocab, hidden), dtype, device)
        self.site: Site | None = None

    def forward(self, tokens: Tensor, previous: Tensor, routing: Routing | None, own: Blocks | None) -> Tensor:
        """`tokens` [T], of which negative ones stand for `previous` [P]: see `ops.embedding`.

        `routing`: None where no adapter has a low-rank share in it.
        """
        x = embed_op(tokens, previous, self.weight)
        if own is not None:
            x = embed_own_op(x, tokens, previous, *own)
        if self.site is None or routing is None:
            return x
        tables = routing.pages, routing.scales, routing.owners
        h = embed_shrink_op(tokens, previous, self.site.a, *tables, self.site.kind)
        return complete_op(*Partial(x, None, h, self.site, routing).flat)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.weight", self.weight


class Norm(nn.Module):
    """RMSNorm, of x or of a sum; `number`: which it is in `ops.blocks.OwnNorms`, -1: adapters bring none of it."""

    def __init__(
        self, name: str, size: int, eps: float, *, offset: float = 0.0, dtype: torch.dtype, device: str
    ) -> None:
        """`offset`: what is added to the weight (`ops.norm.rms_norm`)."""
        super().__init__()
        self.name = name
        self.eps = eps
        self.offset = offset
        self.number = -1
        self.weight = _parameter((size,), dtype, device)

    def forward(self, x: Tensor, own: OwnNorms | None = None) -> Tensor:
        """The norm of `x` [T, H], for some tokens with an adapter's weight."""
        return self._owned(rms_norm_op(x, self.weight, self.eps, self.offset), x, own)

    def joined(
        self, partial: Partial, residual: Tensor, own: OwnNorms | None, inner: "Norm | None" = None
    ) -> tuple[Tensor, Tensor]:
        """(its norm, the sum) of `residual` [T, H] and what `partial` comes to, that under the norm `inner`."""
        weight = None if inner is None else inner.weight
        x, residual = norm_after(partial, residual, self.weight, self.eps, self.offset, weight)
        return self._owned(x, residual, own), residual

    def _owned(self, x: Tensor, residual: Tensor, own: OwnNorms | None) -> Tensor:
        if own is None or self.number < 0:
            return x
        return own_norm_op(x, residual, self.weight, *own, self.number, self.eps, self.offset)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.weight", self.weight


class LayerNorm(nn.Module):
    """LayerNorm with a bias (Ba et al., arXiv 1607.06450) in the place of a `Norm`; adapters bring none of it."""

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = _parameter((size,), dtype, device)
        self.bias = _parameter((size,), dtype, device)

    def forward(self, x: Tensor, own: OwnNorms | None = None) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def joined(
        self, partial: Partial, residual: Tensor, own: OwnNorms | None, inner: Norm | None = None
    ) -> tuple[Tensor, Tensor]:
        residual = added(partial, residual, inner)
        return self(residual), residual

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.name}.weight", self.weight
        yield f"{self.name}.bias", self.bias


class Sinks(nn.Module):
    """The score of a key without value that every query of a head sees (`ops.attention`): `weight` [H] float32."""

    def __init__(self, name: str, heads: int, *, device: str) -> None:
        super().__init__()
        self.name = name
        self.weight = _parameter((heads,), torch.float32, device)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        yield self.name, self.weight


def added(partial: Partial, residual: Tensor, inner: Norm | None) -> Tensor:
    """`residual` [T, H] and what `partial` comes to, that under the norm `inner`."""
    value = completed(partial)
    return residual + (value if inner is None else inner(value))


class Mlp(nn.Module):
    """Into the inner features (gate and up fused, or one projection), the activation, and back."""

    def __init__(self, gate_up: Linear, down: Linear, activate: Callable[[Partial], Tensor]) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self._activate = activate

    def forward(self, x: Tensor, routing: Routing | None) -> Partial:
        """`x` [T, H] -> the Partial of [T, H]."""
        partial: Partial = self.down(self._activate(self.gate_up(x, routing)), routing)
        return partial


def layer_of(name: str) -> int:
    """The number of the layer that the module `name` is in; 0 for those outside of all."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
