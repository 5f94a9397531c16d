"""Any decoder that transformers can build, by its own code: with our attention, KV cache and Linears in it.

What the code does is not read but rehearsed: it runs once, and what it asks of attention and gives to its projections
is noted. What does not fit is refused by name. `proof.py` then holds the result against the model as it was.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from aiolora.errors import UnsupportedModelError
from aiolora.models.adopted import (
    PROBE,
    Completed,
    Given,
    Rows,
    Through,
    embedding_of,
    layer_of,
    linear_of,
    projects,
    replace,
    scaled,
)
from aiolora.models.attends import MASK, OURS, REHEARSED, Attends, Rehearsal, Seat, Turn, seat
from aiolora.models.head import amended, known
from aiolora.models.inputs import HeadInputs, LayerKV, StepInputs
from aiolora.models.layers import Embedding, Linear, Norm

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
        tied = head.weight is embedding.weight
        output, attends, rows = rehearse(trunk, embedding, min(max_positions, MASKED))
        names = {module: name for name, module in causal.named_modules()}
        self.embed: Embedding = embedding_of(names[embedding], embedding)
        self._scale = scale
        head_name = names[head]
        self.head: Linear = linear_of(head_name, head, device)
        if tied:
            self.head.weight = self.embed.weight
        self._linears: list[tuple[int, Linear]] = []
        prefix = names[trunk]
        for name in rows:
            module = trunk.get_submodule(name)
            full = f"{prefix}.{name}"
            linear = linear_of(full, module, device)
            replace(trunk, name, Completed(linear, self.turn))
            self._linears.append((layer_of(full), linear))
        for module, how in attends.items():
            unrotated = torch.cat((torch.ones(1, how.width // 2), torch.zeros(1, how.width // 2)), dim=1)
            seat(module, Seat(how, self.turn, unrotated.to(device)))
        answer_by(causal, OURS)
        self.trunk = trunk
        replace(causal, prefix, Given(output))
        replace(causal, head_name, Through(self.head.weight))
        self._tail: PreTrainedModel | None = causal
        vocabulary = self.head.weight.shape[0]
        if not on_meta and not self._tail_matters():
            self._tail = None
        self.config = _sizes(tuple(attends.values()), vocabulary, max_positions, tied)

    def forward(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`; keys and values go into `kv`."""
        embeds = step.routing if step.embeds else None
        x = self.embed(step.tokens, step.previous, embeds, step.own_embeddings)
        if self._scale != 1:
            x = x * self._scale
        with self._runs(step, kv):
            positions = step.positions.long().unsqueeze(0)
            out = self.trunk(inputs_embeds=x.unsqueeze(0), position_ids=positions, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden if step.logits_at is None else hidden[step.logits_at]

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        return self._scored(self.head(hidden, None).y)

    def amended(self, logits: Tensor, hidden: Tensor, adapters: HeadInputs | None) -> Tensor:
        """`logits` with what adapters do to the head: of its product, before what transformers does to that."""
        if adapters is None:
            return logits
        if adapters.own is not None or adapters.low_rank or adapters.widest > logits.shape[1]:
            logits = self._scored(amended(self.head(hidden, None).y.float(), hidden, adapters, self.head.site))
        return known(logits, adapters, self.config.vocab_size)

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of all that take adapters, but for the head."""
        yield from self._linears

    def norms(self) -> Iterator[Norm]:
        """None: transformers' norms are of many kinds, and none of ours."""
        yield from ()

    @contextmanager
    def _runs(self, step: StepInputs, kv: Sequence[LayerKV]) -> Iterator[None]:
        turn = self.turn
        turn.step, turn.kv, turn.still = step, kv, torch.zeros_like(step.positions)
        try:
            yield
        finally:
            turn.step, turn.kv = None, ()

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
        return not torch.equal(logits, product)


def trunk_of(causal: PreTrainedModel) -> nn.Module:
    """What makes hidden states of vectors, the last norm included."""
    trunk: nn.Module = causal.get_decoder()
    return causal.get_submodule("model") if trunk is causal else trunk


def rehearse(
    trunk: nn.Module, embedding: nn.Embedding, longest: int
) -> tuple[type[ModelOutput], dict[nn.Module, Attends], list[str]]:
    """What `trunk` returns, how each attention module in it attends, and which projections see a row a token.

    Raises `UnsupportedModelError`; `NotImplementedError` where that shows in values only, and there are none ("meta").
    """
    weight = embedding.weight
    rehearsal = Rehearsal(longest)
    modules = list(trunk.modules())
    if conv := next((type(m).__name__ for m in modules if isinstance(m, nn.modules.conv._ConvNd)), None):
        raise UnsupportedModelError(f"{conv} mixes tokens outside of attention: that is a state beside keys and values")
    for module in modules:
        seat(module, rehearsal)
    answer_by(trunk, REHEARSED)
    rows = Rows(trunk)
    try:
        x = weight.new_zeros((1, PROBE, weight.shape[1]))
        positions = torch.arange(PROBE, device=weight.device).unsqueeze(0)
        nothing_padded = torch.ones_like(positions)  # else it looks whether positions are those of one sequence
        with torch.no_grad():
            output = trunk(inputs_embeds=x, attention_mask=nothing_padded, position_ids=positions, use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        if isinstance(error, NotImplementedError):
            raise
        if weight.is_meta and "meta" in str(error):
            raise NotImplementedError("its shapes depend on values") from error
        raise UnsupportedModelError(
            "its layers compute attention themselves, not through transformers' attention interface"
            if MASK in str(error)
            else f"its code does not run on vectors and positions alone: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module in modules:
            seat(module, None)
        found = list(rows.done())
    if not rehearsal.found:
        raise UnsupportedModelError("its layers do not attend through transformers' attention interface")
    return type(output), rehearsal.found, found


def answer_by(model: nn.Module, name: str) -> None:
    """Let every attention layer in `model` call the function registered as `name`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name


def _sizes(attends: tuple[Attends, ...], vocabulary: int, max_positions: int, tied: bool) -> Sizes:
    shapes = {(how.kv_heads, how.width) for how in attends}
    heads, width = shapes.pop() if len(shapes) == 1 else (1, max(heads * width for heads, width in shapes))
    return Sizes(vocabulary, len(attends), heads, width, max_positions, tied)
