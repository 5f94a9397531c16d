"""From logits to tokens. B rows, V vocabulary; all float32.

Randomness is one uniform number a row, drawn by the caller from (seed, position): the token depends on nothing but the
row's own logits and seed, whoever else is in the batch.
"""

import torch
from torch import Tensor

from aiolora.ops.registration import define

_GREEDY_BELOW = 1e-6


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """A token [B] int64 a row of `logits` [B, V]: temperature, then min_p, then top_k, then top_p, then the draw.

    temperature 0 (or under 1e-6, where dividing could overflow): the likeliest. top_k 0: all. `u` [B] in [0, 1): the
    point of the cumulative distribution, over tokens from the likeliest down, at which the token stands.
    """
    greedy = logits.argmax(-1)
    rows = (temperature >= _GREEDY_BELOW).nonzero().squeeze(1)
    if len(rows) == 0:
        return greedy
    scaled = logits[rows] / temperature[rows].unsqueeze(1)
    order = scaled.sort(dim=-1, descending=True, stable=True)
    probs = order.values.softmax(-1)
    probs = probs.where(probs >= min_p[rows].unsqueeze(1) * probs[:, :1], 0.0)
    k = top_k[rows].unsqueeze(1)
    probs = probs.where((torch.arange(probs.shape[1], device=probs.device) < k) | (k <= 0), 0.0)
    probs /= probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    probs = probs.where(before < top_p[rows].unsqueeze(1), 0.0)
    cumulative = probs.cumsum(-1)
    point = u[rows].unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp_(max=probs.shape[1] - 1)
    last = ((probs > 0).sum(-1, keepdim=True) - 1).clamp_(min=0)  # rows of NaN keep none
    greedy[rows] = order.indices.gather(1, index.minimum(last)).squeeze(1)
    return greedy


def penalise(
    logits: Tensor,
    tokens: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    repetition: float,
    presence: float,
    frequency: float,
) -> Tensor:
    """One row's `logits` [V] after its penalties; `tokens` [U] are the distinct tokens it has used.

    `counts` [U]: uses in the output. repetition (CTRL, arXiv 1909.05858) divides positive and multiplies negative
    logits of prompt and output tokens; presence and frequency (OpenAI) subtract for output tokens only.
    """
    out = logits.clone()
    chosen = out[tokens]
    used = in_prompt | (counts > 0)
    scaled = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
    chosen = torch.where(used, scaled, chosen)
    out[tokens] = chosen - frequency * counts - presence * (counts > 0)
    return out


sample_op = define(
    sample,
    fake=lambda logits, temperature, top_k, top_p, min_p, u: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)
penalise_op = define(
    penalise,
    fake=lambda logits, tokens, counts, in_prompt, repetition, presence, frequency: torch.empty_like(logits),
)
