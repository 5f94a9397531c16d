"""A mixture of experts in the place of the MLP: a gate, routed experts, and perhaps one that all tokens share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiolora.models.layers import Linear
from aiolora.models.mxfp4 import BLOCKS
from aiolora.ops.activation import gated
from aiolora.ops.experts import SILU, ExpertSite, Gate, choose, gated_by, summed_by
from aiolora.ops.linear import Partial, Routing, completed


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and switches of a family's experts."""

    experts: int
    top_k: int
    inner: int  # of one expert
    normalised: bool  # weights of the chosen experts sum to one
    layers: frozenset[int]  # the others have a plain MLP
    shared: int = 0  # inner size of the expert that all tokens go through, behind a gate of its own; 0: there is none
    path: str = "mlp"  # of the block in a layer
    gate: str = "gate"
    bias: bool = False  # of the gate and of every expert
    activation: Gate = SILU
    turned: bool = False  # fused in a checkpoint they are [E, K, N], gate and up column by column in turn (gpt-oss)


class Stored(NamedTuple):
    """A tensor of a checkpoint that holds all experts of a layer."""

    shape: tuple[int, ...]
    view: Tensor  # of the parameter that it fills, of as many elements in the same order
    parts: list[str]  # names of the tensors that other checkpoints have in its place


class ExpertLinear(nn.Module):
    """A projection of every expert of a layer, or several of the same input fused along the out-features."""

    def __init__(
        self,
        path: str,
        fused: str,
        config: MoEConfig,
        inputs: int,
        parts: dict[str, int],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """`path`: of the experts. In a checkpoint all of them are `fused`, or each has `parts` (-> out-features).

        `turned`: as in `MoEConfig`.
        """
        super().__init__()
        self.path = path
        self.fused = f"{path}.{fused}"
        self.experts, self.top_k = config.experts, config.top_k
        self.inputs = inputs
        self.parts = {f"{path}.{part}": outputs for part, outputs in parts.items()}
        self.turned = config.turned
        outputs = sum(parts.values())

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = parameter(config.experts, outputs, inputs)
        self.bias = parameter(config.experts, outputs) if config.bias else None
        self.site: ExpertSite | None = None

    def slices(self) -> Iterator[tuple[str, int, int]]:
        """(name without the expert's number, first, end) of each fused projection among the out-features."""
        low = 0
        for name, outputs in self.parts.items():
            yield name, low, low + outputs
            low += outputs

    def of(self, part: str, expert: int) -> str:
        """The name in a checkpoint of one expert's `part`."""
        return f"{self.path}.{expert}.{part.removeprefix(f'{self.path}.')}"

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        for part, low, high in self.slices():
            for expert in range(self.experts):
                yield f"{self.of(part, expert)}.weight", self.weight[expert, low:high]
                if self.bias is not None:
                    yield f"{self.of(part, expert)}.bias", self.bias[expert, low:high]

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """(name in a checkpoint, what it holds) of the fused tensors, once they are unpacked (`mxfp4`)."""
        names = [name for name, _ in self.checkpoint()]
        for name, weight in ((self.fused, self.weight), (f"{self.fused}_bias", self.bias)):
            if weight is None:
                continue
            parts = [part for part in names if part.endswith(".bias") == (weight is self.bias)]
            shape, view = tuple(weight.shape), weight.data
            if self.turned:
                in_turn = weight.data.view(shape[0], len(self.parts), -1, *shape[2:]).transpose(1, 2)
                if weight is self.weight:
                    yield f"{name}{BLOCKS}", Stored(shape, in_turn, parts)
                shape, view = (shape[0], *shape[:0:-1]), in_turn.movedim((1, 2), (-2, -1))
            yield name, Stored(shape, view, parts)


class MoE(nn.Module):
    """Each token through the experts that its gate chooses."""

    def __init__(self, layer: str, hidden: int, config: MoEConfig, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        path, inner, shared = f"{layer}.{config.path}", config.inner, config.shared
        self.config = config

        def linear(inputs: int, *, bias: bool = False, **parts: int) -> Linear:
            named = {f"{path}.{name.replace('__', '.')}": outputs for name, outputs in parts.items()}
            return Linear(inputs, named, bias=bias, dtype=dtype, device=device)

        def expert_linear(fused: str, inputs: int, **parts: int) -> ExpertLinear:
            return ExpertLinear(f"{path}.experts", fused, config, inputs, parts, dtype, device)

        self.gate = linear(hidden, bias=config.bias, **{config.gate: config.experts})
        self.gate_up = expert_linear("gate_up_proj", hidden, gate_proj=inner, up_proj=inner)
        self.down = expert_linear("down_proj", inner, down_proj=hidden)
        self.shared_gate: Linear | None = None
        if shared:
            self.shared_gate = linear(hidden, shared_expert_gate=1)
            self.shared_gate_up = linear(hidden, shared_expert__gate_proj=shared, shared_expert__up_proj=shared)
            self.shared_down = linear(shared, shared_expert__down_proj=hidden)

    def forward(self, x: Tensor, routing: Routing | None) -> Partial:
        """`x` [T, H] -> [T, H]."""
        chosen = choose(self.gate(x, routing), self.config.top_k, self.config.normalised)
        up, down = self.gate_up, self.down
        inner = gated_by(x, up.weight, up.bias, chosen, up.site, routing, self.config.activation)
        y = summed_by(inner, down.weight, down.bias, chosen, down.site, routing)
        if self.shared_gate is not None:
            shared = completed(self.shared_down(gated(self.shared_gate_up(x, routing)), routing))
            y = y + completed(self.shared_gate(x, routing)).sigmoid() * shared
        return Partial(y)
