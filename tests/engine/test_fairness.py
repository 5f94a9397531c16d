"""Who waits how long, in steps: simulated traffic on the scheduler, a token a step, nothing computed."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import quantiles
from typing import Any

import pytest
from msgspec import structs

from aiolora.engine.queues import MAX_ABSENT
from aiolora.engine.sequence import Sequence
from aiolora.types import AdapterPolicy, Mix
from tests.engine.test_scheduler import Desk

STEP_S = 0.05


class Street:
    """A desk with customers: `step` serves everybody once and notes when an answer began."""

    def __init__(self, *, slots: int, seats: int, patience_s: float = 1.0) -> None:
        self.desk = Desk(
            num_pages=seats * 20,
            max_num_seqs=seats,
            max_num_batched_tokens=1024,
            max_loras=slots,
            patience_s=patience_s,
            adapter_pages=slots,
        )
        self.num_steps = 0
        self.waits: dict[Mix | None, list[int]] = defaultdict(list)  # steps until the first token, a mix
        self.served: dict[Mix | None, int] = defaultdict(int)
        self._open: dict[Sequence, tuple[int, int]] = {}  # when it came, and how many tokens it wants

    def come(self, mix: Mix | None, *, tokens: int, prompt: int = 8) -> None:
        self._open[self.desk.one([1] * prompt, mix)] = (self.num_steps, tokens)

    def num_open(self, mix: Mix | None) -> int:
        return sum(seq.mix == mix for seq in self._open)

    def step(self) -> None:
        desk = self.desk
        self.num_steps += 1
        desk.now_s += STEP_S
        desk.bring()
        batch = desk.schedule()
        desk.land(batch)
        for run in batch.runs:
            came, tokens = self._open[run.seq]
            self.served[run.seq.mix] += run.count + run.samples
            if run.seq.num_output == 1:
                self.waits[run.seq.mix].append(self.num_steps - came)
            if run.seq.num_output >= tokens:
                desk.scheduler.finish(run.seq, "stop")
                del self._open[run.seq]

    def run(self, num_steps: int, customers: Callable[[], object]) -> None:
        for _ in range(num_steps):
            customers()
            self.step()


def _percentile(waits: Iterable[int], percent: int) -> float:
    return quantiles(waits, n=100, method="inclusive")[percent - 1]


def _cold_wait(*, beside_hot: bool, **bounds: Any) -> float:
    """p99 of a cold adapter's steps to the first token."""
    street, rng = Street(slots=4, seats=32, **bounds), random.Random(1)
    hot, cold = street.desk.adapter(1), street.desk.adapter(2)

    def customers() -> None:
        if street.num_steps % 5 == 0:
            street.come(cold, tokens=rng.randrange(8, 24))
        while beside_hot and street.num_open(hot) < 100:
            street.come(hot, tokens=rng.randrange(8, 24))

    street.run(2000, customers)
    assert len(street.waits[cold]) == 400
    return _percentile(street.waits[cold], 99)


def test_a_hot_adapter_with_nine_tenths_of_the_traffic_hardly_delays_a_cold_one() -> None:
    assert _cold_wait(beside_hot=True) <= 3 * _cold_wait(beside_hot=False)


def test_who_comes_beside_a_hot_adapter_finds_a_seat_though_no_answer_ends() -> None:
    street = Street(slots=4, seats=32)
    hot, cold, other = map(street.desk.adapter, (1, 2, 3))
    for _ in range(32):
        street.come(hot, tokens=60)
    street.step()
    assert len(street.waits[hot]) == 32, "while it is alone, all seats are its own"
    street.come(cold, tokens=2)
    street.run(40, lambda: street.come(hot, tokens=60))
    street.run(30, lambda: None)
    assert street.waits[cold] == [60], "that of the first that ended"
    street.come(cold, tokens=2)
    street.come(other, tokens=2)
    street.step()
    assert street.waits[cold] == [60, 1]
    assert street.waits[other] == [1]
    assert street.num_open(hot) > 32, "its own go on waiting"


def _crowd(num_adapters: int, *, slots: int = 8, seats: int = 32, patience_s: float = 1.0) -> list[int]:
    """Steps to the first token of equal traffic, a little more than fits, over so many adapters."""
    street, rng = Street(slots=slots, seats=seats, patience_s=patience_s), random.Random(2)
    mixes = [street.desk.adapter(number, placed=False) for number in range(num_adapters)]

    def customers() -> None:
        while len(street._open) < 3 * seats:
            street.come(rng.choice(mixes), tokens=rng.randrange(20, 40))

    street.run(3000, customers)
    return [wait for waits in street.waits.values() for wait in waits]


def test_twice_as_many_adapters_as_slots_wait_at_most_twice_as_long_at_the_median() -> None:
    as_many, twice = _crowd(8), _crowd(16)
    assert _percentile(twice, 50) <= 2 * _percentile(as_many, 50)
    assert len(twice) > 0.9 * len(as_many), "changing adapters costs little of the throughput"


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_with_twice_as_many_adapters_as_slots_nobody_waits_longer_than_the_bound(slots: int) -> None:
    longest, patience = 40, 20  # steps
    street, rng = Street(slots=slots, seats=8 * slots, patience_s=patience * STEP_S), random.Random(3)
    mixes = [street.desk.adapter(number, placed=False) for number in range(2 * slots)]

    def customers() -> None:
        for mix in mixes:
            if street.num_open(mix) < 3:  # never does one have none, so no slot comes free by itself
                street.come(mix, tokens=rng.randrange(10, longest + 1))

    street.run(1500, customers)
    assert set(street.waits) == set(mixes)
    worst = max(wait for waits in street.waits.values() for wait in waits)
    # its own mix ends when it comes, then waits its patience, then another one ends
    assert patience < worst <= longest + patience + longest + 4


@pytest.mark.parametrize("seed", range(5))
def test_two_mixes_that_never_run_out_get_the_same_service_whatever_they_ask_for(seed: int) -> None:
    seats, prompt, longest = 8, 30, 40
    street, rng = Street(slots=2, seats=seats), random.Random(seed)
    small, large = None, street.desk.adapter(1)

    def customers() -> None:
        while street.num_open(small) < 2 * seats:
            street.come(small, tokens=rng.randrange(1, 10))
        while street.num_open(large) < 2 * seats:
            street.come(large, tokens=rng.randrange(20, longest + 1), prompt=rng.randrange(1, prompt + 1))
        assert abs(street.served[small] - street.served[large]) <= seats * (prompt + 2 * longest)

    street.run(1000, customers)
    assert street.served[large] > 3 * seats * (prompt + 2 * longest), "too short to show a drift"


def test_only_the_mix_served_most_is_closed_for_one_that_is_due() -> None:
    street = Street(slots=2, seats=8, patience_s=1.0)
    busy, quiet, cold = (street.desk.adapter(number, placed=False) for number in range(3))
    street.come(busy, tokens=60, prompt=30)
    street.come(quiet, tokens=60)
    street.step()
    street.come(cold, tokens=1)
    street.run(25, lambda: None)
    for mix in (busy, quiet):
        street.come(mix, tokens=5)
    street.run(2, lambda: None)
    assert len(street.waits[quiet]) == 2, "others go on"
    assert len(street.waits[busy]) == 1
    street.run(60, lambda: None)
    assert len(street.waits[cold]) == 1
    assert len(street.waits[busy]) == 2


def test_counters_of_mixes_that_came_once_are_forgotten_though_the_device_is_never_idle() -> None:
    street = Street(slots=2, seats=8)
    for number in range(3 * MAX_ABSENT):
        if street.num_open(None) < 2:
            street.come(None, tokens=20)
        street.come(street.desk.adapter(number, placed=False), tokens=2)
        street.step()
    assert len(street.desk.scheduler._queues._served) < 1.5 * MAX_ABSENT


def test_of_two_mixes_that_never_run_out_one_of_twice_the_weight_gets_twice_the_service() -> None:
    street, rng = Street(slots=2, seats=8), random.Random(4)
    light, heavy = street.desk.adapter(1), street.desk.adapter(2)
    street.desk.scheduler.shares.put("adapter2", AdapterPolicy(weight=2.0))

    def customers() -> None:
        for mix in (light, heavy):
            while street.num_open(mix) < 16:
                street.come(mix, tokens=rng.randrange(1, 40))

    street.run(3000, customers)
    assert street.served[heavy] / street.served[light] == pytest.approx(2.0, rel=0.05)


def test_an_adapter_at_its_concurrency_waits_in_its_own_queue_and_holds_up_nobody() -> None:
    street = Street(slots=2, seats=8)
    limited, other = street.desk.adapter(1), street.desk.adapter(2)
    street.desk.scheduler.shares.put("adapter1", AdapterPolicy(max_concurrency=2))
    for _ in range(6):
        street.come(limited, tokens=10)
    most = 0
    for number in range(40):
        if number % 5 == 0:
            street.come(other, tokens=10)
        street.step()
        most = max(most, sum(seq.mix == limited for seq in street.desk.scheduler.running))
    assert most == 2
    assert street.waits[other] == [1] * 8, "there were seats"
    assert [wait <= 2 for wait in street.waits[limited]] == [True, True, False, False, False, False]
    assert len(street.waits[limited]) == 6


def test_a_limit_counts_all_mixes_of_an_adapter_and_outlasts_its_reload() -> None:
    desk = Street(slots=4, seats=8).desk
    alone, other = desk.adapter(1), desk.adapter(2)
    reloaded = desk.adapter(3)
    version = structs.replace(reloaded.versions[0], name="adapter1")
    desk.scheduler.shares.put("adapter1", AdapterPolicy(max_concurrency=1))
    both = Mix(((alone.versions[0], 0.5), (other.versions[0], 0.5)))
    seqs = [desk.one([1, 2], mix) for mix in (alone, both, Mix(((version, 1.0),)), other)]
    begun = []
    for _ in range(6):
        begun.append([seq for seq, start, _ in desk.step() if start == 0])
        for seq in list(desk.scheduler.running):
            if seq.num_output == 2:
                desk.scheduler.finish(seq, "stop")
    assert [set(step) for step in begun if step] == [{seqs[0], seqs[3]}, {seqs[1]}, {seqs[2]}]


def test_who_waits_for_a_limit_of_its_own_saves_nothing_up_for_when_it_is_lifted() -> None:
    street = Street(slots=1, seats=4)
    limited, shares = street.desk.adapter(1), street.desk.scheduler.shares
    shares.put("adapter1", AdapterPolicy(max_concurrency=1))

    def customers() -> None:
        for mix in (limited, None):
            while street.num_open(mix) < 8:
                street.come(mix, tokens=10)

    street.run(200, customers)
    before = dict(street.served)
    assert before[limited] < before[None] / 2
    shares.put("adapter1", None)
    street.run(60, customers)
    gained = {mix: street.served[mix] - before[mix] for mix in before}
    assert gained[limited] == pytest.approx(gained[None], rel=0.2), "equal from now on, nothing made up for"


def test_who_waits_for_a_limit_of_its_own_closes_nobodys_slot() -> None:
    street = Street(slots=2, seats=8, patience_s=1.0)
    limited, running, other = (street.desk.adapter(number) for number in (1, 2, 3))
    both = Mix(((limited.versions[0], 0.5), (other.versions[0], 0.5)))
    street.desk.scheduler.shares.put("adapter1", AdapterPolicy(max_concurrency=1))
    street.come(limited, tokens=60)
    street.come(running, tokens=50, prompt=30)
    street.step()
    street.come(both, tokens=5)
    street.run(40, lambda: None)
    street.come(running, tokens=1)
    street.step()
    assert street.waits[running] == [1, 1], "what waits for its limit would gain nothing from a closed slot"
    street.run(40, lambda: None)
    assert len(street.waits[both]) == 1
