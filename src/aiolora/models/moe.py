"""A mixture of experts in the place of the MLP: a gate, routed experts, and perhaps one that all tokens share."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aiolora.models.layers import Linear
from aiolora.ops.activation import gated
from aiolora.ops.experts import ExpertSite, choose, gated_by, summed_by
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
        """`path`: of the experts. In a checkpoint all of them are `fused`, or each has `parts` (-> out-features)."""
        super().__init__()
        self.path = path
        self.fused = f"{path}.{fused}"
        self.experts, self.top_k = config.experts, config.top_k
        self.inputs = inputs
        self.parts = {f"{path}.{part}": outputs for part, outputs in parts.items()}
        shape = (config.experts, sum(parts.values()), inputs)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
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


class MoE(nn.Module):
    """Each token through the experts that its gate chooses."""

    def __init__(self, layer: str, hidden: int, config: MoEConfig, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        path, inner, shared = f"{layer}.{config.path}", config.inner, config.shared
        self.config = config

        def linear(inputs: int, **parts: int) -> Linear:
            named = {f"{path}.{name.replace('__', '.')}": outputs for name, outputs in parts.items()}
            return Linear(inputs, named, bias=False, dtype=dtype, device=device)

        def expert_linear(fused: str, inputs: int, **parts: int) -> ExpertLinear:
            return ExpertLinear(f"{path}.experts", fused, config, inputs, parts, dtype, device)

        self.gate = linear(hidden, **{config.gate: config.experts})
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
        inner = gated_by(x, self.gate_up.weight, chosen, self.gate_up.site, routing)
        y = summed_by(inner, self.down.weight, chosen, self.down.site, routing)
        if self.shared_gate is not None:
            shared = completed(self.shared_down(gated(self.shared_gate_up(x, routing)), routing))
            y = y + completed(self.shared_gate(x, routing)).sigmoid() * shared
        return Partial(y)
