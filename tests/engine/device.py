"""A device made of tags, for the real Engine, Scheduler, PagePool and Residency.

It keeps for every KV slot a hash of (adapters read, all tokens up to there), and for every adapter page whose it
is. A launched step is carried out as late as a GPU might: only when it lands, with the page tables of its launch. So a
page that changes hands too early, a shared prefix of another adapter or a stale rank page is seen where it is read,
and tokens follow from what was read, so that every answer can be held against the one it would have got alone.
"""

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import cast

from aiolora.engine.batch import logit_offsets, num_bare
from aiolora.engine.runner import Landed
from aiolora.engine.sampler import Sampled
from aiolora.engine.scheduler import Batch, Scheduled, SchedulerLimits
from aiolora.engine.sequence import Sequence, Status
from aiolora.lora.kinds import PageKinds
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.residency import Residency
from aiolora.pages import PagePool
from aiolora.types import AdapterVersion, Request

KINDS = PageKinds(2)
VOCAB = 12
EOS = 11
TORN = "0"  # the digest of bytes that are being overwritten
POISON = "nan"  # what a slot holds after its numbers were NaN

Tag = int | str | None


class InvariantError(AssertionError):
    """An invariant does not hold; `check` names it."""

    def __init__(self, check: str, detail: object = "") -> None:
        super().__init__(f"{check}: {detail}")
        self.check = check


def require(holds: bool, check: str, detail: object = "") -> None:
    if not holds:
        raise InvariantError(check, detail)


# ---- what a model made of tags computes; device and oracle share only these lines ----


def mix_tag(parts: Items[tuple[str, float]]) -> int:
    """Of (digest, weight) pairs; the base model has none."""
    return hash(tuple((int(digest, 16), weight) for digest, weight in parts))


def next_tag(before: int, token: int, position: int, mix: int) -> int:
    """Of a token behind the one tagged `before` (0: the first), computed with the mix tagged `mix`."""
    return hash((before, token, position, mix))


def token_of(tags: Items[Tag], seed: int) -> int:
    """The next token, from the tags of the whole prefix."""
    return (hash((tuple(tags), seed)) >> 9) % VOCAB


def logprob_of(tag: Tag) -> float:
    return -1 - (cast("int", tag) & 0xFFF) / 4096


def tags_of(request: Request, tokens: Items[int], known: list[int] | None = None) -> list[int]:
    """Of the prefix `tokens` of an answer to `request`; continues `known` in place."""
    tags = [] if known is None else known
    parts = [] if request.mix is None else [(version.digest, weight) for version, weight in request.mix.parts]
    for position in range(len(tags), len(tokens)):
        mix = mix_tag(parts if awake(request, position) else [])
        seen = seen_at(request, position, tokens[position])
        tags.append(next_tag(tags[-1] if tags else 0, seen, position, mix))
    return tags


def seen_at(request: Request, position: int, token: int) -> int:
    """What the model is given there: the token, or some of the image that it stands for."""
    for item in request.media:
        if item.start <= position < item.start + item.count:
            return hash((int.from_bytes(item.digest), position - item.start))
    return token


def awake(request: Request, position: int) -> bool:
    """Whether the adapters of `request` are at work there: no invocation of theirs begins later in the prompt."""
    invocation = request.mix.versions[0].invocation if request.mix else ()
    prompt, size = request.prompt_token_ids, len(invocation)
    starts = [start for start in range(len(prompt)) if prompt[start : start + size] == invocation]
    return not invocation or (bool(starts) and position >= max(starts))


# ---- the device ----


class TrackedPool(PagePool):
    """Counts how often each page changed hands and shows the device what is kept for others to find."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.turns = [0] * num_pages
        self.on_keep: Callable[[int, bytes], None] = lambda page, key: None

    def take(self, count: int) -> list[int] | None:
        pages = super().take(count)
        for page in pages or ():
            self.turns[page] += 1
        return pages

    def keep(self, page: int, key: bytes) -> None:
        self.on_keep(page, key)
        super().keep(page, key)

    def keyed(self, page: int) -> bool:
        return page in self._key_of_page


class FakeWeights:
    """Weights that are nothing but their version."""

    def __init__(self, version: AdapterVersion) -> None:
        self.version = version


class FakeArrival:
    """A copy that lands when it has been asked after `delay` times; until then the pages hold neither old nor new."""

    def __init__(self, store: "FakeStore", digest: str, pages: dict[int, list[int]], delay: int) -> None:
        self._store = store
        self._digest = digest
        self._pages = pages
        self.left = delay
        self._put(TORN)

    def done(self) -> bool:
        self.left -= 1
        if self.left == -1:
            self._put(self._digest)
        return self.left < 0

    def wait(self) -> None:
        self._store.num_waits += 1
        self.left = min(self.left, 0)

    def _put(self, digest: str) -> None:
        for kind, numbers in self._pages.items():
            for index, page in enumerate(numbers):
                self._store.contents[kind, page] = (digest, kind, index)


class FakeStore:
    """Whose page of which kind lies where: (kind, page) -> (digest, kind, index in the adapter)."""

    def __init__(self, delay: Callable[[], int]) -> None:
        self.contents: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.num_waits = 0
        self._delay = delay

    def write(self, weights: AdapterWeights, pages: dict[int, list[int]]) -> FakeArrival:
        copied = {kind: list(numbers) for kind, numbers in pages.items()}
        return FakeArrival(self, weights.version.digest, copied, self._delay())


@dataclass
class Work:
    """A run as it was packed at launch."""

    run: Scheduled
    start: int
    tokens: list[int]  # known at launch; the last may be missing
    table: list[int]
    turns: list[int]  # of those pages
    adapters: list[tuple[list[tuple[int, int]], float]]  # pages of each adapter, and its weight
    bare: int  # of its first tokens, how many take no adapter
    offsets: list[int]  # whose logits are wanted
    samples: bool
    count: int
    seen: int | None = None  # tokens that its grammar had seen when it was chosen from
    missed: bool = False  # nothing is chosen, as its grammar had not seen them

    @property
    def seq(self) -> Sequence:
        return self.run.seq


@dataclass
class Truth:
    """What one sequence is in truth: its tokens as the device sampled them, and the tags of that prefix."""

    tokens: list[int]
    tags: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)  # pages of its last step
    non_finite: bool = False


class FakeMatcher:
    """Knows which tokens it has seen, and takes one out of 40 for too complex a grammar."""

    def __init__(self) -> None:
        self.ready = True
        self.bits = b""
        self.error: str | None = None
        self.slow = self.suspect = False
        self.seen: list[int] = []

    def advance(self, token: int) -> None:
        self.seen.append(token)
        if hash(tuple(self.seen)) % 40 == 0:
            self.error = "too complex"
        self.slow = hash((*self.seen, "slow")) % 3 == 0
        self.ready = True


class FakeGrammar:
    def begin(self, ends: object = None) -> FakeMatcher:
        return FakeMatcher()


class FakeMasks:
    """Masks that are there when they were waited for, or a step has passed, `delay` times; or until the first are."""

    def __init__(self, delay: Callable[[], int]) -> None:
        self._delay = delay
        self._jobs: list[tuple[int, list[tuple[FakeMatcher, int]]]] = []

    def advance(self, landed: list[tuple[FakeMatcher, int]]) -> None:
        for matcher, _ in landed:
            require(matcher.ready, "a grammar takes one token at a time")
            matcher.ready = False
        self._jobs.append((self._delay(), landed))

    def wait(self, timeout_s: float | None) -> None:
        passed = 1 if timeout_s is not None else min((left for left, _ in self._jobs), default=0) + 1
        for left, landed in self._jobs:
            for matcher, token in landed if left < passed else ():
                matcher.advance(token)
        self._jobs = [(left - passed, landed) for left, landed in self._jobs if left >= passed]


class FakeFlight:
    def __init__(self, batch: Batch, works: list[Work], device: "FakeRunner") -> None:
        self.batch = batch
        self.works = works
        self._device = device

    def land(self) -> Landed:
        return self._device.execute(self)


class FakeRunner:
    """Computes tags. Steps are carried out in the order of their launch, each when it lands."""

    def __init__(
        self,
        limits: SchedulerLimits,
        pool: TrackedPool,
        residency: Residency[AdapterWeights],
        store: FakeStore,
        *,
        overlaps: bool,
    ) -> None:
        self.overlaps = overlaps
        self._limits = limits
        self._pool = pool
        self._residency = residency
        self._store = store
        self.kv: list[Tag] = [None] * (pool.num_pages * limits.page_size)
        self.truth: dict[Sequence, Truth] = {}
        self.holders: list[Sequence] = []
        self.outstanding: list[FakeFlight] = []
        self.num_launches = 0
        self.faults: dict[Sequence, str] = {}
        self.passed: Callable[[], None] = lambda: None  # what to call when a step has
        self._last: dict[Sequence, tuple[int, int]] = {}  # position and id of the token sampled last
        self._contents_of_key: dict[bytes, list[Tag]] = {}
        pool.on_keep = self._kept

    def slot(self, table: list[int], position: int) -> int:
        size = self._limits.page_size
        return table[position // size] * size + position % size

    def launch(self, batch: Batch, look_for_masks: Callable[[Batch], None]) -> FakeFlight:
        limits = self._limits
        seqs = [run.seq for run in batch.runs]
        require(0 < batch.num_tokens <= limits.max_num_batched_tokens, "token budget", batch.num_tokens)
        require(len(set(map(id, seqs))) == len(seqs) <= limits.max_num_seqs, "each sequence once, not too many")
        mixes = {seq.mix for seq in seqs} - {None}
        require(len(mixes) <= limits.max_loras, "max_loras in a batch", len(mixes))
        begun = sum(
            run.start <= one.start < run.start + run.count for run in batch.runs for one in run.seq.request.media
        )
        require(begun <= limits.media_items or not limits.chunked_prefill, "items that begin in a step", begun)
        counts = [run.count for run in batch.runs]
        require(sorted(counts, key=lambda count: count > 1) == counts, "single tokens first", counts)
        flight = FakeFlight(batch, [self._pack(run) for run in batch.runs], self)
        written = Counter(
            self.slot(work.table, work.start + offset) for work in flight.works for offset in range(work.count)
        )
        require(max(written.values()) == 1, "two tokens in one slot")
        look_for_masks(batch)
        for work in flight.works:
            work.seen, work.missed = self._seen(work.run), work.run.missed
        self.outstanding.append(flight)
        self.num_launches += 1
        return flight

    def execute(self, flight: FakeFlight) -> Landed:
        require(self.outstanding[0] is flight, "flights land in order")
        self.outstanding.pop(0)
        sampled, prompt = [], []
        for work in flight.works:
            one, several = self._carry_out(work)
            sampled.append(one)
            prompt.append(several)
        self.passed()
        return Landed(sampled, prompt)

    def _pack(self, run: Scheduled) -> Work:
        seq, start, end = run.seq, run.start, run.start + run.count
        truth = self.truth.setdefault(seq, Truth(list(seq.request.prompt_token_ids)))
        if seq not in self.holders:
            self.holders.append(seq)
        require(seq.status is Status.RUNNING, "only running sequences are launched", seq.status)
        require(run.count >= 1, "a run has tokens")
        require(seq.tokens == truth.tokens[: len(seq.tokens)], "tokens were lost or repeated", seq.tokens)
        require(len(seq.pages) * self._limits.page_size >= end, "pages for every token")
        size = self._limits.page_size
        for page in seq.pages:
            require(self._pool.refs(page) >= 1, "a launched page is owned", page)
        for page in seq.pages[start // size : -(-end // size)]:
            require(self._pool.refs(page) == 1, "a written page has one owner", page)
            require(not self._pool.keyed(page), "a written page cannot be found", page)
        self._check_prefix(seq, start, truth)
        adapters = []
        for version, weight in [] if seq.mix is None else seq.mix.parts:
            require(self._residency.on_device(version), "a running adapter is on the device", version.label)
            placed = self._residency.pages(version)
            places = [(site.kind, page) for site in version.pages for page in placed[site.kind]]
            wanted = [(version.digest, site.kind, index) for site in version.pages for index in range(site.count)]
            held = [self._store.contents.get(place) for place in places]
            require(held == wanted, "adapter pages hold the version", f"{version.label}: {held}")
            adapters.append((places, weight))
        return Work(
            run,
            start,
            seq.tokens[start:end],
            list(seq.pages),
            [self._pool.turns[page] for page in seq.pages],
            adapters,
            num_bare(run),
            logit_offsets(run),
            run.samples,
            run.count,
        )

    def _seen(self, run: Scheduled) -> int | None:
        matcher = cast("FakeMatcher | None", run.seq.matcher)
        if matcher is None or not run.samples or run.missed:
            return None
        require(matcher.ready and matcher.error is None, "a mask that is used is there", matcher.error)
        require(matcher.seen == run.seq.tokens[run.seq.num_prompt :], "a grammar sees the answer", matcher.seen)
        return len(matcher.seen)

    def _check_prefix(self, seq: Sequence, start: int, truth: Truth) -> None:
        """At launch all of the prefix has landed, but for what this sequence's own last flight is about to write."""
        own = {
            position
            for flight in self.outstanding
            for work in flight.works
            if work.seq is seq
            for position in range(work.start, work.start + work.count)
        }
        expected = tags_of(seq.request, truth.tokens[:start], truth.tags)
        for position in range(start):
            tag = self.kv[self.slot(seq.pages, position)]
            if position not in own and tag != expected[position] and tag != POISON:
                raise InvariantError("KV of the prefix at launch", f"{seq.request.id} position {position}")

    def _carry_out(self, work: Work) -> tuple[Sampled | None, list[Sampled]]:
        seq, truth = work.seq, self.truth[work.seq]
        for page, turn in zip(work.table, work.turns):
            fresh = self._pool.turns[page] == turn and self._pool.refs(page) >= 1
            require(fresh, "a page in flight changed hands", page)
        tags = [self.kv[self.slot(work.table, position)] for position in range(work.start)]
        expected = tags_of(seq.request, truth.tokens[: work.start], truth.tags)
        for position, tag in enumerate(tags):
            require(tag in (expected[position], POISON), "KV of the prefix when computing", f"position {position}")
        fault = self.faults.get(seq)
        mix = self._adapters_read(work)
        truth.table = work.table
        for offset in range(work.count):
            position = work.start + offset
            if offset < len(work.tokens):
                token = work.tokens[offset]
            else:
                last, token = self._last[seq]
                require(last == position, "the pending token is of the flight before", position)
            before = tags[-1] if tags else 0
            bad = POISON in tags or fault == "kv"
            used = mix if offset >= work.bare else mix_tag([])
            seen = seen_at(seq.request, position, token)
            tags.append(POISON if bad else next_tag(cast("int", before), seen, position, used))
            slot = self.slot(work.table, position)
            require(not self._pool.keyed(slot // self._limits.page_size), "a page that can be found is written")
            self.kv[slot] = tags[-1]
        if fault == "kv":
            del self.faults[seq]
        prompt = self._prompt_logprobs(work, tags)
        return self._sample(work, tags), prompt

    def _adapters_read(self, work: Work) -> int:
        parts = []
        for places, weight in work.adapters:
            digests = {self._store.contents[place][0] for place in places}
            require(len(digests) == 1, "adapter pages hold one version", digests)
            parts.append((digests.pop(), weight))
        return mix_tag(parts)

    def _sample(self, work: Work, tags: list[Tag]) -> Sampled | None:
        seq, truth = work.seq, self.truth[work.seq]
        if not work.samples:
            return None
        if work.missed:
            return Sampled(EOS, 0.0, 1, ())  # of no meaning to anybody
        known = work.seen is None or work.seen == len(truth.tokens) - seq.num_prompt
        require(known, "a grammar has seen all tokens before the one that is chosen", work.seen)
        bad = POISON in tags or self.faults.get(seq) == "logits"
        if bad:
            self.faults.pop(seq, None)
            truth.non_finite = True
            sampled = Sampled(0, math.nan, 1, ())
        else:
            sampled = Sampled(token_of(tags, seq.seed), logprob_of(tags[-1]), 1, ())
        require(len(truth.tokens) == len(tags), "each position is sampled once", len(tags))
        truth.tokens.append(sampled.token_id)
        self._last[seq] = (len(tags), sampled.token_id)
        return sampled

    def _prompt_logprobs(self, work: Work, tags: list[Tag]) -> list[Sampled]:
        offsets = work.offsets[:-1] if work.samples else work.offsets
        found = []
        for offset in offsets:
            tag = tags[work.start + offset]
            logprob = math.nan if tag == POISON else logprob_of(tag)
            self.truth[work.seq].non_finite |= tag == POISON
            found.append(Sampled(self.truth[work.seq].tokens[work.start + offset + 1], logprob, 1, ()))
        return found

    def _kept(self, page: int, key: bytes) -> None:
        size = self._limits.page_size
        tags = self.kv[page * size : (page + 1) * size]
        require(None not in tags, "a page is kept before it was computed", page)
        if POISON not in tags:
            known = self._contents_of_key.setdefault(key, tags)
            require(known == tags, "one key, two contents", page)
