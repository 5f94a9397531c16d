"""What runs in a step: order, chunks, bounds, preemption. Tokens are made up; nothing is computed."""

from typing import Any

from aiolora.engine.scheduler import Batch, Scheduler, SchedulerLimits
from aiolora.engine.sequence import Sequence, Status
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.residency import Residency
from aiolora.pages import PagePool
from aiolora.types import AdapterVersion, Mix, Request, SamplingParams, SitePages

PAGE = 4


class Desk:
    """A scheduler with its books; `land` stands for the device."""

    def __init__(self, *, num_pages: int = 32, adapter_pages: int = 16, **limits: Any) -> None:
        bounds = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_loras": 8, "page_size": PAGE} | limits
        self.pool = PagePool(num_pages)
        self.residency: Residency[None] = Residency(PageKinds(1), Room(adapter_pages), max_host=64)
        self.scheduler = Scheduler(SchedulerLimits(**bounds), self.pool, self.residency)
        self.now_s = 0.0
        self._arrivals = 0

    def adapter(self, number: int, *, placed: bool = True) -> Mix:
        version = AdapterVersion(number, f"adapter{number}", f"{number:064x}", "folder", 8, (SitePages(0, 1, 1.0),), 0)
        self.residency.store(version, None)
        if placed:
            assert self.residency.place(version) is not None
            self.residency.landed(version)
        return Mix(((version, 1.0),))

    def bring(self) -> None:
        """Place what the next step wants, as far as there is room."""
        spared: set[int] = set()
        for mix in self.scheduler.wanted():
            spared.update(version.id for version in mix.versions)
            for version in mix.versions:
                if not self.residency.placed(version) and self.residency.place(version, wanted=spared) is not None:
                    self.residency.landed(version)

    def add(self, prompt: list[int], mix: Mix | None = None, *, priority: int = 0, **params: Any) -> list[Sequence]:
        """The n sequences of one request."""
        request = Request(
            id=f"r{self._arrivals}",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(**params),
            mix=mix,
            priority=priority,
            arrival_s=self.now_s,
        )
        seqs = []
        for index in range(request.params.n):
            self._arrivals += 1
            seqs.append(Sequence(request, index, seed=0, number=self._arrivals, max_length=100))
            self.scheduler.add(seqs[-1])
        return seqs

    def one(self, prompt: list[int], mix: Mix | None = None, **params: Any) -> Sequence:
        (seq,) = self.add(prompt, mix, **params)
        return seq

    def schedule(self) -> Batch:
        batch = self.scheduler.schedule(self.now_s)
        self.scheduler.check()
        return batch

    def land(self, batch: Batch, token: int = 7) -> None:
        for run in batch.runs:
            self.scheduler.land(run)
            if run.samples and not run.seq.finished:
                run.seq.tokens.append(token)
        self.scheduler.check()

    def step(self) -> list[tuple[Sequence, int, int]]:
        """(sequence, first position, tokens) of each run."""
        batch = self.schedule()
        self.land(batch)
        return runs_of(batch)


def runs_of(batch: Batch) -> list[tuple[Sequence, int, int]]:
    return [(run.seq, run.start, run.count) for run in batch.runs]


def test_a_long_prompt_is_computed_in_chunks_and_samples_at_its_end() -> None:
    desk = Desk(max_num_batched_tokens=4)
    seq = desk.one(list(range(10)))
    samples = []
    for start, count in ((0, 4), (4, 4), (8, 2), (10, 1)):
        batch = desk.schedule()
        assert runs_of(batch) == [(seq, start, count)]
        samples.append(batch.runs[0].samples)
        desk.land(batch)
    assert samples == [False, False, True, True]


def test_running_sequences_come_before_prompts_and_prompts_get_the_rest_of_the_budget() -> None:
    desk = Desk(max_num_batched_tokens=6)
    running = desk.one([1, 2])
    desk.step()
    long, last = desk.one(list(range(8))), desk.one([5])
    assert desk.step() == [(running, 2, 1), (long, 0, 5)]
    assert desk.step() == [(running, 3, 1), (last, 0, 1), (long, 5, 3)], "single tokens first"


def test_of_equals_whoever_came_first_goes_first_base_and_adapters_alike() -> None:
    desk = Desk(max_num_seqs=3)
    one, two = desk.adapter(1), desk.adapter(2)
    seqs = [desk.one([1, 2], mix) for mix in (one, None, two, one, None)]
    assert [seq for seq, _, _ in desk.step()] == seqs[:3]


def test_the_mix_served_least_goes_first() -> None:
    desk = Desk(max_num_seqs=3)
    one, two = desk.adapter(1), desk.adapter(2)
    seqs = [desk.one([1, 2], mix) for mix in (one, None, two, one, None)]
    desk.step()
    desk.scheduler.finish(seqs[1], "stop")
    assert [seq for seq, _, _ in desk.step()] == [seqs[0], seqs[2], seqs[4]], "adapter 1 has had a token more"


def test_one_mix_alone_is_first_come_first_served() -> None:
    desk = Desk(max_num_seqs=1)
    adapter = desk.adapter(1)
    seqs = [desk.one([1] * length, adapter) for length in (8, 1, 4)]
    for seq in seqs:
        assert [served for served, _, _ in desk.step()] == [seq]
        desk.scheduler.finish(seq, "stop")


def test_a_mix_that_comes_back_has_saved_nothing_up() -> None:
    desk = Desk(max_num_seqs=1)
    one, two = desk.adapter(1), desk.adapter(2)
    before = [desk.one([1] * 8, one) for _ in range(6)]
    for seq in before[:3]:
        desk.step()
        desk.scheduler.finish(seq, "stop")
    late = [desk.one([1] * 8, two) for _ in range(3)]
    for expected in (before[3], late[0], before[4], late[1], before[5], late[2]):
        assert [seq for seq, _, _ in desk.step()] == [expected], "they take turns from here on"
        desk.scheduler.finish(expected, "stop")


def test_no_more_sequences_run_than_max_num_seqs() -> None:
    desk = Desk(max_num_seqs=2)
    for _ in range(5):
        desk.one([1])
    assert len(desk.step()) == 2
    assert desk.scheduler.num_waiting == 3


def test_the_latest_arrival_is_preempted_and_computed_again() -> None:
    desk = Desk(num_pages=4, prefix_caching=False)
    first, second = desk.one([1] * 8), desk.one([2] * 8)  # two pages each: the pool is full
    desk.step()
    tokens = list(second.tokens)
    assert desk.step() == [(first, 8, 1)], "the second gave up its pages"
    assert second.status is Status.WAITING
    assert (list(second.pages), second.num_computed, second.tokens) == ([], 0, tokens)
    assert desk.scheduler.num_preemptions == 1
    desk.scheduler.finish(first, "stop")
    assert desk.step() == [(second, 0, 9)]


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    desk = Desk(num_pages=5)
    first, second = desk.one([1] * 8), desk.one([2] * 8)
    desk.step()  # two pages each
    desk.step()  # the first takes the last page, the second is preempted
    desk.scheduler.finish(first, "stop")
    assert desk.step() == [(second, 8, 1)], "8 of its 9 tokens were still there"


def test_a_preempted_sequence_goes_back_before_those_that_came_after_it() -> None:
    desk = Desk(num_pages=4, max_num_seqs=2, prefix_caching=False)
    first, second = desk.one([1] * 8), desk.one([2] * 8)
    third = desk.one([3] * 8)
    desk.step()
    desk.step()
    assert list(desk.scheduler.waiting()) == [second, third]
    desk.scheduler.finish(first, "stop")
    assert [seq for seq, _, _ in desk.step()] == [second]


def test_two_preempted_in_flight_come_back_in_order_of_arrival() -> None:
    desk = Desk(num_pages=6, prefix_caching=False)
    seqs = [desk.one([number] * 8) for number in range(3)]
    waiting = desk.one([9] * 8)
    flight = desk.schedule()  # all pages are taken; the next step is scheduled before this one has landed
    for seq in seqs[1:]:
        desk.scheduler._preempt(seq)
    assert list(desk.scheduler.waiting()) == [waiting], "their pages are still being written"
    flight.runs.sort(key=lambda run: run.seq.number)
    desk.land(flight)
    assert list(desk.scheduler.waiting()) == [seqs[1], seqs[2], waiting]


def test_one_victim_in_flight_serves_all_that_its_pages_are_enough_for() -> None:
    desk = Desk(num_pages=6, prefix_caching=False)
    first, second, third = (desk.one([number] * 8) for number in range(3))
    flight = desk.schedule()  # all six pages are taken, and each needs a third one next
    ahead = desk.schedule()
    assert ahead.runs == []
    assert (first.status, second.status, third.status) == (Status.RUNNING, Status.RUNNING, Status.WAITING)
    desk.land(flight)
    assert runs_of(desk.schedule()) == [(first, 8, 1), (second, 8, 1)]
    assert desk.scheduler.num_preemptions == 1


def test_nobody_is_preempted_for_pages_that_an_ended_sequence_gives_back() -> None:
    desk = Desk(num_pages=6, prefix_caching=False)
    first, second, third = (desk.one([number] * 8) for number in range(3))
    waiting = desk.one([3] * 4)
    flight = desk.schedule()
    desk.scheduler.finish(third, "abort")
    assert desk.schedule().runs == []
    desk.land(flight)
    assert runs_of(desk.schedule()) == [(first, 8, 1), (second, 8, 1)]
    assert desk.scheduler.num_preemptions == 0
    assert list(desk.scheduler.waiting()) == [waiting]


def test_pages_of_a_finished_sequence_are_free_when_its_last_flight_has_landed() -> None:
    desk = Desk(num_pages=2)
    seq = desk.one([1] * 8)
    flight = desk.schedule()
    desk.scheduler.finish(seq, "abort")
    desk.scheduler.finish(seq, "abort")
    assert desk.pool.num_available == 0
    desk.land(flight)
    assert desk.pool.num_available == 2
    assert desk.scheduler.idle


def test_one_adapter_slot_serves_adapters_one_after_the_other() -> None:
    desk = Desk(max_loras=1)
    one, two = (desk.one([1, 2], desk.adapter(number)) for number in (1, 2))
    assert [seq for seq, _, _ in desk.step()] == [one]
    assert [seq for seq, _, _ in desk.step()] == [one]
    desk.scheduler.finish(one, "stop")
    assert [seq for seq, _, _ in desk.step()] == [two]


def test_rows_of_the_base_model_cost_no_adapter_slot() -> None:
    desk = Desk(max_loras=1)
    adapter, base = desk.adapter(1), None
    seqs = [desk.one([1, 2], mix) for mix in (base, adapter, base)]
    assert [seq for seq, _, _ in desk.step()] == seqs


def test_several_sequences_of_one_adapter_cost_one_slot() -> None:
    desk = Desk(max_loras=1)
    adapter = desk.adapter(1)
    seqs = [desk.one([1, 2], adapter) for _ in range(3)]
    assert [seq for seq, _, _ in desk.step()] == seqs
    assert desk.residency.leased(adapter.versions[0]) == 3


def test_an_adapter_that_is_not_there_holds_up_nobody_else_at_first() -> None:
    desk = Desk()
    absent = desk.one([1, 2], desk.adapter(1, placed=False))
    others = [desk.one([1, 2], mix) for mix in (desk.adapter(2), None)]
    assert [seq for seq, _, _ in desk.step()] == others
    assert list(desk.scheduler.waiting()) == [absent]


def test_after_its_patience_an_adapter_is_given_the_slot_of_another() -> None:
    desk = Desk(max_loras=1, patience_s=3)
    hot, cold = desk.adapter(1), desk.adapter(2)
    first, waiting = desk.one([1, 2], hot), desk.one([1, 2], cold)
    desk.step()
    desk.now_s = 2.9
    second = desk.one([1, 2], hot)
    assert [seq for seq, _, _ in desk.step()] == [first, second]
    desk.now_s = 3.1
    third, base = desk.one([1, 2], hot), desk.one([1, 2])
    assert [seq for seq, _, _ in desk.step()] == [first, second, base], "who needs no adapter may go"
    desk.scheduler.finish(first, "stop")
    desk.scheduler.finish(second, "stop")
    assert [seq for seq, _, _ in desk.step()] == [base, waiting]
    desk.scheduler.finish(waiting, "stop")
    assert [seq for seq, _, _ in desk.step()] == [base, third]


def test_an_adapter_that_is_being_read_closes_no_door() -> None:
    desk = Desk(patience_s=3)
    cold = desk.adapter(1, placed=False)
    desk.one([1, 2], cold)
    desk.now_s = 10
    other = desk.one([1, 2], desk.adapter(2))
    assert desk.scheduler.schedule(desk.now_s).runs == []
    (run,) = desk.scheduler.schedule(desk.now_s, arriving={cold.versions[0].id}).runs
    assert run.seq is other


def test_wanted_mixes_are_those_that_run_then_those_at_the_head_of_the_line() -> None:
    desk = Desk(max_loras=3)
    mixes = [desk.adapter(number, placed=number == 4) for number in range(1, 5)]
    for mix in (mixes[3], mixes[0], mixes[0], mixes[1], mixes[2]):
        desk.one([1, 2], mix)
    desk.step()
    assert desk.scheduler.wanted() == [mixes[3], mixes[0], mixes[1]]


def test_several_answers_share_the_pages_of_their_prompt() -> None:
    desk = Desk()
    seqs = desk.add(list(range(9)), n=3)
    assert [seq for seq, _, _ in desk.step()] == seqs[:1], "the others wait until the prompt is computed"
    assert desk.step() == [(seqs[0], 9, 1), (seqs[1], 8, 1), (seqs[2], 8, 1)]
    assert seqs[0].pages[:2] == seqs[1].pages[:2] == seqs[2].pages[:2]
    assert len({seq.pages[2] for seq in seqs}) == 3


def test_answers_go_on_when_the_first_one_is_aborted_before_it_has_computed_the_prompt() -> None:
    desk = Desk(max_num_batched_tokens=4)
    seqs = desk.add(list(range(9)), n=3)
    desk.step()
    desk.scheduler.finish(seqs[0], "abort")
    assert desk.step() == [(seqs[1], 4, 4)], "the chunk that had landed is shared"


def test_a_prefix_is_shared_under_the_same_adapter_only() -> None:
    desk = Desk()
    one, two = desk.adapter(1), desk.adapter(2)
    first = desk.one(list(range(9)), one)
    desk.step()
    others = [desk.one(list(range(9)), mix) for mix in (one, two, None)]
    batch = desk.schedule()
    assert {run.seq: run.start for run in batch.runs} == {first: 9, others[0]: 8, others[1]: 0, others[2]: 0}


def test_a_page_is_shared_only_after_its_step_has_landed() -> None:
    desk = Desk()
    first = desk.one(list(range(9)))
    flight = desk.schedule()
    second = desk.one(list(range(9)))
    assert [(run.seq, run.start) for run in desk.schedule().runs] == [(first, 9), (second, 0)]
    desk.land(flight)
    third = desk.one(list(range(9)))
    assert (third, 8, 1) in runs_of(desk.schedule())


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    desk = Desk()
    first = desk.one(list(range(8)))
    desk.step()
    desk.scheduler.finish(first, "stop")
    second = desk.one(list(range(8)))
    assert desk.step() == [(second, 4, 4)]


def test_prompt_logprobs_skip_the_cache() -> None:
    desk = Desk()
    first = desk.one(list(range(9)))
    desk.step()
    desk.scheduler.finish(first, "stop")
    second = desk.one(list(range(9)), prompt_logprobs=1)
    assert desk.step() == [(second, 0, 9)]


def test_without_prefix_caching_nothing_is_shared() -> None:
    desk = Desk(prefix_caching=False)
    seqs = [desk.one(list(range(9))) for _ in range(2)]
    assert desk.step() == [(seqs[0], 0, 9), (seqs[1], 0, 9)]


def test_nothing_of_a_distrusted_sequence_is_found() -> None:
    desk = Desk(max_num_batched_tokens=4)
    bad = desk.one(list(range(9)))
    desk.step()
    desk.step()
    desk.scheduler.finish(bad, "error")
    desk.scheduler.distrust(bad)
    retry = desk.one(list(range(9)))
    assert desk.step() == [(retry, 0, 4)]


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    desk = Desk(max_num_batched_tokens=10, chunked_prefill=False)
    first, second = desk.one([1] * 6), desk.one([2] * 8)
    third = desk.one([3])
    assert desk.step() == [(first, 0, 6)], "the third does not overtake"
    assert desk.step() == [(first, 6, 1), (third, 0, 1), (second, 0, 8)]


def test_later_arrivals_do_not_overtake_the_first_that_finds_no_pages() -> None:
    desk = Desk(num_pages=3, prefix_caching=False)
    first = desk.one([1] * 8)
    desk.step()
    large, small = desk.one([2] * 8), desk.one([3])
    assert desk.step() == [(first, 8, 1)]
    desk.scheduler.finish(first, "stop")
    assert [seq for seq, _, _ in desk.step()] == [small, large]


def test_an_ended_sequence_leaves_its_place_in_the_line() -> None:
    desk = Desk(max_num_seqs=1)
    adapter = desk.adapter(1)
    first, second, third = (desk.one([1, 2], adapter) for _ in range(3))
    desk.step()
    desk.scheduler.finish(second, "abort")
    desk.scheduler.finish(first, "stop")
    assert [seq for seq, _, _ in desk.step()] == [third]
    desk.scheduler.finish(third, "stop")
    assert desk.scheduler.idle
    assert desk.residency.leased(adapter.versions[0]) == 0
    assert desk.pool.num_available == desk.pool.num_pages


def test_a_lower_priority_number_comes_first_among_those_of_its_mix_and_before_nobody_else() -> None:
    desk = Desk(max_num_seqs=2)
    adapter = desk.adapter(1)
    late, plain, urgent = (desk.one([1, 2], adapter, priority=priority) for priority in (1, 0, -5))
    other = desk.one([1, 2])
    order = []
    while desk.scheduler.num_waiting:
        order += [seq for seq, start, _ in desk.step() if start == 0]
        for seq in list(desk.scheduler.running):
            desk.scheduler.finish(seq, "stop")
    assert order == [urgent, other, plain, late], "the base model waited no longer than it would have"


def test_a_priority_is_worth_ten_seconds_of_waiting_so_nobody_waits_for_ever() -> None:
    desk = Desk(max_num_seqs=1)
    desk.one([1])
    desk.step()
    late = desk.one([1], priority=1)
    desk.now_s = 9.0
    before = desk.one([1])
    desk.now_s = 11.0
    behind = desk.one([1])
    assert [seq.turn for seq in desk.scheduler.waiting()] == [before.turn, late.turn, behind.turn]


def test_under_page_pressure_who_has_time_gives_way_and_who_is_urgent_takes_from_nobody() -> None:
    desk = Desk(num_pages=7)
    adapter = desk.adapter(1)
    patient = desk.one([2] * 7, adapter, priority=1)
    plain, urgent = desk.one([1] * 7), desk.one([1] * 7, adapter, priority=-9)
    for _ in range(4):
        desk.step()
    assert patient.status is Status.WAITING
    assert desk.scheduler.running == [plain, urgent]
    for _ in range(4):
        desk.step()
    assert desk.scheduler.running == [plain], "the latest arrival, as urgent as it is"
