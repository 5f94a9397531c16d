"""Bugs to plant: each is one that an engine of this kind has had, or this one had. The walks must find them all."""

from collections import Counter, deque
from collections.abc import Callable, Collection
from hashlib import blake2b, sha256
from typing import Any

import pytest
from msgspec import structs

from aiolora.engine.adapters import Adapters
from aiolora.engine.core import Engine
from aiolora.engine.queues import Queues, Slots
from aiolora.engine.runner import Landed
from aiolora.engine.scheduler import Batch, Scheduled, Scheduler
from aiolora.engine.sequence import Sequence, Status
from aiolora.errors import GrammarError
from aiolora.lora.residency import Placement, Residency
from aiolora.pages import PagePool
from aiolora.types import AdapterVersion, FinishReason, Mix, TokenDelta

Plant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Plant] = {}


def mutant(plant: Plant) -> Plant:
    MUTANTS[plant.__name__] = plant
    return plant


# ---- pages ----


@mutant
def a_page_leaks(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._give_back

    def give_back(self: Scheduler, seq: Sequence) -> None:
        del seq.pages[-1:]
        original(self, seq)

    patch.setattr(Scheduler, "_give_back", give_back)


@mutant
def shared_pages_are_freed_twice(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._give_back

    def give_back(self: Scheduler, seq: Sequence) -> None:
        pages = seq.pages
        original(self, seq)
        self.pool.release([page for page in pages if self.pool.refs(page)])

    patch.setattr(Scheduler, "_give_back", give_back)


@mutant
def a_shared_page_stays_idle(patch: pytest.MonkeyPatch) -> None:
    def share(self: PagePool, pages: list[int]) -> None:
        for page in pages:
            self._refs[page] += 1

    patch.setattr(PagePool, "share", share)


def _give_back_at_once(patch: pytest.MonkeyPatch, *reasons: FinishReason) -> None:
    original = Scheduler.finish

    def finish(self: Scheduler, seq: Sequence, reason: FinishReason) -> None:
        original(self, seq, reason)
        if seq.holds and reason in reasons:
            self._give_back(seq)

    patch.setattr(Scheduler, "finish", finish)


@mutant
def aborted_pages_are_freed_before_landing(patch: pytest.MonkeyPatch) -> None:
    _give_back_at_once(patch, "abort")


@mutant
def finished_pages_are_freed_before_landing(patch: pytest.MonkeyPatch) -> None:
    _give_back_at_once(patch, "stop", "length")


@mutant
def preempted_pages_are_freed_before_landing(patch: pytest.MonkeyPatch) -> None:
    def preempt(self: Scheduler, seq: Sequence) -> None:
        self.running.remove(seq)
        self.num_preemptions += 1
        seq.status = Status.WAITING
        self._give_back(seq)
        self.add(seq)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def page_table_is_stale_after_preemption(patch: pytest.MonkeyPatch) -> None:
    tables: dict[Sequence, list[int]] = {}
    preempt, start = Scheduler._preempt, Scheduler._start

    def remember(self: Scheduler, seq: Sequence) -> None:
        tables[seq] = list(seq.pages)
        preempt(self, seq)

    def reuse(self: Scheduler, seq: Sequence, budget: int) -> int:
        count = start(self, seq, budget)
        old = tables.pop(seq, [])
        if count and len(old) >= len(seq.pages):
            seq.pages = old[: len(seq.pages)]
        return count

    patch.setattr(Scheduler, "_preempt", remember)
    patch.setattr(Scheduler, "_start", reuse)


# ---- the prefix cache ----


@mutant
def prefix_key_has_no_adapter(patch: pytest.MonkeyPatch) -> None:
    def page_key(self: Sequence, page_index: int, page_size: int) -> bytes:
        return blake2b(repr(self.tokens[: (page_index + 1) * page_size]).encode(), digest_size=16).digest()

    patch.setattr(Sequence, "page_key", page_key)


def _mix_key(patch: pytest.MonkeyPatch, parts: Callable[[Mix], object]) -> None:
    patch.setattr(Mix, "key", property(lambda mix: sha256(repr(parts(mix)).encode()).digest()))


@mutant
def prefix_key_has_the_name(patch: pytest.MonkeyPatch) -> None:
    _mix_key(patch, lambda mix: [(version.name, weight) for version, weight in mix.parts])


@mutant
def prefix_key_has_no_weights(patch: pytest.MonkeyPatch) -> None:
    _mix_key(patch, lambda mix: [version.digest for version, _ in mix.parts])


def _page_key(patch: pytest.MonkeyPatch, woken: Callable[[Sequence, Mix, int, int], object]) -> None:
    """Keys of all tokens up to a page's end and, with adapters, of what `woken` makes of them."""

    def page_key(self: Sequence, page_index: int, page_size: int) -> bytes:
        tokens = self.tokens[: (page_index + 1) * page_size]
        key = tokens, woken(self, self.mix, page_index, page_size) if self.mix is not None else None
        return blake2b(repr(key).encode(), digest_size=16).digest()

    patch.setattr(Sequence, "page_key", page_key)


@mutant
def prefix_key_after_an_invocation_has_no_adapter(patch: pytest.MonkeyPatch) -> None:
    _page_key(patch, lambda seq, mix, index, size: mix.key if seq.active_from == 0 else None)


@mutant
def the_page_of_an_invocation_has_the_key_of_the_base(patch: pytest.MonkeyPatch) -> None:
    _page_key(
        patch, lambda seq, mix, index, size: (seq.active_from, mix.key) if index * size >= seq.active_from else None
    )


@mutant
def prefix_key_has_the_page_of_the_invocation_alone(patch: pytest.MonkeyPatch) -> None:
    _page_key(
        patch,
        lambda seq, mix, index, size: (seq.active_from // size, mix.key) if index >= seq.active_from // size else None,
    )


@mutant
def prefix_key_has_no_images(patch: pytest.MonkeyPatch) -> None:
    _page_key(
        patch,
        lambda seq, mix, index, size: (seq.active_from, mix.key) if (index + 1) * size > seq.active_from else None,
    )


@mutant
def prefix_key_has_an_image_where_it_ends(patch: pytest.MonkeyPatch) -> None:
    original = Sequence.page_key

    def page_key(self: Sequence, page_index: int, page_size: int) -> bytes:
        whole, end = self.request, (page_index + 1) * page_size
        self._keys.clear()
        self.request = structs.replace(whole, media=tuple(one for one in whole.media if one.start + one.count <= end))
        try:
            return original(self, page_index, page_size)
        finally:
            self.request = whole

    patch.setattr(Sequence, "page_key", page_key)


@mutant
def pages_are_published_at_launch(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._launch

    def launch(self: Scheduler, batch: Batch, seq: Sequence, count: int) -> int:
        original(self, batch, seq, count)
        size = self.limits.page_size
        for index in range(min(seq.num_computed, len(seq.tokens)) // size):
            self.pool.keep(seq.pages[index], seq.page_key(index, size))
        return count

    patch.setattr(Scheduler, "_launch", launch)


def _cached_pages(self: Scheduler, seq: Sequence, length: int) -> list[int]:
    pages: list[int] = []
    for index in range(length // self.limits.page_size if self.limits.prefix_caching else 0):
        page = self.pool.find(seq.page_key(index, self.limits.page_size))
        if page is None:
            break
        pages.append(page)
    return pages


@mutant
def a_whole_prompt_comes_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_cached_pages", lambda self, seq: _cached_pages(self, seq, len(seq.tokens)))


@mutant
def prompt_logprobs_use_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_cached_pages", lambda self, seq: _cached_pages(self, seq, len(seq.tokens) - 1))


@mutant
def nan_stays_in_the_prefix_cache(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: pages of earlier chunks were known before the NaN was seen."""
    patch.setattr(Scheduler, "distrust", lambda self, seq: None)


# ---- adapters ----


@mutant
def a_leased_adapter_is_evicted(patch: pytest.MonkeyPatch) -> None:
    original = Residency.place

    def place(self: Residency[Any], version: AdapterVersion, *, wanted: Collection[int] = ()) -> Placement[Any] | None:
        leases, self._leases = self._leases, Counter()
        try:
            return original(self, version)
        finally:
            self._leases = leases

    patch.setattr(Residency, "place", place)


@mutant
def a_step_is_launched_before_its_adapter_has_landed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "on_device", Residency.placed)


@mutant
def an_adapter_is_evicted_while_it_arrives(patch: pytest.MonkeyPatch) -> None:
    original = Residency.place

    def place(self: Residency[Any], version: AdapterVersion, *, wanted: Collection[int] = ()) -> Placement[Any] | None:
        arriving, self._arriving = self._arriving, set()
        try:
            return original(self, version, wanted=wanted)
        finally:
            self._arriving |= {other for other in arriving if other in self._device}

    patch.setattr(Residency, "place", place)
    patch.setattr(Residency, "landed", lambda self, version: self._arriving.discard(version.id))


@mutant
def leases_of_several_answers_are_released_twice(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._give_back

    def give_back(self: Scheduler, seq: Sequence) -> None:
        original(self, seq)
        for version in seq.mix.versions if seq.mix and seq.params.n > 1 else ():
            self._residency.release(version)

    patch.setattr(Scheduler, "_give_back", give_back)


@mutant
def max_loras_is_not_enforced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slots, "admits", lambda self, seq: True)


@mutant
def a_placed_adapter_is_not_written_again(patch: pytest.MonkeyPatch) -> None:
    original = Adapters._bring
    written: set[tuple[int, int]] = set()

    def bring(self: Adapters, version: AdapterVersion, spared: set[int]) -> None:
        store = self._store
        if (id(self), version.id) in written:
            self._store = None
        original(self, version, spared)
        self._store = store
        if self._residency.on_device(version):
            written.add((id(self), version.id))

    patch.setattr(Adapters, "_bring", bring)


@mutant
def a_row_points_to_the_first_placement(patch: pytest.MonkeyPatch) -> None:
    original = Residency.pages
    first: dict[tuple[int, int], dict[int, list[int]]] = {}
    patch.setattr(
        Residency, "pages", lambda self, version: first.setdefault((id(self), version.id), original(self, version))
    )


@mutant
def an_adapter_from_memory_is_evicted(patch: pytest.MonkeyPatch) -> None:
    original = Residency.store

    def store(self: Residency[Any], version: AdapterVersion, weights: Any, *, wanted: Collection[int] = ()) -> None:
        original(self, version, weights, wanted=wanted)
        for old in list(self._host)[: max(0, len(self._host) - self.max_host)]:
            if old != version.id and not self._leases[old]:
                del self._host[old]

    patch.setattr(Residency, "store", store)


@mutant
def a_changed_adapter_is_taken(patch: pytest.MonkeyPatch) -> None:
    def landed(self: Adapters, version: AdapterVersion, weights: Any) -> None:
        self.stirred = True
        self.reading.discard(version.id)
        self._residency.store(version, weights)

    patch.setattr(Adapters, "landed", landed)


@mutant
def a_failed_read_fails_everybody(patch: pytest.MonkeyPatch) -> None:
    def failed(self: Adapters, version: AdapterVersion, error: Exception) -> None:
        self.stirred = True
        self.reading.discard(version.id)
        for mix in self._requests.mixes():
            for other in mix.versions:
                self._requests.fail_waiting(other, error)

    patch.setattr(Adapters, "failed", failed)


@mutant
def later_mixes_are_spared(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: two mixes that do not fit together waited for each other for ever."""

    def place(self: Adapters) -> None:
        self._look_for_landed()
        spared = self._wanted()
        for mix in self._scheduler.wanted(self.reading):
            for version in mix.versions:
                if self._missing(version):
                    self._read(version)
                if self._residency.in_host(version) and not self._residency.placed(version):
                    self._bring(version, spared)

    patch.setattr(Adapters, "place", place)


@mutant
def a_mix_that_never_fits_waits(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: it waited for ever, and after its patience so did everybody with an adapter."""
    patch.setattr(Residency, "fits", lambda self, versions: True)


# ---- sequences and turns ----


@mutant
def nobody_loses_patience(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._admit
    patch.setattr(
        Scheduler, "_admit", lambda self, batch, budget, now, arriving: original(self, batch, budget, 0.0, arriving)
    )


@mutant
def a_closed_mix_lets_more_in(patch: pytest.MonkeyPatch) -> None:
    original = Slots.admits

    def admits(self: Slots, seq: Sequence) -> bool:
        return original(self, seq) or seq.mix in self.active

    patch.setattr(Slots, "admits", admits)


@mutant
def a_slow_read_closes_the_door(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: one hanging disk, and after its patience nobody with an adapter got in."""
    original = Scheduler._admit
    patch.setattr(
        Scheduler, "_admit", lambda self, batch, budget, now, arriving: original(self, batch, budget, now, ())
    )


@mutant
def aborted_while_waiting_stays_queued(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "_remove_waiting", lambda self, seq: None)


@mutant
def preempted_keeps_num_computed(patch: pytest.MonkeyPatch) -> None:
    computed: dict[Sequence, int] = {}
    give_back, start = Scheduler._give_back, Scheduler._start

    def remember(self: Scheduler, seq: Sequence) -> None:
        computed[seq] = seq.num_computed
        give_back(self, seq)

    def keep(self: Scheduler, seq: Sequence, budget: int) -> int:
        count = start(self, seq, budget)
        done = computed.pop(seq, 0) if count else 0
        if seq.num_computed < done < seq.num_computed + count:
            count -= done - seq.num_computed
            seq.num_computed = done
        return count

    patch.setattr(Scheduler, "_give_back", remember)
    patch.setattr(Scheduler, "_start", keep)


@mutant
def preempted_is_woken_by_its_answer(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        if seq.mix is not None:
            seq.active_from = seq.mix.active_from(seq.tokens)
        original(self, seq)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def preempted_forgets_its_answer(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        del seq.tokens[seq.num_prompt :]
        original(self, seq)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def preempted_ones_change_places(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: two preempted in flight came back in the wrong order."""

    def add(self: Queues, seq: Sequence) -> None:
        queue = self._queues.setdefault(seq.mix, deque())
        if queue and queue[0].number > seq.number:
            queue.appendleft(seq)
        else:
            queue.append(seq)

    patch.setattr(Queues, "add", add)


@mutant
def samples_of_neighbours_are_swapped(patch: pytest.MonkeyPatch) -> None:
    original = Engine._settle

    def settle(self: Engine, batch: Batch, landed: Any) -> Any:
        rows = [row for row, sampled in enumerate(landed.sampled) if sampled is not None]
        for row, other in zip(rows[::2], rows[1::2]):
            landed.sampled[row], landed.sampled[other] = landed.sampled[other], landed.sampled[row]
        return original(self, batch, landed)

    patch.setattr(Engine, "_settle", settle)


@mutant
def a_read_stalls_whoever_needs_none(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: a base request waited for another's adapter to land."""
    patch.setattr(
        Engine,
        "stalled",
        property(
            lambda self: (
                bool(self.adapters.reading)
                and not self.scheduler.running
                and not self._in_flight
                and not self._undelivered
            )
        ),
    )


@mutant
def an_error_follows_an_abort(patch: pytest.MonkeyPatch) -> None:
    """This engine had it: an error not yet handed out reached whoever took the id next."""
    original = Engine.abort

    def abort(self: Engine, request_id: str, index: int | None = None) -> None:
        undelivered = self._undelivered
        original(self, request_id, index)
        self._undelivered = undelivered

    patch.setattr(Engine, "abort", abort)


# ---- the life of adapters ----


@mutant
def a_pinned_version_is_evicted_from_host_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "_stays", lambda self, number: self._host[number][0].source is None)


@mutant
def pins_take_no_room(patch: pytest.MonkeyPatch) -> None:
    def fits(self: Residency[Any], versions: Collection[AdapterVersion]) -> bool:
        return all(spare >= 0 for spare in self._spare_pages(list(versions)))

    patch.setattr(Residency, "fits", fits)


@mutant
def a_removed_version_is_dropped_while_somebody_needs_it(patch: pytest.MonkeyPatch) -> None:
    def sweep(self: Adapters) -> None:
        for version in list(self._going.values()):
            if self._residency.drop(version):
                del self._going[version.id]

    patch.setattr(Adapters, "sweep", sweep)


@mutant
def a_removed_version_is_never_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adapters, "sweep", lambda self: None)


@mutant
def a_shelved_version_is_never_evicted(patch: pytest.MonkeyPatch) -> None:
    original = Residency._stays
    patch.setattr(Residency, "_stays", lambda self, number: number in self._shelved or original(self, number))


@mutant
def a_shelved_version_keeps_its_pages(patch: pytest.MonkeyPatch) -> None:
    def shelve(self: Residency[Any], version: AdapterVersion) -> bool:
        self._retired.discard(version.id)
        return True

    patch.setattr(Residency, "shelve", shelve)


@mutant
def a_revived_version_is_swept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adapters, "revive", lambda self, version: self._residency.revive(version))


# ---- grammars ----


@mutant
def a_grammar_is_launched_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "unsure", property(lambda self: self.matcher is not None and not self.matcher.ready))


@mutant
def a_mask_is_used_before_it_is_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "miss", lambda self, run: None)


@mutant
def a_token_that_was_missed_counts_as_computed(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler.miss

    def miss(self: Scheduler, run: Scheduled) -> None:
        original(self, run)
        run.seq.num_computed += 1

    patch.setattr(Scheduler, "miss", miss)


@mutant
def what_was_chosen_without_a_mask_is_told(patch: pytest.MonkeyPatch) -> None:
    original = Engine._settle

    def settle(self: Engine, batch: Batch, landed: Landed) -> list[TokenDelta]:
        missed = [run for run in batch.runs if run.missed]
        deltas = original(self, batch, landed)
        for run, sampled in zip(batch.runs, landed.sampled):
            if run in missed and sampled is not None and not run.seq.finished:
                self._append(run.seq, sampled)
        return deltas

    patch.setattr(Engine, "_settle", settle)


@mutant
def a_preempted_grammar_begins_again(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, seq: Sequence) -> None:
        if seq.request.grammar is not None:
            seq.matcher = seq.request.grammar.begin()
        original(self, seq)

    patch.setattr(Scheduler, "_preempt", preempt)


@mutant
def a_grammar_that_failed_goes_on(patch: pytest.MonkeyPatch) -> None:
    original = Engine._end

    def end(self: Engine, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> None:
        if not isinstance(error, GrammarError):
            original(self, seq, reason, error)

    patch.setattr(Engine, "_end", end)
