"""What the engine and the adapters ask of a model, whoever wrote its mathematics."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import Parameter

from aiolora.models.inputs import HeadInputs, LayerKV, StepInputs
from aiolora.models.layers import Embedding, Linear, Norm
from aiolora.models.moe import ExpertLinear


class ModelConfig(Protocol):
    """The sizes that stores and limits are made of."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...  # that keep keys and values
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def tied_head(self) -> bool: ...
    @property
    def rope_sections(self) -> tuple[int, ...]: ...  # see `DecoderConfig`


class Model(Protocol):
    """A decoder: `Decoder` for the families, `Fallback` for what transformers computes.

    Engine thread only, but for the weights: loaders in other threads read them.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def embed(self) -> Embedding: ...
    @property
    def head(self) -> Linear: ...
    @property
    def capturable(self) -> bool: ...  # whether a step of it can be a CUDA graph

    def parameters(self) -> Iterator[Parameter]:
        """Each once."""
        ...

    def __call__(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`, ready for the head; keys and values go into `kv`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        ...

    def amended(self, logits: Tensor, hidden: Tensor, adapters: HeadInputs | None) -> Tensor:
        """`logits` [S, V] of `hidden` [S, H] with what adapters do to the head; may write to `logits`."""
        ...

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of all that take adapters, but for the head and routed experts."""
        ...

    def experts(self) -> Iterator[tuple[int, ExpertLinear]]:
        """(layer, projection) of routed experts that take adapters."""
        ...

    def named(self, name: str) -> str:
        """Our name of the module or tensor that other checkpoints, and adapters trained on them, call `name`."""
        ...

    def norms(self) -> Iterator[Norm]:
        """Those that adapters may bring anew, in the order of `ops.blocks.OwnNorms`."""
        ...
