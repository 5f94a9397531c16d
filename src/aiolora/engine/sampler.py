"""Sampler: logits to tokens and log-probabilities, each row by its own parameters."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from aiolora.engine.sequence import Sequence
from aiolora.ops.sampling import penalise_op, sample_op


@dataclass(slots=True)
class Sampled:
    """What one row became."""

    token_id: int
    logprob: float  # of the raw logits; NaN where they were not finite
    rank: int
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Stateless: penalties and randomness follow from the sequence's tokens, seed and position. Engine thread only."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[Sampled]:
        """One token a row of `logits` [B, V] float32, for `seqs` [B]."""
        params = [seq.params for seq in seqs]
        if all(p.temperature == 0 for p in params) and not any(self._edits(seq) for seq in seqs):
            tokens = logits.argmax(-1)
        else:
            edited = self._edit(logits, seqs)
            tokens = sample_op(
                edited,
                self._column([p.temperature for p in params], logits),
                torch.tensor([max(p.top_k, 0) for p in params], device=logits.device),
                self._column([p.top_p for p in params], logits),
                self._column([p.min_p for p in params], logits),
                self._column([uniform(seq.seed, seq.length) for seq in seqs], logits),
            )
        return self.report(logits, tokens, [p.logprobs for p in params])

    def report(self, logits: Tensor, tokens: Tensor, tops: list[int | None]) -> list[Sampled]:
        """Log-probability of `tokens` [B] under raw `logits` [B, V], and each row's `tops` likeliest.

        Ranks are counted where any row asks for a report (None: it does not), 1 elsewhere.
        """
        wanted = [top for top in tops if top is not None]
        normaliser = logits.logsumexp(-1)
        chosen = logits.gather(1, tokens.unsqueeze(1).long()).squeeze(1)
        logprobs = (chosen - normaliser).tolist()
        ranks = (logits > chosen.unsqueeze(1)).sum(-1).tolist() if wanted else [0] * len(tops)
        most: list[list[tuple[int, float]]] = [[] for _ in tops]
        if any(wanted):
            best = logits.topk(max(wanted), dim=-1)
            values = (best.values - normaliser.unsqueeze(1)).tolist()
            for row, ids in enumerate(best.indices.tolist()):
                most[row] = list(zip(ids[: tops[row] or 0], values[row]))
        return [
            Sampled(token, logprob, rank + 1, tuple(top))
            for token, logprob, rank, top in zip(tokens.tolist(), logprobs, ranks, most)
        ]

    def _edits(self, seq: Sequence) -> bool:
        params = seq.params
        return bool(params.penalised or params.logit_bias or seq.num_output < params.min_tokens)

    def _edit(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """A copy of the logits with bias, minimum length and penalties applied, row by row where asked for."""
        if not any(self._edits(seq) for seq in seqs):
            return logits
        logits = logits.clone()
        for row, seq in enumerate(seqs):
            params = seq.params
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=logits.device)
                logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
            if seq.num_output < params.min_tokens:
                ends = sorted({*seq.stop_token_ids, *(() if params.ignore_eos else self._eos)})
                logits[row, ends] = -torch.inf
            if params.penalised:
                uses = Counter(seq.tokens[seq.num_prompt :])
                prompt = set(seq.tokens[: seq.num_prompt])
                used = [*(prompt | set(uses))]
                logits[row] = penalise_op(
                    logits[row],
                    torch.tensor(used, device=logits.device),
                    self._column([uses[token] for token in used], logits),
                    torch.tensor([token in prompt for token in used], device=logits.device),
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                )
        return logits

    def _column(self, values: list[float] | list[int], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position) alone: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & mask
    return ((z ^ (z >> 31)) >> 40) / (1 << 24)
