"""World: the real books on a fake device, each answer held against the one it would have got alone."""

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, cast

from aiolora.engine.core import Ends, Engine
from aiolora.engine.scheduler import Scheduler, SchedulerLimits
from aiolora.engine.sequence import Sequence, Status
from aiolora.errors import AdapterChangedError, AdapterError, AdapterMemoryError, GrammarError, NonFiniteLogitsError
from aiolora.lora.kinds import Room
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.residency import Residency
from aiolora.types import AdapterVersion, MediaItem, Mix, Request, SamplingParams, SitePages, TokenDelta
from tests.engine.device import (
    EOS,
    KINDS,
    POISON,
    FakeGrammar,
    FakeMasks,
    FakeRunner,
    FakeStore,
    FakeWeights,
    InvariantError,
    TrackedPool,
    logprob_of,
    require,
    tags_of,
    token_of,
)


@dataclass
class Answer:
    """One of a request's answers, as it came, beside what it would be alone."""

    tokens: list[int]
    tags: list[int] = field(default_factory=list)
    num_output: int = 0
    ended: str | None = None


class Ticket:
    """A request and the oracle's view of it."""

    def __init__(self, request: Request, max_model_len: int) -> None:
        self.request = request
        self.answers = [Answer(list(request.prompt_token_ids)) for _ in range(request.params.n)]
        self.max_length = min(max_model_len, len(request.prompt_token_ids) + (request.params.max_tokens or 10**9))
        self.first_delta_s: float | None = None
        self.aborted = False  # one of its adapters was removed by force
        self.too_large = False  # its adapters, beside those that were pinned when it came

    @property
    def open(self) -> bool:
        return any(answer.ended is None for answer in self.answers)

    def feed(self, delta: TokenDelta) -> None:
        """Hold a delta with a token against the oracle."""
        answer, params = self.answers[delta.index], self.request.params
        tags = tags_of(self.request, answer.tokens, answer.tags)
        token = token_of(tags, cast("int", params.seed) + delta.index)
        label = f"{self.request.id}[{delta.index}] token {answer.num_output}"
        require(delta.token_id == token, "output equals the solo oracle", f"{label}: {delta.token_id} != {token}")
        require(delta.logprob == logprob_of(tags[-1]), "logprob equals the solo oracle", label)
        wanted = None
        if params.prompt_logprobs is not None and answer.num_output == 0 and delta.index == 0:
            prompt = self.request.prompt_token_ids
            wanted = (None, *[((prompt[i], logprob_of(tags[i - 1]), 1),) for i in range(1, len(prompt))])
        require(delta.prompt_logprobs == wanted, "prompt logprobs equal the solo oracle", label)
        answer.tokens.append(token)
        answer.num_output += 1
        reason = None
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            reason = "stop"
        elif len(answer.tokens) >= self.max_length:
            reason = "length"
        require(delta.finish_reason == reason, "it ends where the solo oracle ends", label)
        answer.ended = reason


class ReadFailedError(AdapterError):
    """The folder of an adapter could not be read again."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one walk's engine."""

    limits: SchedulerLimits
    num_pages: int
    adapter_pages: int
    max_host: int
    max_model_len: int


class World:
    """One engine on a fake device, its adapters, its requests and its clock; checks itself after every operation."""

    def __init__(
        self,
        shape: Shape,
        *,
        overlaps: bool,
        seed: int = 0,
        copy_delay: Callable[[], int] = lambda: 0,
        mask_delay: Callable[[], int] = lambda: 0,
    ) -> None:
        """How often an adapter's copy is asked after before it has landed, and a mask waited for before it is there."""
        self.shape = shape
        self.now_s = 1000.0
        self.pool = TrackedPool(shape.num_pages)
        vectors = shape.limits.max_loras
        self.residency: Residency[AdapterWeights] = Residency(
            KINDS, Room(shape.adapter_pages, vectors), max_host=shape.max_host
        )
        self.room = Room(shape.adapter_pages, vectors).pages(KINDS)
        self.store = FakeStore(copy_delay)
        self.scheduler = Scheduler(shape.limits, self.pool, self.residency)
        self.runner = FakeRunner(shape.limits, self.pool, self.residency, self.store, overlaps=overlaps)
        self.masks = FakeMasks(mask_delay)
        self.runner.passed = lambda: self.masks.wait(0)
        self.engine = Engine(
            self.scheduler,
            cast("Any", self.runner),
            self.residency,
            self.store,
            ends=Ends(eos_token_ids=frozenset({EOS}), max_model_len=shape.max_model_len),
            seed=seed,
            masks=cast("Any", self.masks),
            read_again=self._read_again,
            clock=lambda: self.now_s,
        )
        self.tickets: dict[str, Ticket] = {}
        self.reads: dict[int, AdapterVersion] = {}  # asked for and not answered
        self.answer_at_once: Callable[[AdapterVersion], str | None] = lambda version: "ok"
        self.failures: dict[int, list[Exception]] = {}  # version id -> what its reads failed with
        self.in_memory: list[AdapterVersion] = []
        self.removed: list[AdapterVersion] = []
        self.shelved: list[AdapterVersion] = []
        self._kept: set[tuple[str, int]] = set()  # pinned versions, by the level that they are on
        self._num_versions = 0
        self._num_requests = 0

    # -- adapters --

    def version(
        self, name: str, needs: dict[int, int], *, source: str | None = "folder", invocation: tuple[int, ...] = ()
    ) -> AdapterVersion:
        """A new version of `name`, in host memory; `needs`: kind, of ranks or of vectors -> pages."""
        self._num_versions += 1
        digest = sha256(f"{name} {self._num_versions}".encode()).hexdigest()
        pages = tuple(SitePages(kind, count, 1.0) for kind, count in needs.items())
        additive = max(needs) < KINDS.sites and not invocation
        version = AdapterVersion(
            self._num_versions, name, digest, source, 8, pages, 0, additive=additive, invocation=invocation
        )
        self.engine.adapters.add(self._weights(version))
        if source is None:
            self.in_memory.append(version)
        return version

    def remove(self, version: AdapterVersion, *, force: bool = False) -> None:
        """Its name is gone, and its bytes from memory with it, once nobody needs them. `force`: those are aborted."""
        if version in self.in_memory:
            self.in_memory.remove(version)
        self.removed.append(version)
        if force:
            for ticket in self.tickets.values():
                if ticket.open and ticket.request.mix is not None and version in ticket.request.mix.versions:
                    ticket.aborted = True
        self.engine.adapters.drop(version, force=force)

    def replace(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """The name of `old` stands for `new`, which is in host memory; `old` is kept while there is room."""
        if old in self.in_memory:
            self.in_memory.remove(old)
        self.shelved.append(old)
        self.engine.adapters.replace(old, new, keep=True)

    def revive(self, version: AdapterVersion) -> bool:
        """Whether a name may stand for a shelved version again."""
        if not self.engine.adapters.revive(version):
            return False
        self.shelved.remove(version)
        if version.source is None:
            self.in_memory.append(version)
        return True

    def answer(self, version: AdapterVersion, outcome: str) -> None:
        """What `read_again(version)` brought: "ok", "changed" or "error"."""
        del self.reads[version.id]
        if outcome == "error":
            failed = ReadFailedError(version.name, "the folder is gone")
            self.failures.setdefault(version.id, []).append(failed)
            self.engine.adapters.failed(version, failed)
            return
        self._num_versions += 1
        digest = version.digest if outcome == "ok" else sha256(f"changed {self._num_versions}".encode()).hexdigest()
        again = AdapterVersion(
            self._num_versions, version.name, digest, version.source, 8, version.pages, 0, additive=version.additive
        )
        if outcome == "changed":
            self.failures.setdefault(version.id, []).append(AdapterChangedError(version.name, ""))
        self.engine.adapters.landed(version, self._weights(again))

    def _weights(self, version: AdapterVersion) -> AdapterWeights:
        return cast("AdapterWeights", FakeWeights(version))

    def _read_again(self, version: AdapterVersion) -> None:
        require(version.source is not None, "an adapter from memory cannot be read again", version.label)
        require(version.id not in self.reads, "one read at a time", version.label)
        self.reads[version.id] = version
        outcome = self.answer_at_once(version)
        if outcome is not None:
            self.answer(version, outcome)

    # -- requests --

    def submit(
        self,
        prompt: Items[int],
        mix: Mix | None = None,
        *,
        id: str | None = None,  # noqa: A002
        priority: int = 0,
        constrained: bool = False,
        media: tuple[MediaItem, ...] = (),
        **params: Any,
    ) -> Ticket:
        self._num_requests += 1
        params.setdefault("seed", self._num_requests * 1000)
        request = Request(
            id=id or f"r{self._num_requests}",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**params),
            mix=mix,
            priority=priority,
            arrival_s=self.now_s,
            grammar=FakeGrammar() if constrained else None,
            media=media,
        )
        ticket = self.tickets[request.id] = Ticket(request, self.shape.max_model_len)
        needs: Counter[int] = Counter()
        for version in {*mix.versions, *self.residency._pinned.values()} if mix else ():
            needs.update({site.kind: site.count for site in version.pages})
        ticket.too_large = any(count > self.room[kind] for kind, count in needs.items())
        self.engine.add(request)
        return ticket

    def abort(self, ticket: Ticket, index: int | None = None) -> None:
        self.engine.abort(ticket.request.id, index)
        for number, answer in enumerate(ticket.answers):
            if index in (None, number) and answer.ended is None:
                answer.ended = "abort"

    def sequences(self, ticket: Ticket) -> list[Sequence]:
        return [seq for seq in self.engine._sequences.get(ticket.request.id, []) if seq.request is ticket.request]

    # -- time --

    def step(self, *, dt_s: float = 0.01) -> list[TokenDelta]:
        self.now_s += dt_s
        stalled, launches = self.engine.stalled, self.runner.num_launches
        deltas = self.engine.step()
        if stalled:
            require(not deltas and self.runner.num_launches == launches, "stalled, and yet there was work")
        for delta in deltas:
            self._deliver(delta)
        return deltas

    def drain(self, *, steps: int = 3000) -> None:
        """Let everything end, and check that nothing is left."""
        self.answer_at_once = lambda version: "ok"
        for _ in range(steps):
            for version in list(self.reads.values()):
                self.answer(version, "ok")
            if not self.engine.has_work:
                break
            require(not self.engine.stalled, "stalled without a read")
            self.step(dt_s=0.05)
            self.verify()
        require(not self.engine.has_work, "it drains", f"{self.engine.snapshot()}")
        unended = [ticket.request.id for ticket in self.tickets.values() if ticket.open]
        require(not unended, "every request ends", unended)
        require(not any(self.pool.refs(page) for page in range(self.pool.num_pages)), "all pages are free or idle")
        require(self.pool.num_available == self.pool.num_pages, "all pages are available")
        require(not self.residency._leases, "no leases are left")
        require(self.scheduler.idle and not self.scheduler._slots.active, "nothing is active")
        require(not self.runner.outstanding and not self.engine.adapters.reading, "nothing is under way")
        arriving = {version.id for version, _ in self.engine.adapters.copying}
        require(self.residency._arriving == arriving, "whoever arrives is watched", arriving)

    def _deliver(self, delta: TokenDelta) -> None:
        ticket = self.tickets.get(delta.request_id)
        if ticket is None:
            raise InvariantError("a delta belongs to a request", delta.request_id)
        answer = ticket.answers[delta.index]
        label = f"{delta.request_id}[{delta.index}]"
        require(answer.ended is None, "nothing follows the end", f"{label}: {answer.ended}, then {delta}")
        if ticket.first_delta_s is None:
            ticket.first_delta_s = self.now_s
        if delta.token_id is not None:
            ticket.feed(delta)
            return
        if delta.finish_reason == "abort":
            require(ticket.aborted, "nobody else's removal ends a request", label)
            answer.ended = "abort"
            return
        require(delta.finish_reason == "error", "a delta without a token ends with an error", delta)
        answer.ended = "error"
        self._check_error(ticket, delta)

    def _check_error(self, ticket: Ticket, delta: TokenDelta) -> None:
        """Only its own adapter, or its own numbers, can fail a request."""
        error, mix = delta.error, ticket.request.mix
        if isinstance(error, NonFiniteLogitsError):
            found = [s for s in self.runner.truth if s.request is ticket.request and s.index == delta.index]
            require(bool(found) and self.runner.truth[found[0]].non_finite, "its own logits were not finite")
            size = self.shape.limits.page_size
            for page in self.runner.truth[found[0]].table:
                held = self.runner.kv[page * size : (page + 1) * size]
                require(POISON not in held or not self.pool.keyed(page), "NaN is not left in the prefix cache", page)
        elif isinstance(error, GrammarError):
            require(ticket.request.grammar is not None, "its own grammar was too complex")
        elif isinstance(error, (AdapterChangedError, ReadFailedError)):
            kinds = [type(one) for version in mix.versions for one in self.failures.get(version.id, [])] if mix else []
            require(type(error) in kinds, "the adapter of this request failed", error)
        else:
            require(isinstance(error, AdapterMemoryError), "a known error", repr(error))
            require(ticket.too_large, "too large for the room", error)

    # -- invariants --

    def verify(self) -> None:
        """All that must hold between two operations."""
        self.scheduler.check()
        scheduler, runner = self.scheduler, self.runner
        runner.holders = holders = [seq for seq in runner.holders if seq.holds]
        owners = Counter(page for seq in holders for page in seq.pages)
        refs = {page: self.pool.refs(page) for page in range(self.pool.num_pages) if self.pool.refs(page)}
        require(owners == refs, "refs equal owners", f"{dict(owners)} {refs}")
        leases = Counter(version.id for seq in holders if seq.mix for version in seq.mix.versions)
        require(leases == self.residency._leases, "leases equal holders", f"{leases} {self.residency._leases}")
        active = Counter(seq.mix for seq in holders if seq.mix)
        require(active == scheduler._slots.active, "active mixes equal holders")
        names = Counter(name for seq in holders if seq.mix for name in {version.name for version in seq.mix.versions})
        require(names == scheduler.shares._running, "answers of an adapter equal holders")
        require(len(active) <= self.shape.limits.max_loras, "max_loras")
        flights = Counter(work.seq for flight in runner.outstanding for work in flight.works)
        size = self.shape.limits.page_size
        for seq in holders:
            require(seq.num_flights == flights[seq], "flights of a sequence", seq.num_flights)
            computed = seq.num_computed + seq.missed  # and what is to be computed again
            require(len(seq.pages) == -(-computed // size), "pages for what is computed", len(seq.pages))
        self._verify_places(holders)
        lost = [version for version in self.in_memory if not self.residency.in_host(version)]
        require(not lost, "an adapter from memory stays in host memory", lost)
        mixes = [ticket.request.mix for ticket in self.tickets.values() if ticket.open]
        levels = {"host": self.residency._host, "device": self.residency._device}
        kept = {
            (level, number) for level, held in levels.items() for number in self.residency._pinned if number in held
        }
        evicted = [place for place in self._kept - kept if place[1] in self.residency._pinned]
        require(not evicted, "what is pinned stays", evicted)
        self._kept = kept
        needed = {version for mix in mixes if mix is not None for version in mix.versions}
        for version in self.removed:
            under_way = (
                self.residency.leased(version) or version in needed or version.id in self.engine.adapters.reading
            )
            held = self.residency.in_host(version) or self.residency.placed(version)
            arriving = version.id in self.residency._arriving
            require(under_way or arriving or not held, "what has no name and no request is free", version.label)
        for version in self.shelved:
            read = version.id in self.engine.adapters.reading
            under_way = self.residency.leased(version) or version in needed or read
            arriving = version.id in self.residency._arriving
            free = not self.residency.placed(version)
            require(under_way or arriving or free, "what is shelved takes nothing on the device", version.label)
        guests, surplus = self.residency._shelved, len(self.residency._host) - self.shape.max_host
        require(surplus <= 0 or not guests, "what is shelved is the first to go", guests)

    def _verify_places(self, holders: list[Sequence]) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting())
        for mix, queue in scheduler._queues._queues.items():
            turns = [seq.turn for seq in queue]
            require(bool(queue) and turns == sorted(turns), "a queue is in order of arrival and priority", turns)
            require(all(seq.mix == mix and seq.status is Status.WAITING for seq in queue), "a queue of one mix")
        live = [seq for seqs in self.engine._sequences.values() for seq in seqs if not seq.finished]
        places = Counter(map(id, [*scheduler.running, *waiting]))
        places.update(id(seq) for seq in holders if seq.status is Status.WAITING and seq.num_flights)
        require(places == Counter(map(id, live)), "each sequence is in one place", f"{len(places)} {len(live)}")
        require(all(seq.status is Status.RUNNING for seq in scheduler.running), "running ones run")
        promised = sum(answer.ended is None for ticket in self.tickets.values() for answer in ticket.answers)
        undelivered = [delta for delta in self.engine._undelivered if delta.finish_reason]
        require(promised == len(live) + len(undelivered), "whoever waits is known", f"{promised} {len(live)}")
