"""Sampler: logits to tokens and log-probabilities, each row by its own parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aiolora.engine.sequence import Sequence
from aiolora.ops.sampling import allow_op, greedy_op, penalise_op, report_op, sample_op


@dataclass(slots=True)
class Sampled:
    """What one row became."""

    token_id: int
    logprob: float  # of the raw logits; NaN where they were not finite
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Chosen:
    """What B rows became, on the device of the logits; nothing was waited for."""

    tokens: Tensor  # [B] int32
    logprobs: Tensor  # [B] float32, of the raw logits; NaN where they were not finite
    ranks: Tensor | None  # [B] int32, tokens that are likelier; None: nobody asked
    top: tuple[Tensor, Tensor] | None  # ids and log-probabilities [B, k] of the likeliest; None: nobody asked


class Sampler:
    """Stateless: penalties and randomness follow from the sequence's tokens, seed and position. Engine thread only.

    `choose` is called when a step is launched, so a sequence's `num_pending` counts the token that it will choose. It
    never waits for the device: what the step before it sampled is used where it lies.
    """

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def plain(self, seqs: list[Sequence]) -> bool:
        """Whether `greedy` alone serves them all: temperature 0, no edits, no log-probabilities asked for."""
        return self._greedy(seqs) and all(seq.params.logprobs is None for seq in seqs)

    def choose(self, logits: Tensor, seqs: list[Sequence], previous: Tensor | None, rows: list[int]) -> Chosen:
        """One token a row of `logits` [B, V], for `seqs` [B].

        `previous` [N] int32: what the step before sampled, on the device. rows[i] >= 0: sequence i has one token in
        flight, the one at previous[rows[i]]; -1: none.
        """
        params = [seq.params for seq in seqs]
        if self.plain(seqs):
            return Chosen(*greedy_op(logits), None, None)
        if self._greedy(seqs):
            tokens, _ = greedy_op(logits)
        else:
            temperature, top_p, min_p, u = _upload(
                [
                    [p.temperature for p in params],
                    [p.top_p for p in params],
                    [p.min_p for p in params],
                    [uniform(seq.seed, seq.length) for seq in seqs],
                ],
                torch.float32,
                logits.device,
            )
            vocabulary = logits.shape[1]
            top_k = _upload([min(max(p.top_k, 0), vocabulary) for p in params], torch.int32, logits.device)
            tokens = sample_op(self._edit(logits, seqs, previous, rows), temperature, top_k, top_p, min_p, u)
        return self.report(logits, tokens, [p.logprobs for p in params])

    def report(self, logits: Tensor, tokens: Tensor, tops: list[int | None]) -> Chosen:
        """Log-probabilities of `tokens` [B] int32 under raw `logits` [B, V], and as many likeliest as any row wants.

        `tops`: for each row how many; None: it wants no rank either.
        """
        logprobs, ranks = report_op(logits, tokens)
        wanted = [top for top in tops if top is not None]
        if not any(wanted):
            return Chosen(tokens, logprobs, ranks if wanted else None, None)
        values, ids = logits.topk(min(max(wanted), logits.shape[1]), dim=-1)
        _, likeliest = greedy_op(logits)
        values = values.float()
        return Chosen(tokens, logprobs, ranks, (ids, (values - values[:, :1]) + likeliest.unsqueeze(1)))

    def _greedy(self, seqs: list[Sequence]) -> bool:
        return all(seq.params.temperature == 0 and not self._edits(seq) for seq in seqs)

    def _edits(self, seq: Sequence) -> bool:
        params = seq.params
        return bool(
            params.penalised or params.logit_bias or _num_output(seq) < params.min_tokens or seq.matcher is not None
        )

    def _edit(self, logits: Tensor, seqs: list[Sequence], previous: Tensor | None, rows: list[int]) -> Tensor:
        """A float32 copy with bias, minimum length, penalties and grammars applied where asked for; else the logits.

        No step of it reads the device on the host.
        """
        if not any(self._edits(seq) for seq in seqs):
            return logits
        device = logits.device
        logits = logits.to(torch.float32, copy=True)
        for edited, seq, row in zip(logits, seqs, rows):
            params = seq.params
            if params.logit_bias:
                ids = _upload(list(params.logit_bias), torch.int64, device)
                edited.index_add_(0, ids, _upload(list(params.logit_bias.values()), torch.float32, device))
            if _num_output(seq) < params.min_tokens:
                eos = seq.request.eos_token_ids or self._eos
                ends = {*seq.stop_token_ids, *(() if params.ignore_eos else eos)}
                ids = _upload(sorted(end for end in ends if end < len(edited)), torch.int64, device)
                edited.index_fill_(0, ids, -torch.inf)  # a tokenizer may name ends that the model does not have
            if params.penalised:
                tokens = _upload(seq.tokens, torch.int32, device)
                output = tokens[seq.num_prompt :]
                if row >= 0:
                    assert previous is not None
                    output = torch.cat((output, previous[row : row + 1]))
                edited.copy_(
                    penalise_op(
                        edited,
                        tokens[: seq.num_prompt],
                        output,
                        params.repetition_penalty,
                        params.presence_penalty,
                        params.frequency_penalty,
                    )
                )
        masked = [(place, seq.matcher) for place, seq in enumerate(seqs) if seq.matcher is not None]
        constrained = [(place, matcher.bits) for place, matcher in masked if matcher.ready]  # others missed the step
        if constrained:
            places = _upload([place for place, _ in constrained], torch.int64, device)
            width = max(len(bits) for _, bits in constrained)
            joined = bytearray(b"".join(bits.ljust(width, b"\0") for _, bits in constrained))
            bits = torch.frombuffer(joined, dtype=torch.int32)
            bits = (bits.pin_memory() if device.type == "cuda" else bits).to(device, non_blocking=True)
            allow_op(logits, places, bits.view(len(constrained), -1))
        return logits


def read(chosen: Chosen, tops: list[int | None]) -> list[Sampled]:
    """The rows of `chosen`, whose tensors are on the host by now; `tops` as `Sampler.report` got them.

    Ranks are counted where any row asked for a report, 1 elsewhere.
    """
    tokens, logprobs = chosen.tokens.tolist(), chosen.logprobs.tolist()
    ranks = [0] * len(tops) if chosen.ranks is None else chosen.ranks.tolist()
    most: list[tuple[tuple[int, float], ...]] = [()] * len(tops)
    if chosen.top is not None:
        ids, values = (tensor.tolist() for tensor in chosen.top)
        most = [tuple(zip(row[: top or 0], those)) for row, those, top in zip(ids, values, tops)]
    return [Sampled(token, logprob, rank + 1, top) for token, logprob, rank, top in zip(tokens, logprobs, ranks, most)]


def _num_output(seq: Sequence) -> int:
    """Output tokens before the one that is being chosen, those in flight among them."""
    return seq.num_output + max(seq.num_pending - 1, 0)


def _upload(values: list[int] | list[float] | list[list[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position) alone: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (position + 1) * 0x9E3779B97F4A7C15) & mask
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & mask
    return ((z ^ (z >> 31)) >> 40) / (1 << 24)
