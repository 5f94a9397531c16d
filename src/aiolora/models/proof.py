"""Whether a model of transformers with our parts in it is still that model: its logits before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aiolora.errors import UnsupportedModelError
from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.models.model import Model

_PAGE_SIZE = 4
_LENGTHS, _PAGES = (11, 6), ((5, 0, 3), (1, 4))  # of two sequences, and where their keys and values lie
_STEPS = (((0, 0, 5), (1, 0, 4)), ((1, 4, 1), (0, 5, 5)), ((0, 10, 1), (1, 5, 1)))  # (sequence, start, tokens)
# relative, in the 2-norm over all logits: rounding is below, another position, mask or neighbour far above
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16 = 0.2  # a router may send a token elsewhere by rounding: 0.09 was seen


@dataclass(frozen=True)
class Expected:
    """Logits of transformers' own attention for each sequence alone."""

    tokens: list[Tensor]
    logits: list[Tensor]  # [length, V]

    @classmethod
    def of(cls, causal: PreTrainedModel) -> "Expected":
        weight = causal.get_input_embeddings().weight
        draw = torch.Generator().manual_seed(0)
        tokens = [torch.randint(len(weight), (length,), generator=draw) for length in _LENGTHS]
        with torch.no_grad():
            logits = [causal(ids.to(weight.device).unsqueeze(0), use_cache=False).logits[0] for ids in tokens]
        return cls(tokens, logits)


def prove(model: Model, expected: Expected) -> None:
    """Run both sequences beside each other, in pieces, over scattered pages.

    Raises `UnsupportedModelError` where a logit depends on more, or on something else, than it did.
    """
    config, weight = model.config, model.embed.weight
    shape = (6, _PAGE_SIZE, config.num_kv_heads, config.head_dim)
    kv = [LayerKV(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_layers)]
    found: list[list[Tensor]] = [[] for _ in expected.tokens]
    with torch.inference_mode():
        for runs in _STEPS:
            logits = model.logits(model(_step(expected.tokens, runs, str(weight.device)), kv))
            for (sequence, _, _), part in zip(runs, torch.split(logits, [count for _, _, count in runs])):
                found[sequence].append(part)
    ours, theirs = (torch.cat(some).float() for some in ([p for f in found for p in f], expected.logits))
    apart = float((ours - theirs).norm() / (theirs - theirs.mean()).norm().clamp(min=1e-9))
    if not apart < _TOLERANCE.get(weight.dtype, _TOLERANCE_16):
        raise UnsupportedModelError(
            f"its logits are not the same once sequences share a step (apart by {apart:.2g} of their size): its layers "
            "keep something between tokens beside keys and values, or look at more than hidden states and positions"
        )


def _step(tokens: Sequence[Tensor], runs: Sequence[tuple[int, int, int]], device: str) -> StepInputs:
    def numbers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    places = [(sequence, at) for sequence, start, count in runs for at in range(start, start + count)]
    starts = [0]
    for _, _, count in runs:
        starts.append(starts[-1] + count)
    pages = [[*_PAGES[sequence], 0][:3] for sequence, _, _ in runs]
    return StepInputs(
        tokens=numbers([int(tokens[sequence][at]) for sequence, at in places]),
        previous=numbers([0]),
        positions=numbers([at for _, at in places]),
        slots=numbers([_PAGES[sequence][at // _PAGE_SIZE] * _PAGE_SIZE + at % _PAGE_SIZE for sequence, at in places]),
        block_tables=torch.tensor(pages, dtype=torch.int32, device=device),
        kv_lengths=numbers([start + count for _, start, count in runs]),
        query_starts=numbers(starts),
        logits_at=None,
    )
