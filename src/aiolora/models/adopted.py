"""Modules of ours for those of transformers: what projects, embeds or scores tokens goes where adapters reach it."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

from aiolora.models.layers import Embedding, Linear

PROBE = 7  # tokens of a rehearsal: a Linear that sees another number of rows has no token a row


class Given(nn.Module):
    """In the trunk's place: what it is called with is what it found, in an output of the trunk's own type."""

    def __init__(self, output: type[ModelOutput]) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> ModelOutput:
        return self.output(last_hidden_state=inputs_embeds)


class Through(nn.Module):
    """In the head's place: returns its input. `weight` is the head's, for who asks for its dtype."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x


def projects(module: nn.Module) -> bool:
    """Whether it is one of torch's Linears, GPT-2's or Falcon's, and not something that computes otherwise."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ == "FalconLinear"


def linear_of(name: str, module: nn.Module, device: str) -> Linear:
    """`module`, which `projects`, as ours, with its own weights where they lie as ours do."""
    own: nn.Parameter = module.weight  # type: ignore[assignment]
    if isinstance(module, Conv1D):
        own = nn.Parameter(own.detach().T.contiguous(), requires_grad=False)
    outputs, inputs = own.shape
    bias = module.bias
    linear = Linear(inputs, {name: outputs}, bias=bias is not None, dtype=own.dtype, device=device, weight=own)
    if isinstance(bias, nn.Parameter):
        linear.bias = bias
    return linear


def embedding_of(name: str, module: nn.Embedding) -> Embedding:
    """`module` as ours, with its own weight."""
    embedding = Embedding(name, *module.weight.shape, dtype=module.weight.dtype, device="meta")
    embedding.weight = module.weight  # type: ignore[assignment]  # a Parameter
    return embedding


class Rows:
    """Which projections of a model see a token a row, each once a step: those can take adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: dict[str, list[int]] = {}
        self._hooks = [
            module.register_forward_pre_hook(self._note(name))
            for name, module in model.named_modules()
            if projects(module) and not re.search(r"\bexperts\.\d+\.", name)  # they see whom a router sends
        ]

    def _note(self, name: str):  # type: ignore[no-untyped-def]
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._calls.setdefault(name, []).append(args[0].shape[:-1].numel())

        return note

    def done(self) -> Iterator[str]:
        """Stop looking: their names."""
        for hook in self._hooks:
            hook.remove()
        yield from (name for name, rows in self._calls.items() if set(rows) == {PROBE})


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place `name`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def scaled(module: nn.Module, device: torch.device) -> float | None:
    """What the embedding `module` multiplies its vectors by; None: it does something else."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    ids = torch.arange(min(4, module.num_embeddings), device=device)  # type: ignore[arg-type, type-var]
    vectors, plain = module(ids), nn.functional.embedding(ids, module.weight)  # type: ignore[arg-type]
    factor = getattr(module, "embed_scale", None)
    if factor is None or not torch.equal(vectors, plain * torch.as_tensor(factor).to(plain.dtype)):
        return None
    return float(factor)
