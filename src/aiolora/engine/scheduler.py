"""Scheduler: which sequences run in the next step, and how many of their tokens. Pure Python, no torch."""

import heapq
from array import array
from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from aiolora.engine.queues import Queues, Slots, seniority_of
from aiolora.engine.sequence import Sequence, Status
from aiolora.engine.shares import Shares
from aiolora.pages import PagePool
from aiolora.types import AdapterVersion, FinishReason, Mix


@dataclass(slots=True)
class Scheduled:
    """A run of one sequence's tokens in a step."""

    seq: Sequence
    start: int
    count: int
    samples: bool  # the last of them is the sequence's last, so the step samples the next one
    missed: bool = False  # and nobody knew what: as if its last token were not in the step


@dataclass(slots=True)
class Batch:
    """One step: single-token runs first, then prompts."""

    runs: list[Scheduled] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(run.count for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_loras: int
    page_size: int
    prefix_caching: bool = True
    chunked_prefill: bool = True
    media_items: int = (
        4  # images and recordings that may begin in one step, where prompts are cut: each is encoded in it
    )
    patience_s: float = 3.0  # after so long without a slot, a mix of adapters is given that of another


class Leases(Protocol):
    """What the scheduler asks of `lora.residency.Residency`."""

    def on_device(self, version: AdapterVersion) -> bool: ...
    def lease(self, version: AdapterVersion) -> None: ...
    def release(self, version: AdapterVersion) -> None: ...
    def check(self) -> None: ...


class Scheduler:
    """Fair among mixes of adapters, within three bounds: KV pages, tokens a step, distinct mixes (`max_loras`).

    Sequences wait in a queue a mix, so that an adapter that is not on the device holds up nobody else. The mix served
    least comes first (`Queues`); within one, and among equals, first come, first served, but for priorities within a
    mix. The last few seats (`max_num_seqs`) are not for a mix that has half of them already, so that who comes beside
    a hot adapter need not wait for an answer's end. The first in line that finds no pages is not overtaken by other
    mixes: as every running sequence ends, so does its wait. With more mixes than `max_loras` they take turns (`Slots`
    says how long one waits at most). Under page pressure the latest arrival is preempted and computed again, earlier
    than it those that said they have time.

    Owns page and lease accounting of sequences; nobody else takes or releases. Engine thread only.
    """

    def __init__(self, limits: SchedulerLimits, pool: PagePool, residency: Leases) -> None:
        self.limits = limits
        self.running: list[Sequence] = []  # by seniority
        self.pool = pool
        self._residency = residency
        self._queues = Queues()
        self.shares = Shares()
        self._slots = Slots(limits.max_loras, limits.patience_s)
        self._now_s = 0.0  # of the step made last
        self._leaving: list[Sequence] = []  # preempted or ended, their pages held until their flights have landed
        self._media_left = 0  # items that may still begin in the step being made
        self._promised = 0  # of those pages, how many the step being made has others wait for
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # prompt tokens that the prefix cache had

    @property
    def num_waiting(self) -> int:
        return len(self._queues)

    @property
    def idle(self) -> bool:
        return not self.running and not len(self._queues)

    def waiting(self) -> Iterator[Sequence]:
        """Every waiting sequence."""
        return iter(self._queues)

    def add(self, seq: Sequence) -> None:
        """Let `seq` wait for its turn."""
        if self.idle and not self._leaving:
            self._queues.forget()
        self._queues.add(seq)
        if seq.mix is not None:
            self._slots.wait(seq.mix, seq.request.arrival_s)

    def wanted(self, arriving: Collection[int] = ()) -> list[Mix]:
        """Mixes that the next steps need on the device: those that run, then those that wait, longest first.

        At most `max_loras` mixes: looking further ahead would evict what is about to run. `arriving`: ids of versions
        that are being read; up to as many mixes of them are passed over, so that a slow disk holds up only its own.
        """
        mixes = list(self._slots.active)
        passed_over = 0
        for mix in self._slots.line():
            if passed_over < self.limits.max_loras and any(version.id in arriving for version in mix.versions):
                passed_over += 1
            elif len(mixes) < self.limits.max_loras:
                mixes.append(mix)
        return mixes

    def line(self) -> list[Mix]:
        """Mixes that wait for a slot, the longest wait first."""
        return self._slots.line()

    def lineup(self) -> list[Mix]:
        """Mixes that run, then those that wait for a slot, the longest wait first."""
        return [*self._slots.active, *self._slots.line()]

    def schedule(self, now: float, arriving: Collection[int] = ()) -> Batch:
        """The next step. Sequences in it have their pages and leases; `num_computed` counts them as computed.

        `arriving`: ids of versions that are being read; who waits for one of them holds up nobody.
        """
        self._now_s = now
        batch = Batch()
        budget = self.limits.max_num_batched_tokens
        preemptions = self.num_preemptions
        self._leaving = [seq for seq in self._leaving if seq.holds and seq.status is not Status.RUNNING]
        self._promised = 0
        self._media_left = self.limits.media_items
        for seq in self.running.copy():
            if budget == 0:
                break
            length = seq.length
            if seq.status is not Status.RUNNING or length >= seq.max_length or seq.sits_out:
                continue  # preempted for one before it; the token in flight is its last; or its grammar must see that
            count = min(length - seq.num_computed, budget)
            if seq.request.media:
                count = self._cut(seq, seq.num_computed, count)
            if count and self._grow(seq, seq.num_computed + count):
                budget -= self._launch(batch, seq, count)
        if self.num_preemptions == preemptions and not self._promised:  # else the preempted would come straight back
            self._admit(batch, budget, now, arriving)
        singles = [run for run in batch.runs if run.count == 1]
        if len(singles) < len(batch.runs):
            batch.runs = singles + [run for run in batch.runs if run.count > 1]
        return batch

    def land(self, run: Scheduled) -> None:
        """The step with `run` has landed: what it computed may be found by others. Call before appending its token."""
        seq = run.seq
        seq.num_flights -= 1
        if run.samples and not run.missed:
            seq.num_pending -= 1
        if seq.status is Status.RUNNING:
            seq.num_landed = run.start + run.count - run.missed
            if self.limits.prefix_caching:
                self._publish(seq, run)
        elif seq.num_flights == 0 and seq.holds:
            self._give_back(seq)
            if seq.status is Status.WAITING:
                self.add(seq)

    def miss(self, run: Scheduled) -> None:
        """Nothing can be chosen for `run`, which is being launched: a later step computes its last token again."""
        run.missed = run.seq.missed = True
        run.seq.num_pending -= 1
        run.seq.num_computed -= 1

    def distrust(self, seq: Sequence) -> None:
        """`seq` got NaN: nobody may find what it has read or computed, or every retry would get NaN again."""
        for index in range(len(seq.tokens) // self.limits.page_size):
            self.pool.forget(seq.page_key(index, self.limits.page_size))

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End `seq` wherever it is; idempotent. Its pages are free once no launched step can write to them."""
        if seq.finished:
            return
        if seq.status is Status.WAITING:
            self._remove_waiting(seq)
        else:
            self.running.remove(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        if seq.holds and seq.num_flights == 0:
            self._give_back(seq)
        elif seq.holds:
            self._leaving.append(seq)

    def check(self) -> None:
        """Assert that pages and leases belong to exactly the sequences that hold them."""
        self.pool.check()
        self._residency.check()
        assert len(self._slots.active) <= self.limits.max_loras, "more mixes than max_loras"
        assert self.running == sorted(self.running, key=seniority_of), "running ones are out of order"
        for seq in self.running:
            assert seq.holds
            assert len(seq.pages) >= -(-seq.num_computed // self.limits.page_size)

    def _admit(self, batch: Batch, budget: int, now: float, arriving: Collection[int]) -> None:
        """Let waiting heads in, of the mix served least first."""
        self._slots.turn(
            now,
            held_up=lambda mix: self.shares.full(mix) or any(version.id in arriving for version in mix.versions),
            ready=self._on_device,
            served=self._queues.served,
        )
        heads = self._queues.heads()
        heapq.heapify(heads)
        limited: list[Mix] = []
        while heads and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            _, _, seq = heapq.heappop(heads)
            if seq.mix is not None and self.shares.full(seq.mix):
                limited.append(seq.mix)
                continue
            if not (self._slots.admits(seq) and self._on_device(seq.mix)) or self._held_back(seq) or seq.unsure:
                continue
            if len(self.running) >= self.limits.max_num_seqs - self._kept_seats and self._crowds(seq.mix):
                continue
            count = self._start(seq, budget)
            if count == 0:
                break  # no pages or tokens for the first in line: later ones do not overtake it
            budget -= self._launch(batch, seq, count)
            self._queues.remove(seq)
            if seq.mix in self._queues:
                heapq.heappush(heads, self._queues.rank(seq.mix))
        if limited:
            self._queues.keep_up(limited)

    @property
    def _kept_seats(self) -> int:
        """A sixteenth, four at most: a seat comes free with every answer's end, so few serve who comes meanwhile."""
        return min(4, self.limits.max_num_seqs // 16)

    def _crowds(self, mix: Mix | None) -> bool:
        """Whether `mix` has half of the seats, and others have been here, too."""
        mine = sum(seq.mix == mix for seq in self.running)
        return 2 * mine >= self.limits.max_num_seqs and self._queues.shared(mix)

    def _on_device(self, mix: Mix | None) -> bool:
        return mix is None or all(self._residency.on_device(version) for version in mix.versions)

    def _held_back(self, seq: Sequence) -> bool:
        """One of n answers waits until the first has computed the prompt, then shares its pages."""
        if not self.limits.prefix_caching or seq.index == 0 or seq.wants_prompt_logprobs:
            return False
        return any(
            other.request is seq.request and other.index == 0 and other.num_landed < other.num_prompt - 1
            for other in self.running
        )

    def _start(self, seq: Sequence, budget: int) -> int:
        """Give `seq` its leases, what the prefix cache has, and pages for its first run; 0 (no change): not now."""
        cached = self._cached_pages(seq)
        start = len(cached) * self.limits.page_size
        count = min(seq.length - start, budget)
        if seq.request.media:
            count = self._cut(seq, start, count)
        if count == 0 or (not self.limits.chunked_prefill and count < seq.length - start):
            return 0
        self.pool.share(cached)
        fresh = self.pool.take(-(-(start + count) // self.limits.page_size) - len(cached))
        if fresh is None:
            self.pool.release(cached)
            return 0
        seq.pages = array("i", [*cached, *fresh])
        seq.num_computed = seq.num_landed = start
        self.num_cached_tokens += start
        seq.status = Status.RUNNING
        seq.started_s = self._now_s if seq.started_s is None else seq.started_s
        seq.holds = True
        insort(self.running, seq, key=seniority_of)
        if seq.mix is not None:
            self._slots.enter(seq.mix)
            self.shares.enter(seq.mix)
            for version in seq.mix.versions:
                self._residency.lease(version)
        return count

    def _cached_pages(self, seq: Sequence) -> list[int]:
        """Pages that already hold the beginning of `seq`; at least its last token is left to compute."""
        pages: list[int] = []
        if not self.limits.prefix_caching or seq.wants_prompt_logprobs:
            return pages
        for index in range((len(seq.tokens) - 1) // self.limits.page_size):
            page = self.pool.find(seq.page_key(index, self.limits.page_size))
            if page is None:
                break
            pages.append(page)
        return pages

    def _grow(self, seq: Sequence, length: int) -> bool:
        """Pages for `length` tokens of a running sequence, preempting later ones for them; False: it must sit out.

        Nobody is preempted for pages that come back anyway, as those of one victim may for several.
        """
        need = -(-length // self.limits.page_size) - len(seq.pages)
        while need > 0:
            fresh = self.pool.take(need)
            if fresh is not None:
                seq.pages.extend(fresh)
                return True
            if self._promised + need <= self._coming():
                self._promised += need
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
            if victim.num_flights > 0:
                self._promised += need
                return False  # its pages come back when its flight has landed
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to waiting; all but the tokens is computed again."""
        self.running.remove(seq)
        self.num_preemptions += 1
        seq.status = Status.WAITING
        if seq.num_flights == 0:
            self._give_back(seq)
            self.add(seq)
        else:
            self._leaving.append(seq)

    def _coming(self) -> int:
        """Pages that nobody will own once all flights have landed."""
        return sum(self.pool.refs(page) == 1 for seq in self._leaving for page in seq.pages)

    def _cut(self, seq: Sequence, start: int, count: int) -> int:
        """At most `count` tokens of `seq` from `start` on, ending before an item that is one too many for the step."""
        if not self.limits.chunked_prefill:
            return count
        begun = [item.start for item in seq.request.media if start <= item.start < start + count]
        return begun[self._media_left] - start if len(begun) > self._media_left else count

    def _launch(self, batch: Batch, seq: Sequence, count: int) -> int:
        start = seq.num_computed
        if seq.request.media:
            self._media_left -= sum(start <= item.start < start + count for item in seq.request.media)
        samples = start + count == seq.length
        batch.runs.append(Scheduled(seq, start, count, samples))
        seq.num_computed = start + count
        seq.num_flights += 1
        seq.missed = False
        if samples:
            seq.num_pending += 1
        tokens = count + samples
        self._queues.charge(seq.mix, tokens / self.shares.weight(seq.mix) if self.shares.policies else tokens)
        return count

    def _publish(self, seq: Sequence, run: Scheduled) -> None:
        size = self.limits.page_size
        for index in range(run.start // size, (run.start + run.count - run.missed) // size):
            self.pool.keep(seq.pages[index], seq.page_key(index, size))

    def _give_back(self, seq: Sequence) -> None:
        """Release pages and leases, once. A preempted sequence waits again from here on."""
        seq.holds = False
        self.pool.release(seq.pages)
        seq.pages = array("i")
        seq.num_computed = seq.num_landed = 0
        if seq.mix is not None:
            self.shares.leave(seq.mix)
            if self._slots.leave(seq.mix) and seq.mix in self._queues:
                self._slots.wait(seq.mix, self._now_s)
            for version in seq.mix.versions:
                self._residency.release(version)

    def _remove_waiting(self, seq: Sequence) -> None:
        self._queues.remove(seq)
        if seq.mix is not None and seq.mix not in self._queues:
            self._slots.give_up(seq.mix)
