"""From logits to tokens. B rows, V vocabulary; logits float32, bfloat16 or float16, all arithmetic in float32.

Randomness is one uniform number a row, drawn by the caller from (seed, position): the token depends on nothing but the
row's own logits and seed, whoever else is in the batch. Nothing depends on an order among equals, so no variant sorts.
"""

from functools import cache

import torch
from torch import Tensor

from aiolora.ops.registration import define

GREEDY_BELOW = 1e-6  # temperatures under it could overflow
# what is so much less likely than the likeliest is never drawn: exp of -inf, or to a denormal, takes a CPU 5 to 20
# times as long (16 rows of 49k, half of it masked: 4.1 ms, cut off 1.0)
_LEAST, _NEVER = -80.0, 2e-35


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token [B] int32 a row of `logits` [B, V], the lowest id among equals, and its log-probability.

    Log-probabilities [B] float32 are NaN where a row has NaN or infinity above; the token is one of the vocabulary.
    """
    tokens = logits.argmax(-1)
    return tokens.int(), _logprobs(logits.float(), tokens)


def report(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B] float32 of `tokens` [B] under `logits` [B, V], and ranks [B] int32: tokens likelier."""
    x, tokens = logits.float(), tokens.long()
    chosen = x.gather(1, tokens.unsqueeze(1))
    return _logprobs(x, tokens), (x > chosen).sum(-1, dtype=torch.int32)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """A token [B] int32 a row of `logits` [B, V]: temperature, then min_p, then top_k, then top_p, then the draw.

    temperature [B] 0 (or under 1e-6): the likeliest. min_p [B]: a token stays if it is at least min_p times as likely
    as the likeliest. top_k [B] int: if at least as likely as the k-th likeliest; 0: all. top_p [B]: if those strictly
    likelier have less than that share of what min_p and top_k left. Equals stay or go together. `u` [B] in [0, 1): the
    point of the cumulative distribution, over the tokens left by id, at which the token stands.
    """
    tokens = logits.argmax(-1).int()
    rows = (temperature >= GREEDY_BELOW).nonzero().squeeze(1)
    if len(rows) == 0:
        return tokens
    x = (logits if len(rows) == len(logits) else logits[rows]).float()
    weight = (x - x.amax(-1, keepdim=True)).div_(temperature[rows].unsqueeze(1)).clamp_(min=_LEAST).exp_()
    weight.masked_fill_(weight < min_p[rows].clamp(min=_NEVER).unsqueeze(1), 0.0)
    asks = ((top_k[rows] > 0) | (top_p[rows] < 1)).nonzero().squeeze(1)
    if len(asks):
        least = _least_kept(x[asks], weight[asks], top_k[rows[asks]], top_p[rows[asks]])
        weight[asks] = weight[asks].where(x[asks] >= least, 0.0)
    cumulative = weight.cumsum_(-1)  # in place, like the rest: the pages of a fresh 3 MB cost more than the arithmetic
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, u[rows].unsqueeze(1) * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last that may be drawn
    drawn = index.minimum(last).squeeze(1).int()
    tokens[rows] = drawn.where(total.squeeze(1).isfinite(), tokens[rows])
    return tokens


def penalise(
    logits: Tensor, prompt: Tensor, output: Tensor, repetition: float, presence: float, frequency: float
) -> Tensor:
    """One row's `logits` [V] after its penalties, float32; `prompt` [P] and `output` [O] are its tokens so far, int.

    repetition (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits of prompt and output tokens;
    presence and frequency (OpenAI) subtract for output tokens only.
    """
    x = logits.float()
    uses = torch.zeros_like(x).scatter_add_(0, output.long(), torch.ones_like(output, dtype=torch.float32))
    used = (uses > 0).index_fill_(0, prompt.long(), True)
    x = x.where(~used, torch.where(x > 0, x / repetition, x * repetition))
    return x - frequency * uses - presence * (uses > 0)


def allow(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """-inf to some rows of `logits` [B, V] for tokens that are not allowed; mutates `logits` only.

    rows [R] int64, each once. `bits` [R, W] int32: bit i of word w is set where token 32 * w + i is allowed; tokens
    beyond the words are not. Added in place: 0.17 ms for 8 of 16 rows of 49k, taken out and put back 0.76 (one core).
    """
    bias = torch.nn.functional.embedding(bits.view(torch.uint8).int(), _bias_of_bytes(logits.device)).flatten(1)
    if bias.shape[1] < logits.shape[1]:
        bias = torch.nn.functional.pad(bias, (0, logits.shape[1] - bias.shape[1]), value=-torch.inf)
    logits.index_add_(0, rows, bias[:, : logits.shape[1]].to(logits.dtype))


@cache
def _bias_of_bytes(device: torch.device) -> Tensor:
    """[256, 8]: what each byte of a mask adds to its eight logits (0.12 ms for 4 rows of 49k; selecting them: 0.55)."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return torch.where(bits.bool(), 0.0, -torch.inf)


def _logprobs(x: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B] of `tokens` [B] int64 under `x` [B, V] float32."""
    top = x.amax(-1, keepdim=True)
    return (x.gather(1, tokens.unsqueeze(1)) - top).squeeze(1) - (x - top).exp().sum(-1).log()


def _least_kept(x: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least logit [R, 1] that top_k and top_p [R] keep of logits `x` [R, V] with unnormalised probabilities."""
    values, order = x.sort(dim=-1, descending=True)
    k = top_k.long().clamp(max=x.shape[1])
    kth = values.gather(1, (k - 1).clamp(min=0).unsqueeze(1))
    least = kth.where((k > 0).unsqueeze(1), -torch.inf)
    mass = weight.gather(1, order).where(values >= least, 0.0)
    before = mass.cumsum(-1) - mass
    place = torch.arange(x.shape[1], device=x.device).expand_as(values)
    starts = torch.cat((torch.ones_like(values[:, :1], dtype=torch.bool), values[:, 1:] != values[:, :-1]), dim=1)
    likelier = before.gather(1, place.where(starts, 0).cummax(-1).values)  # as the first among equals has it
    inside = likelier < top_p.unsqueeze(1) * mass.sum(-1, keepdim=True)
    nucleus = values.gather(1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))
    return least.maximum(nucleus.where((top_p < 1).unsqueeze(1), -torch.inf))


_KERNELS = "aiolora.ops.kernels.sampling"

greedy_op = define(
    greedy,
    fake=lambda logits: (
        logits.new_empty(logits.shape[:1], dtype=torch.int32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    ),
    cuda=_KERNELS,
)
report_op = define(
    report,
    fake=lambda logits, tokens: (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty(logits.shape[:1], dtype=torch.int32),
    ),
    cuda=_KERNELS,
)
sample_op = define(
    sample,
    fake=lambda logits, temperature, top_k, top_p, min_p, u: logits.new_empty(logits.shape[:1], dtype=torch.int32),
    cuda=_KERNELS,
)
penalise_op = define(
    penalise,
    fake=lambda logits, prompt, output, repetition, presence, frequency: torch.empty_like(logits, dtype=torch.float32),
)
allow_op = define(allow, fake=lambda logits, rows, bits: None, mutates=("logits",))
