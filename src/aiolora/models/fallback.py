"""Any decoder that transformers can build, by its own code: with our attention, KV cache and Linears in it.

What the code does is not read but rehearsed: it runs once, and what it asks of attention and gives to its projections
is noted. What does not fit is refused by name. `proof.py` then holds the result against the model as it was.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aiolora.errors import UnsupportedModelError
from aiolora.models.adopted import (
    Given,
    Through,
    embedding_of,
    linear_of,
    projects,
    replace,
    scaled,
)
from aiolora.models.attends import Holds, Turn, answer_by
from aiolora.models.head import amended, known
from aiolora.models.inputs import HeadInputs, LayerKV, StepInputs
from aiolora.models.layers import Completed, Embedding, Linear, Norm, layer_of
from aiolora.models.moe import ExpertLinear
from aiolora.models.one_by_one import OneByOne
from aiolora.models.together import Together

MASKED = 1 << 17  # positions over which attention masks are compared, at most


@dataclass(frozen=True)
class Sizes:
    """See `model.ModelConfig`. Layers whose heads differ share caches of the largest."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tied_head: bool
    rope_sections: tuple[int, ...] = ()  # each of its tokens stands at one number


class Fallback(nn.Module):
    """A model of transformers that serves as `model.Model`.

    Adapters reach the embedding, the head and every projection that runs once a token; norms are the base's.
    """

    capturable = False  # transformers' code may look at values on the host

    def __init__(self, causal: PreTrainedModel, *, max_positions: int, device: str) -> None:
        """Takes `causal`, with weights in place or on "meta", apart. Raises `UnsupportedModelError`."""
        super().__init__()
        causal.eval().requires_grad_(False)
        self.turn = Turn()
        trunk, embedding, head = trunk_of(causal), causal.get_input_embeddings(), causal.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or head is None or not projects(head):
            raise UnsupportedModelError("its embedding or its head is not a plain one")
        on_meta = embedding.weight.is_meta
        scale = 1.0 if on_meta else scaled(embedding, embedding.weight.device)
        if scale is None:
            raise UnsupportedModelError(f"its embedding {type(embedding).__name__} does more than to look up vectors")
        tied, width = head.weight is embedding.weight, embedding.weight.shape[1]
        self.manner = rehearse(trunk, embedding, min(max_positions, MASKED))
        names = {module: name for name, module in causal.named_modules()}
        self.embed: Embedding = embedding_of(names[embedding], embedding)
        self._scale = scale
        head_name = names[head]
        self.head: Linear = linear_of(head_name, head, device)
        if tied:
            self.head.weight = self.embed.weight
        if self.head.inputs != width:
            raise UnsupportedModelError(f"its embedding is {width} wide and its head {self.head.inputs}")
        self._linears: list[tuple[int, Linear]] = []
        prefix = names[trunk]
        for name in self.manner.rows:
            module = trunk.get_submodule(name)
            full = f"{prefix}.{name}"
            linear = linear_of(full, module, device)
            replace(trunk, name, Completed(linear, self.turn.of_rows))
            self._linears.append((layer_of(full), linear))
        self.manner.begin(trunk, self.turn, device)
        self.trunk = trunk
        replace(causal, prefix, Given(self.manner.output))
        replace(causal, head_name, Through(self.head.weight))
        self._tail: PreTrainedModel | None = causal
        vocabulary = self.head.weight.shape[0]
        if not self._tail_matters():
            self._tail = None
        self.config = _sizes(self.manner.holds, vocabulary, max_positions, tied)

    def forward(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`; keys and values go into `kv`."""
        embeds = step.routing if step.embeds else None
        x = self.embed(step.tokens, step.previous, embeds, step.own_embeddings)
        if self._scale != 1:
            x = x * self._scale
        with self.turn.of(step, kv):
            hidden = self.manner.run(self.trunk, x, self.turn)
        return hidden if step.logits_at is None else hidden[step.logits_at]

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        return self._scored(self.head(hidden, None).y)

    def amended(self, logits: Tensor, hidden: Tensor, adapters: HeadInputs | None) -> Tensor:
        """`logits` with what adapters do to the head: of its product, before what transformers does to that."""
        if adapters is None:
            return logits
        if adapters.own is not None or adapters.low_rank or adapters.widest > logits.shape[1]:
            product = self.head(hidden, None).y
            product = product if product.is_cuda else product.float()
            logits = self._scored(amended(product, hidden, adapters, self.head.site))
        return known(logits, adapters, self.config.vocab_size)

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of all that take adapters, but for the head."""
        yield from self._linears

    def experts(self) -> Iterator[tuple[int, ExpertLinear]]:
        """None: what transformers routes to experts is no row a token."""
        yield from ()

    def named(self, name: str) -> str:
        """As it is: transformers renames what it loads."""
        return name

    def norms(self) -> Iterator[Norm]:
        """None: transformers' norms are of many kinds, and none of ours."""
        yield from ()

    def _scored(self, product: Tensor) -> Tensor:
        """Logits [S, V] of the head's product [S, V]: its bias, and what the model's own code does to scores."""
        if self.head.bias is not None:
            bias = self.head.bias
            product = product + nn.functional.pad(bias, (0, product.shape[1] - len(bias)))
        if self._tail is not None:
            product = self._tail(inputs_embeds=product.unsqueeze(0), use_cache=False).logits[0]
        return product if product.is_cuda else product.float()

    def _tail_matters(self) -> bool:
        """Whether it changes anything; raises `UnsupportedModelError` where the head is more than a projection."""
        assert self._tail is not None
        weight = self.head.weight
        product = torch.linspace(-40, 40, 3 * len(weight), device=weight.device).view(1, 3, -1).to(weight.dtype)
        try:
            logits = self._tail(inputs_embeds=product, use_cache=False).logits
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"its head is more than a projection: {error}") from error
        if logits.shape != product.shape:
            raise UnsupportedModelError("its head is more than a projection")
        return weight.is_meta or not torch.equal(logits, product)


def trunk_of(causal: PreTrainedModel) -> nn.Module:
    """What makes hidden states of vectors, the last norm included."""
    trunk: nn.Module = causal.get_decoder()
    return causal.get_submodule("model") if trunk is causal else trunk


def rehearse(trunk: nn.Module, embedding: nn.Embedding, longest: int) -> Together | OneByOne:
    """All sequences of a step at once where its attention is transformers' interface, else one after the other.

    Raises `UnsupportedModelError` if it runs neither way; `NotImplementedError` where that shows in values only, and
    there are none ("meta").
    """
    if conv := next((type(m).__name__ for m in trunk.modules() if isinstance(m, nn.modules.conv._ConvNd)), None):
        raise UnsupportedModelError(f"{conv} mixes tokens outside of attention: that is a state beside keys and values")
    try:
        return Together.rehearsed(trunk, embedding.weight, longest)
    except UnsupportedModelError as why:
        answer_by(trunk, "eager")
        try:
            return OneByOne.rehearsed(trunk, embedding.weight, str(why))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{why}; and one sequence after the other: {error}") from error


def _sizes(holds: Sequence[Holds], vocabulary: int, max_positions: int, tied: bool) -> Sizes:
    shapes = {(one.kv_heads, one.width) for one in holds}
    heads, width = shapes.pop() if len(shapes) == 1 else (1, max(heads * width for heads, width in shapes))
    return Sizes(vocabulary, len(holds), heads, width, max_positions, tied)
