"""Engine: add, abort, step. The private core that every face holds; one thread owns it."""

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from msgspec import Struct

from aiolora.engine.batch import logit_offsets
from aiolora.engine.masks import Masks
from aiolora.engine.runner import Flight, Landed, Runner
from aiolora.engine.sampler import Sampled
from aiolora.engine.scheduler import Batch, Scheduled, Scheduler
from aiolora.engine.sequence import Sequence
from aiolora.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterMemoryError,
    AdapterNotFoundError,
    AioloraError,
    GrammarError,
    NonFiniteLogitsError,
)
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.residency import Residency
from aiolora.types import AdapterVersion, FinishReason, Mix, Request, TokenDelta

logger = logging.getLogger(__name__)

_MASKS_S = 0.001  # how long a step waits for masks; those that take longer miss it


class Arrival(Protocol):
    """Bytes of an adapter on their way to the device, as `lora.pool.Arrival`."""

    def done(self) -> bool: ...

    def wait(self) -> None: ...


class Store(Protocol):
    """What the engine asks of `lora.pool.AdapterPool`."""

    def write(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> Arrival: ...


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


class AdapterStanding(Struct, frozen=True, kw_only=True):
    """Where one version is and who needs it, at one moment."""

    version: AdapterVersion
    residency: Literal["gpu", "cpu", "disk"]  # the fastest place that it is in; "gpu": the device's pages
    pinned: bool
    in_use: bool  # a sequence runs with it
    requests: int  # under way with it, waiting ones too
    draining: bool  # its name is gone, or stands for another version


@dataclass(frozen=True, kw_only=True)
class Ends:
    """When every sequence ends, whatever its request says."""

    eos_token_ids: frozenset[int]
    max_model_len: int


class Engine:
    """Requests in, token deltas out, a step at a time.

    `room_of_one`: rank pages of a kind that pinned adapters leave to the others, enough for the largest.
    `read_again(version)` is called when an evicted adapter is needed: it must not block, and answers by
    `adapter_landed` or `adapter_failed` later (or at once).
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
        self._residency = residency
        self._store = store
        self._ends = ends
        self._random = random.Random(seed)
        self._read_again = read_again
        self._clock = clock
        self._room = room_of_one
        self._reading: set[int] = set()
        self._holds: Counter[int] = Counter()  # version id -> requests that were prepared with it and are alive
        self._going: dict[int, AdapterVersion] = {}  # names are gone, somebody under way may need them
        self._barred: set[int] = set()  # those of them that nobody may begin with any more
        self._copying: list[tuple[AdapterVersion, Arrival]] = []  # placed and not landed, oldest first
        self._masks = masks
        self._masking: list[Sequence] = []  # their grammars are taking the last token in
        self._stalled = False  # the last step found nothing to do and nothing has come since
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
        return self._stalled and bool(self._reading) and not self._undelivered

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
        self._sweep()

    def add_adapter(self, weights: AdapterWeights) -> None:
        """Keep a version that was just read in host memory."""
        self._stalled = False
        self._residency.store(weights.version, weights, wanted=self._wanted())

    def replace_adapter(self, old: AdapterVersion, weights: AdapterWeights) -> None:
        """`add_adapter` of what the name of `old` stands for from now on; a pin goes over to it."""
        pinned = self._residency.pinned(old)
        self.drop_adapter(old)
        self.add_adapter(weights)
        if pinned:
            try:
                self.pin_adapter(weights.version)
            except AdapterMemoryError as error:
                logger.warning("%s is not pinned any more: %s", weights.version.label, error)

    def drop_adapter(self, version: AdapterVersion, *, force: bool = False) -> None:
        """Its name is gone: what it takes is free as soon as nobody under way needs it. `force`: they are aborted."""
        self._residency.retire(version)
        self._going[version.id] = version
        if force:
            self._stalled = False
            self._barred.add(version.id)
            for seq in [seq for seqs in self._sequences.values() for seq in seqs]:
                if seq.mix is not None and version in seq.mix.versions:
                    self._end(seq, "abort")
        self._sweep()

    def pin_adapter(self, version: AdapterVersion) -> None:
        """Keep it in host memory (read again at once where it is not) and, once there, on the device.

        Raises `AdapterMemoryError` where that would leave somebody else without room.
        """
        for mix in {seqs[0].mix for seqs in self._sequences.values()}:
            if mix is not None and not self._residency.fits([version, *mix.versions]):
                names = "+".join(other.name for other in mix.versions)
                raise AdapterMemoryError(
                    version.name,
                    f"cannot be pinned: requests under way with {names} need its room; raise --lora-memory or wait",
                )
        self._residency.pin(version, room=self._room)
        if not self._residency.in_host(version) and version.id not in self._reading:
            self._reading.add(version.id)
            self._read_again(version)

    def unpin_adapter(self, version: AdapterVersion) -> None:
        """It may be evicted again."""
        self._residency.unpin(version)

    def hold_adapters(self, mix: Mix) -> None:
        """A request was prepared with `mix` and may be added any time: its adapters are not dropped before `let_go`."""
        self._holds.update(version.id for version in mix.versions)

    def let_go(self, mix: Mix) -> None:
        """That request has ended, or will never be added."""
        self._holds.subtract(version.id for version in mix.versions)
        self._holds += Counter()  # without the zeros
        self._sweep()

    def standing(self, versions: Iterable[AdapterVersion]) -> list[AdapterStanding]:
        """How it is with each of `versions`, then with those whose names are gone and that are not free yet."""
        requests: Counter[int] = Counter()
        for seqs in self._sequences.values():
            if seqs[0].mix is not None:
                requests.update({version.id for version in seqs[0].mix.versions})
        return [
            AdapterStanding(
                version=version,
                residency="gpu"
                if self._residency.on_device(version)
                else "cpu"
                if self._residency.in_host(version)
                else "disk",
                pinned=self._residency.pinned(version),
                requests=requests[version.id],
                in_use=bool(self._residency.leased(version)),
                draining=version.id in self._going,
            )
            for version in dict.fromkeys([*versions, *self._going.values()])
        ]

    def adapter_landed(self, version: AdapterVersion, weights: AdapterWeights) -> None:
        """`read_again(version)` brought these weights, in the name of `version` if they are the same."""
        if weights.version.digest != version.digest:
            self.adapter_failed(
                version,
                AdapterChangedError(
                    version.name,
                    f"{version.source} now holds {weights.version.digest[:12]}, not {version.digest[:12]} as when "
                    "it was loaded; load it again with load_inplace=True",
                ),
            )
            return
        self._stalled = False
        self._reading.discard(version.id)
        self._residency.store(version, weights, wanted=self._wanted())
        self._sweep()

    def adapter_failed(self, version: AdapterVersion, error: Exception) -> None:
        """`read_again(version)` failed: whoever waits for it fails, nobody else."""
        self._stalled = False
        self._reading.discard(version.id)
        for seq in list(self.scheduler.waiting()):
            if seq.mix is not None and version in seq.mix.versions:
                self._end(seq, "error", error)
        self._sweep()

    def step(self) -> list[TokenDelta]:
        """Launch the next step, settle the one before (or this one, where the runner does not overlap).

        Raises what a launch raises (out of memory): the requests of that step end with an error, others may go on.
        """
        batch = self._schedule()
        while (self._copying or self._masking) and not (batch.runs or self._in_flight or self._undelivered):
            if self._masking:  # there is nothing else to do
                self._masks.wait(None)
            else:
                self._copying[0][1].wait()
            batch = self._schedule()
        try:
            launched = self._runner.launch(batch) if batch.runs else None
        except BaseException as error:
            self._give_up(batch, error)
            raise
        deltas, self._undelivered = self._undelivered, []
        landing = self._in_flight if self._runner.overlaps else launched
        self._in_flight = launched if self._runner.overlaps else None
        if landing is not None:
            self._steps += 1
            deltas += self._settle(landing.batch, landing.land())
        self._sweep()
        self._stalled = launched is None and landing is None and not deltas
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
            resident_adapters=tuple(version.label for version in self._residency.resident()),
            steps=self._steps,
        )

    def _schedule(self) -> Batch:
        self._look_for_landed()
        self._look_for_masks()
        self._place()
        return self.scheduler.schedule(self._clock(), self._reading)

    def _sweep(self) -> None:
        """Drop what has no name any more and that nobody under way needs."""
        if not self._going:
            return
        needed = {version.id for seqs in self._sequences.values() if seqs[0].mix for version in seqs[0].mix.versions}
        for version in list(self._going.values()):
            if version.id in needed or version.id in self._reading or self._holds[version.id]:
                continue
            if self._residency.drop(version):
                del self._going[version.id]
                self._barred.discard(version.id)

    def _look_for_landed(self) -> None:
        under_way = []
        for version, arrival in self._copying:
            if arrival.done():
                self._residency.landed(version)
            else:
                under_way.append((version, arrival))
        self._copying = under_way

    def _look_for_masks(self) -> None:
        """Wait a moment for those under way; who has none yet sits this step out, so that the others lose no more."""
        if not self._masking:
            return
        self._masks.wait(_MASKS_S)
        looked_at, self._masking = self._masking, []
        for seq in looked_at:
            assert seq.matcher is not None
            if not seq.matcher.ready:
                self._masking.append(seq)
            elif seq.matcher.error is not None:
                error = GrammarError(f"request {seq.request.id!r}: structured_outputs: {seq.matcher.error}")
                self._end(seq, "error", error)

    def _place(self) -> None:
        """Bring what the next steps need onto the device, as far as there is room; nobody waits for it.

        A mix may take the room of those behind it in line: were they spared too, two that do not fit together could
        each wait for the other.
        """
        reads = -1
        while reads != len(self._reading):  # a read that has just begun is passed over: look again who comes next
            reads = len(self._reading)
            spared: set[int] = set()
            for mix in self.scheduler.wanted(self._reading):
                spared.update(version.id for version in mix.versions)
                for version in mix.versions:
                    if not self._residency.placed(version) and version.id not in self._reading:
                        self._bring(version, spared)

    def _bring(self, version: AdapterVersion, spared: set[int]) -> None:
        if not self._residency.in_host(version):
            self._reading.add(version.id)
            self._read_again(version)
        if self._residency.in_host(version):
            placement = self._residency.place(version, wanted=spared)
            if placement is not None:
                arrival = self._store.write(placement.weights, placement.pages) if self._store is not None else None
                if arrival is None or arrival.done():
                    self._residency.landed(version)
                else:
                    self._copying.append((version, arrival))

    def _wanted(self) -> set[int]:
        return {version.id for mix in self.scheduler.wanted(self._reading) for version in mix.versions}

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
            if sampled is not None and not run.seq.finished:
                self._append(run.seq, sampled)
                if run.seq.matcher is not None and not run.seq.finished:
                    self._masking.append(run.seq)
                    constrained.append((run.seq.matcher, sampled.token_id))
        if constrained:
            self._masks.advance(constrained)
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
            if token in self._ends.eos_token_ids and not params.ignore_eos:
                return "stop", None
        if len(seq.tokens) >= seq.max_length:
            return "length", None
        return None, None

    def _refused(self, request: Request, mix: Mix) -> bool:
        """Whether every answer was ended at once: of adapters that are too large together, or gone."""
        name = "+".join(version.name for version in mix.versions)
        error: AdapterError | None = None
        barred = any(version.id in self._barred for version in mix.versions)
        if not barred:
            if not self._residency.fits(mix.versions):
                error = AdapterMemoryError(
                    name,
                    "together they need more rank pages than the room for adapters has, beside those that are pinned; "
                    "raise --lora-memory",
                )
            elif any(version.source is None and not self._residency.in_host(version) for version in mix.versions):
                error = AdapterNotFoundError(name, "was removed, and it came from memory: load it again")
            else:
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
