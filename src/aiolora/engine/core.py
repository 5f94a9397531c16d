"""Engine: add, abort, step. The private core that every face holds; one thread owns it."""

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from msgspec import Struct

from aiolora.engine.adapters import Adapters, Store
from aiolora.engine.batch import logit_offsets
from aiolora.engine.masks import Masks
from aiolora.engine.runner import Flight, Landed, Runner
from aiolora.engine.sampler import Sampled
from aiolora.engine.scheduler import Batch, Scheduled, Scheduler
from aiolora.engine.sequence import Sequence
from aiolora.errors import AioloraError, GrammarError, NonFiniteLogitsError
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.residency import Residency
from aiolora.types import AdapterVersion, FinishReason, Mix, Request, TokenDelta

_MASKS_S = 0.001  # how long a step waits for masks; those that take longer miss it


class Snapshot(Struct, frozen=True, kw_only=True):
    """The engine at one moment."""

    running: int
    waiting: int
    free_pages: int
    num_pages: int
    preemptions: int
    cached_tokens: int  # prompt tokens that the prefix cache had, since the start
    resident_adapters: tuple[str, ...]  # NAME@DIGEST12 on the device
    steps: int


@dataclass(frozen=True, kw_only=True)
class Ends:
    """When every sequence ends, whatever its request says."""

    eos_token_ids: frozenset[int]
    max_model_len: int


class Engine:
    """Requests in, token deltas out, a step at a time. `adapters`: what callers do with adapters.

    `room_of_one`, `read_again`: see `Adapters`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        residency: Residency[AdapterWeights],
        store: Store | None,
        *,
        ends: Ends,
        seed: int,
        masks: Masks,
        room_of_one: int = 0,
        read_again: Callable[[AdapterVersion], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self.adapters = Adapters(self, scheduler, residency, store, room_of_one=room_of_one, read_again=read_again)
        self._ends = ends
        self._random = random.Random(seed)
        self._clock = clock
        self._masks = masks
        self._masking: list[Sequence] = []  # their grammars are taking the last token in
        self._stalled = False  # the last step found nothing to do and no request has come or gone since
        self._sequences: dict[str, list[Sequence]] = {}
        self._in_flight: Flight | None = None
        self._arrivals = 0
        self._steps = 0
        self._undelivered: list[TokenDelta] = []

    @property
    def has_work(self) -> bool:
        """Whether a step could bring anything: sequences, a flight, or deltas not handed out."""
        return bool(self._sequences or self._in_flight or self._undelivered)

    @property
    def stalled(self) -> bool:
        """Whether a step would do nothing before an adapter lands or somebody calls."""
        waits = self._stalled and not self.adapters.stirred
        return waits and bool(self.adapters.reading) and not self._undelivered

    def add(self, request: Request) -> None:
        """Let the request's n sequences wait. The request was checked by who made it.

        A mix that does not fit onto the device ends with `AdapterMemoryError`: it would wait for ever.
        """
        self._stalled = False
        if request.mix is not None and self._refused(request, request.mix):
            return
        seed = self._random.getrandbits(63) if request.params.seed is None else request.params.seed
        limit = self._ends.max_model_len
        if request.params.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + request.params.max_tokens)
        seqs = []
        for index in range(request.params.n):
            seqs.append(Sequence(request, index, seed=seed + index, number=self._arrivals, max_length=limit))
            self._arrivals += 1
        self._sequences[request.id] = seqs
        for seq in seqs:
            self.scheduler.add(seq)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End what is left of a request, or of one of its answers, without a delta; unknown and ended ones are fine."""
        self._stalled = False
        self._undelivered = [
            delta for delta in self._undelivered if delta.request_id != request_id or index not in (None, delta.index)
        ]
        for seq in list(self._sequences.get(request_id, [])):
            if index is None or seq.index == index:
                self.scheduler.finish(seq, "abort")
                self._forget(seq)
        self.adapters.sweep()

    def mixes(self) -> list[Mix]:
        """Of every request under way that has one, waiting ones too."""
        return [seqs[0].mix for seqs in self._sequences.values() if seqs[0].mix is not None]

    def fail_waiting(self, version: AdapterVersion, error: Exception) -> None:
        """End the sequences that wait for `version`; nobody else's."""
        for seq in list(self.scheduler.waiting()):
            if seq.mix is not None and version in seq.mix.versions:
                self._end(seq, "error", error)

    def abort_all(self, version: AdapterVersion) -> None:
        """End the sequences with `version`, running or not."""
        for seq in [seq for seqs in self._sequences.values() for seq in seqs]:
            if seq.mix is not None and version in seq.mix.versions:
                self._end(seq, "abort")

    def step(self) -> list[TokenDelta]:
        """Launch the next step, settle the one before (or this one, where the runner does not overlap).

        Raises what a launch raises (out of memory): the requests of that step end with an error, others may go on.
        """
        batch = self._schedule()
        while (self.adapters.copying or self._masking) and not (batch.runs or self._in_flight or self._undelivered):
            if self._masking:  # there is nothing else to do
                self._masks.wait(None)
            else:
                self.adapters.wait()
            batch = self._schedule()
        try:
            launched = self._runner.launch(batch, self._look_for_masks) if batch.runs else None
        except BaseException as error:
            self._give_up(batch, error)
            raise
        deltas, self._undelivered = self._undelivered, []
        landing = self._in_flight if self._runner.overlaps else launched
        self._in_flight = launched if self._runner.overlaps else None
        if landing is not None:
            self._steps += 1
            deltas += self._settle(landing.batch, landing.land())
        self.adapters.sweep()
        self._stalled = launched is None and landing is None and not deltas
        self.adapters.stirred = False
        return deltas

    def snapshot(self) -> Snapshot:
        """Counts for those who watch."""
        pool = self.scheduler.pool
        return Snapshot(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            free_pages=pool.num_available,
            num_pages=pool.num_pages,
            preemptions=self.scheduler.num_preemptions,
            cached_tokens=self.scheduler.num_cached_tokens,
            resident_adapters=tuple(version.label for version in self.adapters.resident()),
            steps=self._steps,
        )

    def _schedule(self) -> Batch:
        self._end_failed()
        self.adapters.place()
        return self.scheduler.schedule(self._clock(), self.adapters.reading)

    def _look_for_masks(self, batch: Batch) -> None:
        """While `batch` computes: wait a moment for its masks; who has none misses it, so that others lose no more."""
        runs = [run for run in batch.runs if run.samples and run.seq.matcher is not None]
        if not all(run.seq.matcher.ready for run in runs if run.seq.matcher is not None):
            self._masks.wait(_MASKS_S)
        for run in runs:
            if run.seq.matcher is not None and (not run.seq.matcher.ready or run.seq.matcher.error is not None):
                self.scheduler.miss(run)

    def _end_failed(self) -> None:
        """Those whose grammar has become too complex. No wait: masks that come while the next step computes will do."""
        looked_at, self._masking = self._masking, []
        for seq in looked_at:
            assert seq.matcher is not None
            if not seq.matcher.ready:
                self._masking.append(seq)
            elif seq.matcher.error is not None:
                error = GrammarError(f"request {seq.request.id!r}: structured_outputs: {seq.matcher.error}")
                self._end(seq, "error", error)

    def _settle(self, batch: Batch, landed: Landed) -> list[TokenDelta]:
        """Append what a step brought, end what has ended, let grammars see what may come next."""
        constrained = []
        for run, sampled, prompt in zip(batch.runs, landed.sampled, landed.prompt):
            if prompt:
                self._keep_prompt_logprobs(run, prompt)
            if not all(math.isfinite(one.logprob) for one in (*prompt, sampled) if one is not None):
                self._end(run.seq, "error", NonFiniteLogitsError(f"request {run.seq.request.id!r}: logits are NaN"))
                self.scheduler.distrust(run.seq)
            self.scheduler.land(run)
            if sampled is not None and not run.missed and not run.seq.finished:
                self._append(run.seq, sampled)
                if run.seq.matcher is not None and not run.seq.finished:
                    self._masking.append(run.seq)
                    constrained.append((run.seq.matcher, sampled.token_id))
        if constrained:
            self._masks.advance(constrained)  # beside the next step
        deltas, self._undelivered = self._undelivered, []
        return deltas

    def _give_up(self, batch: Batch, error: BaseException) -> None:
        """`batch` was not launched, so it will not land: end its sequences, or what they hold would be lost."""
        for run in batch.runs:
            self._end(run.seq, "error", AioloraError(f"request {run.seq.request.id!r}: its step failed: {error!r}"))
            self.scheduler.land(run)

    def _append(self, seq: Sequence, sampled: Sampled) -> None:
        seq.tokens.append(sampled.token_id)
        reason, stop = self._reason(seq, sampled.token_id)
        self._undelivered.append(
            TokenDelta(
                request_id=seq.request.id,
                index=seq.index,
                token_id=sampled.token_id,
                logprob=sampled.logprob,
                rank=sampled.rank,
                top=sampled.top,
                finish_reason=reason,
                stop_reason=stop,
                prompt_logprobs=tuple(seq.prompt_logprobs)
                if seq.wants_prompt_logprobs and seq.num_output == 1 and seq.index == 0
                else None,
                started_s=seq.started_s if seq.num_output == 1 else None,
            )
        )
        if reason is not None:
            self.scheduler.finish(seq, reason)
            self._forget(seq)

    def _reason(self, seq: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether `token` ends `seq`, and the stop token id if it was one of the request's own."""
        params = seq.params
        if seq.num_output >= max(params.min_tokens, 1):
            if token in seq.stop_token_ids:
                return "stop", token
            if token in (seq.request.eos_token_ids or self._ends.eos_token_ids) and not params.ignore_eos:
                return "stop", None
        if len(seq.tokens) >= seq.max_length:
            return "length", None
        return None, None

    def _refused(self, request: Request, mix: Mix) -> bool:
        """Whether every answer was ended at once: of adapters that are too large together, or gone."""
        barred = self.adapters.barred(mix)
        error = None if barred else self.adapters.refusal(mix)
        if not barred and error is None:
            return False
        reason: FinishReason = "abort" if barred else "error"
        self._undelivered += [
            TokenDelta(request.id, index, token_id=None, finish_reason=reason, error=error)
            for index in range(request.params.n)
        ]
        return True

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        """End `seq` without a token."""
        if seq.finished:
            return
        self.scheduler.finish(seq, reason)
        self._undelivered.append(
            TokenDelta(seq.request.id, seq.index, token_id=None, finish_reason=reason, error=error)
        )
        self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        siblings = self._sequences.get(seq.request.id, [])
        if all(other.finished for other in siblings):
            self._sequences.pop(seq.request.id, None)

    def _keep_prompt_logprobs(self, run: Scheduled, prompt: Iterable[Sampled]) -> None:
        """Prompt positions come in order, some again after a preemption."""
        kept = run.seq.prompt_logprobs
        for offset, sampled in zip(logit_offsets(run), prompt):
            if run.start + offset + 1 == len(kept):
                chosen = (run.seq.tokens[len(kept)], sampled.logprob, sampled.rank)
                others = ((token, logprob, rank) for rank, (token, logprob) in enumerate(sampled.top, start=1))
                kept.append((chosen, *others))


Message: TypeAlias = Callable[[Engine], None]  # what the thread that owns an engine does between two steps
