"""Swarm walks: random operations, with random weights a seed, on a World with few pages and few slots."""

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import partial

from aiolora.engine.scheduler import SchedulerLimits
from aiolora.errors import AdapterMemoryError
from aiolora.types import AdapterPolicy, AdapterVersion, MediaItem, Mix
from tests.engine.device import EOS, KINDS, VOCAB, InvariantError, require
from tests.engine.harness import Shape, Ticket, World

NUM_SEEDS = 80  # walks of CI; planted bugs are looked for by more (test_mutants.py)
NUM_OPS = 120
MAX_OPEN = 9


def shape_of(rng: random.Random) -> Shape:
    """Small in every direction, so that everything runs out."""
    page_size = rng.choice((1, 2, 2, 3, 4))
    max_model_len = rng.randrange(14, 26)
    chunked = rng.random() < 0.85
    max_num_seqs = rng.randrange(1, 7)
    budget = max_num_seqs + rng.randrange(0, 9) if chunked else max_model_len + rng.randrange(0, 20)
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_loras=rng.randrange(1, 4),
        page_size=page_size,
        prefix_caching=rng.random() < 0.9,
        chunked_prefill=chunked,
        patience_s=3.0,
        media_items=1 + max_num_seqs % 2,
    )
    return Shape(
        limits=limits,
        num_pages=-(-max_model_len // page_size) + rng.choice((0, 1, 2, 4, 8, 16)),
        adapter_pages=rng.randrange(3, 7),
        max_host=rng.randrange(1, 5),
        max_model_len=max_model_len,
    )


class Swarm:
    """One walk. Everything follows from the seed and the mode."""

    def __init__(self, seed: int, *, overlaps: bool) -> None:
        self.rng = rng = random.Random(seed)
        lags, self.beside = random.Random(seed), random.Random(~seed)
        self.ranks = random.Random(seed)
        self.pictures = random.Random(seed)
        delays = lags.choice(((0,), (0, 1, 2), (1, 3, 8)))  # in steps; the first: a device that copies at once
        thinking = random.Random(seed)
        self.constrained = thinking.choice((0.0, 0.4))  # share of requests with a grammar
        self.thinking = thinking
        self.world = World(
            shape_of(rng),
            overlaps=overlaps,
            seed=seed,
            copy_delay=lambda: lags.choice(delays),
            mask_delay=lambda: thinking.choice((0, 0, 1, 4)),
        )
        self.news = random.Random(seed)
        self.trunks = [[rng.randrange(VOCAB) for _ in range(16)] for _ in range(2)]
        self.names = [f"adapter{number}" for number in range(rng.randrange(2, 6))]
        self.current = {name: self._new_version(name) for name in self.names}
        self.earlier: dict[str, AdapterVersion] = {}
        self.outcomes = rng.choice((("ok",), (None,), ("ok", None), ("ok", None, None, "error", "changed")))
        self.world.answer_at_once = lambda version: rng.choice(self.outcomes)
        weights: dict[Callable[[], None], float] = {
            self.submit: 3,
            self.step: 6,
            self.abort: 0.7,
            self.answer: 2,
            self.publish: 0.4,
            self.roll_back: 0.2,
            self.limit: 0.2,
            self.pin: 0.3,
            self.fault: 0.4,
            self.jump: 0.3,
        }
        self.ops = list(weights)
        self.weights = [weight * rng.choice((0.2, 1, 1, 3)) for weight in weights.values()]

    def run(self, num_ops: int = NUM_OPS) -> None:
        for op in self.rng.choices(self.ops, self.weights, k=num_ops):
            op()
            self.world.verify()
        self.world.drain()

    def submit(self) -> None:
        rng, world = self.rng, self.world
        if sum(ticket.open for ticket in world.tickets.values()) >= MAX_OPEN:
            self.step()
            return
        longest = world.shape.max_model_len - 1
        trunk = rng.choice(self.trunks)
        prompt = trunk[: rng.randrange(len(trunk))] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 4))]
        mix = self._mix()
        if world.tickets and self.news.random() < 0.2:  # a second turn, often with whom the first was
            ticket = self.news.choice(list(world.tickets.values()))
            prompt = self.news.choice(ticket.answers).tokens + prompt[-1:]
            versions = ticket.request.mix.versions if ticket.request.mix else ()
            if self.news.random() < 0.7 and set(versions) <= set(self.current.values()):
                mix = ticket.request.mix
        closed = [name for name, ticket in world.tickets.items() if not ticket.open]
        prompt = prompt[:longest]
        world.submit(
            prompt,
            mix,
            media=self._pictures_in(prompt),
            id=rng.choice(closed) if closed and rng.random() < 0.2 else None,
            priority=self.ranks.choice((0, 0, 0, -1, 2)),
            constrained=self.thinking.random() < self.constrained,
            n=rng.choice((1, 1, 1, 2, 3)),
            max_tokens=rng.choice((1, 2, 4, 8, None)),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=(EOS - 1,) if rng.random() < 0.2 else (),
            prompt_logprobs=1 if rng.random() < 0.15 else None,
        )

    def _pictures_in(self, prompt: list[int]) -> tuple[MediaItem, ...]:
        """Sometimes one of few pictures, which all stand under one token in `prompt`, often at one place."""
        if self.pictures.random() > 0.3:
            return ()
        start = min(self.pictures.choice((0, 1, 2, 2, 2, 5)), len(prompt) - 1)
        count = min(self.pictures.choice((1, 3, 6)), len(prompt) - start)
        prompt[start : start + count] = [0] * count
        digest = self.pictures.choice((b"cat", b"dog")) + bytes([count])  # its content says how large it is
        return (MediaItem(modality="image", digest=digest, features={}, count=count, start=start),)

    def step(self) -> None:
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            self.world.step()
            self.world.verify()

    def abort(self) -> None:
        tickets = list(self.world.tickets.values())
        if tickets:
            ticket = self.rng.choice([ticket for ticket in tickets if ticket.open] or tickets)
            index = self.rng.randrange(3) if self.rng.random() < 0.4 else None
            self.world.abort(ticket, index)

    def answer(self) -> None:
        reads = list(self.world.reads.values())
        if reads:
            self.world.answer(self.rng.choice(reads), self.rng.choice(("ok", "ok", "ok", "changed", "error")))

    def publish(self) -> None:
        """Another version under the same name; requests under way keep theirs, and then it goes, or stays for long."""
        name = self.rng.choice(self.names)
        old, self.current[name] = self.current[name], self._new_version(name)
        if self.rng.random() < 0.7:
            self.world.remove(old, force=self.rng.random() < 0.3)
        else:
            self._replace(name, old)

    def roll_back(self) -> None:
        """A name stands again for what it stood for before."""
        name = self.ranks.choice(list(self.earlier) or self.names)
        if name in self.earlier and self.world.revive(self.earlier[name]):
            old, self.current[name] = self.current[name], self.earlier.pop(name)
            self._replace(name, old)

    def limit(self) -> None:
        """What a name may take."""
        policy = AdapterPolicy(
            weight=self.ranks.choice((0.5, 1.0, 3.0)), max_concurrency=self.ranks.choice((None, 1, 2))
        )
        self.world.scheduler.shares.put(self.ranks.choice(self.names), self.ranks.choice((None, policy, policy)))

    def _replace(self, name: str, old: AdapterVersion) -> None:
        self.world.replace(old, self.current[name])
        before, self.earlier[name] = self.earlier.get(name), old
        if before is not None:
            self.world.shelved.remove(before)
            self.world.remove(before)

    def pin(self) -> None:
        version = self.current[self.rng.choice(self.names)]
        if self.rng.random() < 0.4:
            self.world.engine.adapters.unpin(version)
        else:
            with contextlib.suppress(AdapterMemoryError):
                self.world.engine.adapters.pin(version)

    def fault(self) -> None:
        """The next numbers of one sequence are NaN: its logits, or all it computes."""
        seqs = [seq for ticket in self._open() for seq in self.world.sequences(ticket) if not seq.finished]
        if seqs:
            self.world.runner.faults[self.rng.choice(seqs)] = self.rng.choice(("logits", "kv"))

    def jump(self) -> None:
        self.world.now_s += self.rng.choice((0.5, 2, 5))

    def _open(self) -> list[Ticket]:
        return [ticket for ticket in self.world.tickets.values() if ticket.open]

    def _new_version(self, name: str) -> AdapterVersion:
        rng, room = self.rng, self.world.shape.adapter_pages
        needs = {0: rng.randrange(1, room + 1) if rng.random() < 0.2 else rng.randrange(1, 3)}
        if rng.random() < 0.6:
            needs[1] = rng.randrange(1, 3)
        vectors = (*[()] * 6, (KINDS.vectors_of(0),), (KINDS.vectors_of(0), KINDS.vectors_of(1)))
        needs |= dict.fromkeys(self.beside.choice(vectors), 1)
        source = None if rng.random() < 0.15 else "folder"
        invocation: tuple[int, ...] = ()
        if self.news.random() < 0.3:  # an aLoRA, and often the prompts have what wakes it
            start = self.news.randrange(12)
            invocation = tuple(self.news.choice(self.trunks)[start : start + self.news.choice((1, 1, 2))])
        return self.world.version(name, needs, source=source, invocation=invocation)

    def _mix(self) -> Mix | None:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.25:
            return None
        if kind < 0.8 or len(self.names) < 2:
            return Mix(((self.current[rng.choice(self.names)], 1.0),))
        first, second = (self.current[name] for name in rng.sample(self.names, 2))
        weight = rng.choice((0.5, 1.0))
        if not (first.additive and second.additive):
            return Mix(((first, 1.0),))
        return Mix(((first, weight), (second, 0.5)))


def walk(seed: int, *, overlaps: bool) -> None:
    """Raise `InvariantError` or `AssertionError` where an invariant does not hold."""
    Swarm(seed, overlaps=overlaps).run()


# ---- what a random walk is too short to see ----

PATIENCE_S = 1.0
STEP_S = 0.1


def _busy(max_loras: int, *, overlaps: bool) -> tuple[World, list[Mix], Mix]:
    """A world whose every adapter slot is hot, and a cold adapter that is on disk only."""
    limits = SchedulerLimits(
        max_num_seqs=8, max_num_batched_tokens=32, max_loras=max_loras, page_size=4, patience_s=PATIENCE_S
    )
    shape = Shape(limits=limits, num_pages=60, adapter_pages=2 * max_loras, max_host=max_loras, max_model_len=32)
    world = World(shape, overlaps=overlaps)
    cold = Mix(((world.version("cold", {0: 2}), 1.0),))
    return world, [Mix(((world.version(f"hot{number}", {0: 2}), 1.0),)) for number in range(max_loras)], cold


def _keep_hot(world: World, hot: list[Mix]) -> None:
    """One more request for each hot adapter that has fewer than three: never does one have none."""
    for mix in hot:
        if sum(ticket.open and ticket.request.mix == mix for ticket in world.tickets.values()) < 3:
            world.submit([1, 2, 3], mix, max_tokens=6, ignore_eos=True)


def starvation(*, max_loras: int, overlaps: bool) -> float:
    """Seconds until a cold adapter is served while hot ones keep arriving, its read taking half a second."""
    world, hot, cold = _busy(max_loras, overlaps=overlaps)
    world.answer_at_once = lambda version: None if version in cold.versions else "ok"
    asked_s = world.now_s
    ticket = None
    while world.now_s < asked_s + 60:
        _keep_hot(world, hot)
        if world.now_s > 1002 and ticket is None:
            ticket, asked_s = world.submit([1, 2, 3], cold, max_tokens=2, ignore_eos=True), world.now_s
        reads = list(world.reads.values())
        for _ in range(5 if reads else 1):
            world.step(dt_s=STEP_S)
            world.verify()
            _keep_hot(world, hot)
        for version in reads:
            world.answer(version, "ok")
        if ticket is not None and ticket.first_delta_s is not None:
            waited_s = ticket.first_delta_s - asked_s
            # at most twice in turn: until its read can begin, and until what came in meanwhile has ended
            require(waited_s < 2 * PATIENCE_S + 20 * STEP_S, "a cold adapter is served in time", waited_s)
            world.drain()
            return waited_s
    raise InvariantError("a cold adapter starves")


def slow_read(*, overlaps: bool) -> None:
    """While one adapter's read hangs, everybody else goes on."""
    world, hot, cold = _busy(2, overlaps=overlaps)
    world.answer_at_once = lambda version: None if version in cold.versions else "ok"
    world.submit([1, 2, 3], cold, max_tokens=2, ignore_eos=True)
    for _ in range(80):
        _keep_hot(world, hot[:1])
        world.step(dt_s=STEP_S)
        world.verify()
    late = [t for t in world.tickets.values() if t.request.mix == hot[0] and t.first_delta_s is None]
    require(all(world.now_s - t.request.arrival_s < PATIENCE_S for t in late), "a slow read holds up nobody else")
    world.drain()


def unwanted_arrival(*, overlaps: bool) -> None:
    """An adapter is given up while it is copied, and the next one needs its pages."""
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32, max_loras=1, page_size=4)
    shape = Shape(limits=limits, num_pages=32, adapter_pages=2, max_host=4, max_model_len=32)
    delays = iter((9, 2))
    world = World(shape, overlaps=overlaps, copy_delay=lambda: next(delays))
    given_up, following = (Mix(((world.version(name, {0: 2}), 1.0),)) for name in ("given up", "following"))
    world.submit([1, 2, 3], max_tokens=24, ignore_eos=True)
    ticket = world.submit([1, 2, 3], given_up)
    world.step()
    world.abort(ticket)
    world.submit([1, 2, 3], following, max_tokens=16, ignore_eos=True)
    for _ in range(16):
        world.step()
        world.verify()
    world.drain()


def second_turns(*, overlaps: bool) -> None:
    """Each answer becomes part of the next prompt, where it may wake an aLoRA at another place of the same page."""
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=32, max_loras=1, page_size=4)
    world = World(Shape(limits=limits, num_pages=400, adapter_pages=2, max_host=1, max_model_len=32), overlaps=overlaps)
    mix = Mix(((world.version("sleeper", {0: 1}, invocation=(5,)), 1.0),))
    for seed in range(40):
        ticket = world.submit([1, 5, 6], mix, max_tokens=6, ignore_eos=True, seed=seed)
        while ticket.open:
            world.step()
        world.submit([*ticket.answers[0].tokens, 3], mix, max_tokens=1)
    world.drain()


def trials(num_seeds: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every check by its name: some walks, the scenarios, the other walks."""

    def walks(seeds: range) -> Iterator[tuple[str, Callable[[], object]]]:
        for seed in seeds:
            for overlaps in (False, True):
                yield f"walk(seed={seed}, overlaps={overlaps})", partial(walk, seed, overlaps=overlaps)

    yield from walks(range(min(6, num_seeds)))
    for overlaps in (False, True):
        yield f"slow_read(overlaps={overlaps})", partial(slow_read, overlaps=overlaps)
        yield f"unwanted_arrival(overlaps={overlaps})", partial(unwanted_arrival, overlaps=overlaps)
        yield f"second_turns(overlaps={overlaps})", partial(second_turns, overlaps=overlaps)
        for max_loras in (1, 2):
            name = f"starvation(max_loras={max_loras}, overlaps={overlaps})"
            yield name, partial(starvation, max_loras=max_loras, overlaps=overlaps)
    yield from walks(range(6, num_seeds))
