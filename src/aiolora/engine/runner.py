"""ModelRunner: launches a step on the device. A Flight is a step that was launched and has not landed."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aiolora.engine.batch import Packer, logit_offsets
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.sampler import Sampled, Sampler
from aiolora.engine.scheduler import Batch
from aiolora.engine.sequence import Sequence
from aiolora.models.decoder import Decoder
from aiolora.models.inputs import StepInputs

_ROWS_OF_LOGITS = 256  # of prompt positions at a time: 131 MB of float32 for a vocabulary of 128k


@dataclass(slots=True)
class Landed:
    """What a step brought: for each run the sampled token (or None), and log-probabilities of prompt tokens."""

    sampled: list[Sampled | None]
    prompt: list[list[Sampled]]  # of the tokens that follow the run's first ones


class Flight(Protocol):
    """A launched step."""

    batch: Batch

    def land(self) -> Landed:
        """Wait for the step and bring its results to the host."""
        ...


class Runner(Protocol):
    """What the engine asks of the thing that computes. `overlaps`: a step may be launched before the last landed."""

    overlaps: bool

    def launch(self, batch: Batch) -> Flight: ...


@dataclass(slots=True)
class ReadyFlight:
    """A step whose results are there already (CPU)."""

    batch: Batch
    landed: Landed

    def land(self) -> Landed:
        return self.landed


class ModelRunner:
    """Packs a batch, runs the model on it, samples. Engine thread only."""

    overlaps = False

    def __init__(self, model: Decoder, cache: KVCache, packer: Packer, sampler: Sampler, *, compiled: bool) -> None:
        self._compiled = compiled
        self._forward = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
        self._model = model
        self._cache = cache
        self._packer = packer
        self._sampler = sampler

    def launch(self, batch: Batch) -> ReadyFlight:
        """Compute one step."""
        with torch.inference_mode():
            inputs = self._packer.pack(batch)
            if self._compiled:
                _leave_sizes_open(inputs)
            hidden = self._forward(inputs, self._cache.layers)
            return ReadyFlight(batch, self._read(batch, hidden, inputs))

    def _read(self, batch: Batch, hidden: Tensor, inputs: StepInputs) -> Landed:
        """Split the rows of `hidden` into samples and prompt positions, as `Packer` asked for them."""
        sample_rows: list[int] = []
        seqs: list[Sequence] = []
        prompt: list[list[Sampled]] = []
        row = 0
        for run in batch.runs:
            wanted = len(logit_offsets(run)) - run.samples
            prompt.append(self._prompt(run.seq, run.start, hidden[row : row + wanted], inputs))
            row += wanted
            if run.samples:
                sample_rows.append(row)
                seqs.append(run.seq)
                row += 1
        if not seqs:
            return Landed([None] * len(batch.runs), prompt)
        rows = hidden if len(sample_rows) == len(hidden) else hidden[sample_rows]
        sampled = iter(self._sampler.sample(self._model.logits(rows, inputs), seqs))
        return Landed([next(sampled) if run.samples else None for run in batch.runs], prompt)

    def _prompt(self, seq: Sequence, start: int, hidden: Tensor, inputs: StepInputs) -> list[Sampled]:
        """Log-probabilities of the tokens that follow `start`, some rows of logits at a time to bound the memory."""
        reported: list[Sampled] = []
        for low in range(0, len(hidden), _ROWS_OF_LOGITS):
            logits = self._model.logits(hidden[low : low + _ROWS_OF_LOGITS], inputs)
            first = start + low + 1
            following = torch.tensor(seq.tokens[first : first + len(logits)], device=logits.device)
            reported += self._sampler.report(logits, following, [seq.params.prompt_logprobs] * len(logits))
        return reported


def _leave_sizes_open(inputs: StepInputs) -> None:
    """Let the compiler assume nothing of any size in `inputs`: one graph with adapters and one without serve all steps.

    Else every size that is 1 for the first time compiles again, and the ninth time ends in an error.
    """
    from torch._dynamo.decorators import mark_unbacked  # 1 s to import

    step = (inputs.tokens, inputs.positions, inputs.slots, inputs.block_tables, inputs.kv_lengths, inputs.query_starts)
    for tensor in (*step, inputs.logits_at, *(inputs.rows or ()), *(inputs.head_rows or ())):
        if isinstance(tensor, Tensor):
            mark_unbacked(tensor, list(range(tensor.dim())))
