"""The engine's turns around one request and its adapter; `test_engine_property` has them all at once."""

import pytest

from aiolora.engine.runner import Flight
from aiolora.engine.scheduler import Batch, SchedulerLimits
from aiolora.errors import AdapterChangedError, AdapterMemoryError, NonFiniteLogitsError
from aiolora.types import AdapterVersion, Mix, TokenDelta
from tests.engine.harness import Shape, World

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def world_of(
    *, max_loras: int = 2, adapter_pages: int = 2, max_host: int = 1, budget: int = 32, copy_delay: int = 0
) -> World:
    limits = SchedulerLimits(
        max_num_seqs=4, max_num_batched_tokens=budget, max_loras=max_loras, page_size=4, patience_s=1.0
    )
    shape = Shape(limits=limits, num_pages=24, adapter_pages=adapter_pages, max_host=max_host, max_model_len=32)
    return World(shape, overlaps=False, copy_delay=lambda: copy_delay)


def mix_of(world: World, *names: str, pages: int = 1) -> Mix:
    return Mix(tuple([(world.version(name, {0: pages}), 1.0) for name in names]))


def steps(world: World, count: int) -> list[TokenDelta]:
    return [delta for _ in range(count) for delta in world.step()]


def test_an_evicted_adapter_is_read_again_and_its_request_goes_on() -> None:
    world = world_of()
    world.answer_at_once = lambda version: None
    mix = mix_of(world, "evicted")
    mix_of(world, "newer")  # host memory holds one
    ticket = world.submit(PROMPT, mix, max_tokens=2, ignore_eos=True)
    assert steps(world, 2) == []
    assert world.engine.stalled
    assert list(world.reads.values()) == list(mix.versions)
    world.answer(mix.versions[0], "ok")
    assert not world.engine.stalled
    assert len(steps(world, 2)) == 2
    assert not ticket.open


def test_steps_go_on_while_an_adapter_is_copied_and_none_reads_it_before_it_has_landed() -> None:
    world = world_of(copy_delay=5)
    base = world.submit(PROMPT, max_tokens=20, ignore_eos=True)
    steps(world, 1)
    adapted = world.submit(PROMPT, mix_of(world, "copied"), max_tokens=2, ignore_eos=True)
    assert [delta.request_id for delta in steps(world, 5)] == [base.request.id] * 5
    assert {delta.request_id for delta in steps(world, 1)} == {base.request.id, adapted.request.id}
    assert world.store.num_waits == 0
    world.drain()


def test_where_there_is_nothing_else_to_do_a_step_waits_for_the_copy() -> None:
    world = world_of(copy_delay=1000)
    ticket = world.submit(PROMPT, mix_of(world, "copied"), max_tokens=2, ignore_eos=True)
    assert not world.engine.stalled
    assert len(steps(world, 1)) == 1
    assert world.store.num_waits == 1
    steps(world, 1)
    assert not ticket.open


def test_who_waits_for_a_copy_can_be_aborted() -> None:
    world = world_of(copy_delay=3, adapter_pages=1)
    mixes = [mix_of(world, name) for name in ("aborted", "next")]
    base = world.submit(PROMPT, max_tokens=12, ignore_eos=True)
    aborted = world.submit(PROMPT, mixes[0])
    steps(world, 1)
    world.abort(aborted)
    following = world.submit(PROMPT, mixes[1], max_tokens=1)
    steps(world, 9)
    assert not following.open
    assert base.open
    world.drain()


def test_a_step_that_could_not_be_launched_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of()
    pool, engine = world.engine.scheduler.pool, world.engine
    mix = mix_of(world, "leased")
    tickets = [world.submit(PROMPT, kind, max_tokens=4, ignore_eos=True) for kind in (None, mix)]
    steps(world, 1)

    def fail(batch: Batch, look_for_masks: object) -> Flight:
        raise MemoryError("too many tokens")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", fail)
        with pytest.raises(MemoryError):
            engine.step()
    ends = engine.step()
    assert [(delta.request_id, delta.finish_reason) for delta in ends] == [(t.request.id, "error") for t in tickets]
    assert all("too many tokens" in str(delta.error) for delta in ends)
    assert not engine.has_work
    assert pool.num_available == pool.num_pages
    assert not world.residency.leased(mix.versions[0])
    engine.scheduler.check()


def test_a_removed_adapter_is_dropped_unless_somebody_needs_it() -> None:
    world = world_of(max_host=8, max_loras=1)
    used, waited_for, unused = (mix_of(world, name) for name in ("used", "waited for", "unused"))
    for mix in (used, waited_for):
        world.submit(PROMPT, mix, max_tokens=4, ignore_eos=True)
    steps(world, 1)
    for mix in (used, waited_for, unused):
        world.engine.adapters.drop(mix.versions[0])
    in_host = [world.residency.in_host(mix.versions[0]) for mix in (used, waited_for, unused)]
    assert in_host == [True, True, False]
    world.submit(PROMPT, unused, max_tokens=1)
    world.drain()


def test_an_adapter_whose_folder_has_changed_fails_only_those_who_wait_for_it() -> None:
    world = world_of()
    mixes = [mix_of(world, "changed"), mix_of(world, "same")]
    world.answer_at_once = lambda version: "changed" if version.name == "changed" else "ok"
    changed, same, base = (world.submit(PROMPT, mix, max_tokens=2, ignore_eos=True) for mix in (*mixes, None))
    ends = {delta.request_id: delta for delta in steps(world, 4) if delta.finish_reason}
    assert isinstance(ends[changed.request.id].error, AdapterChangedError)
    assert ends[same.request.id].finish_reason == ends[base.request.id].finish_reason == "length"


def test_a_removed_adapter_is_not_read_again_for_whom_the_adapter_before_it_has_failed() -> None:
    world = world_of()
    mix = mix_of(world, "broken", "removed")
    mix_of(world, "newer")  # host memory holds one
    world.answer_at_once = lambda version: "error" if version.name == "broken" else "ok"
    ticket = world.submit(PROMPT, mix, max_tokens=2)
    world.remove(mix.versions[1])
    steps(world, 1)
    assert not ticket.open
    world.verify()
    assert not world.residency.in_host(mix.versions[1])
    world.drain()


def test_an_adapter_that_is_still_being_read_takes_no_slot_from_one_that_is_there() -> None:
    world = world_of(max_loras=1)
    world.answer_at_once = lambda version: None
    slow, there = mix_of(world, "slow"), mix_of(world, "there")
    waiting = world.submit(PROMPT, slow, max_tokens=2, ignore_eos=True)
    served = world.submit(PROMPT, there, max_tokens=2, ignore_eos=True)
    steps(world, 6)
    assert (waiting.open, served.open) == (True, False)
    world.answer(slow.versions[0], "ok")
    steps(world, 6)
    assert not waiting.open


def test_a_base_request_does_not_wait_for_the_adapter_of_another() -> None:
    world = world_of()
    world.answer_at_once = lambda version: None
    mix = mix_of(world, "reading")
    mix_of(world, "newer")
    world.submit(PROMPT, mix, max_tokens=2)
    steps(world, 2)
    assert world.engine.stalled
    base = world.submit(PROMPT, max_tokens=1)
    assert not world.engine.stalled
    steps(world, 1)
    assert not base.open


def test_two_mixes_that_do_not_fit_together_run_one_after_the_other() -> None:
    world = world_of(adapter_pages=3, max_host=8)
    warm, first, second = (mix_of(world, *names) for names in (["c", "d"], ["a", "b"], ["a2", "b2"]))
    world.submit(PROMPT, warm, max_tokens=1)
    steps(world, 1)  # now c and d are on the device
    tickets = [world.submit(PROMPT, mix, max_tokens=4, ignore_eos=True) for mix in (first, warm, second)]
    world.now_s += 10  # nobody has patience left
    steps(world, 16)
    assert not any(ticket.open for ticket in tickets)


def test_a_mix_larger_than_the_room_is_refused_and_holds_up_nobody() -> None:
    world = world_of(adapter_pages=3, max_host=8)
    large = world.submit(PROMPT, mix_of(world, "a", "b", pages=2), n=2)
    other = world.submit(PROMPT, mix_of(world, "c"), max_tokens=1)
    deltas = steps(world, 1)
    errors = [delta.error for delta in deltas if delta.request_id == large.request.id]
    assert len(errors) == 2
    assert all(isinstance(error, AdapterMemoryError) and "a+b" in str(error) for error in errors)
    assert not other.open


def test_a_retry_after_nan_computes_everything_anew() -> None:
    world = world_of(budget=4)
    first = world.submit(PROMPT, max_tokens=2)
    (seq,) = world.sequences(first)
    world.runner.faults[seq] = "kv"  # in the first chunk: its pages are known before anything is sampled
    (delta,) = steps(world, 3)
    assert isinstance(delta.error, NonFiniteLogitsError)
    retry = world.submit(PROMPT, max_tokens=2, ignore_eos=True)
    steps(world, 4)
    assert [answer.ended for answer in retry.answers] == ["length"]


def test_nan_in_the_prompts_logprobs_ends_the_request() -> None:
    world = world_of(budget=4)
    ticket = world.submit(PROMPT, max_tokens=2, prompt_logprobs=1)
    (seq,) = world.sequences(ticket)
    world.runner.faults[seq] = "kv"
    (delta,) = steps(world, 1)
    assert isinstance(delta.error, NonFiniteLogitsError)
    world.drain()


def test_nothing_follows_an_abort() -> None:
    world = world_of()
    world.answer_at_once = lambda version: None
    mix = mix_of(world, "gone")
    mix_of(world, "newer")
    ticket = world.submit(PROMPT, mix)
    steps(world, 1)
    world.answer(mix.versions[0], "error")  # its error is not handed out yet
    world.abort(ticket)
    world.abort(ticket)
    assert steps(world, 1) == []
    assert not world.engine.has_work


def test_one_of_several_answers_can_be_aborted() -> None:
    world = world_of()
    ticket = world.submit(PROMPT, n=3, max_tokens=3, ignore_eos=True)
    steps(world, 2)
    world.abort(ticket, 1)
    world.drain()
    assert [answer.ended for answer in ticket.answers] == ["length", "abort", "length"]


def test_what_waits_for_room_is_not_pushed_out_of_host_memory_by_what_waits_behind_it() -> None:
    world = world_of(max_loras=3, adapter_pages=2, max_host=1)
    world.answer_at_once = lambda version: None
    big, small, busy = mix_of(world, "big", pages=2), mix_of(world, "small"), mix_of(world, "busy")
    running = world.submit(PROMPT, busy, max_tokens=8, ignore_eos=True)
    steps(world, 1)
    waiting = [world.submit(PROMPT, mix, max_tokens=1) for mix in (big, small)]
    steps(world, 1)
    for version in list(world.reads.values()):
        world.answer(version, "ok")
    steps(world, 1)
    assert not world.reads, "each was read once"
    steps(world, 10)
    assert not running.open
    assert not any(ticket.open for ticket in waiting)


def test_the_adapter_of_a_request_is_read_when_it_comes_though_no_slot_is_near() -> None:
    world = world_of(max_loras=1, adapter_pages=2, max_host=2)
    world.answer_at_once = lambda version: None
    mixes = [mix_of(world, name) for name in ("cold", "colder", "busy")]  # host memory has the last two
    busy = world.submit(PROMPT, mixes[2], max_tokens=12, ignore_eos=True)
    steps(world, 1)
    cold = world.submit(PROMPT, mixes[0], max_tokens=1)
    steps(world, 1)
    assert list(world.reads.values()) == list(mixes[0].versions)
    world.answer(mixes[0].versions[0], "ok")
    steps(world, 1)
    assert world.residency.on_device(mixes[0].versions[0]), "and copied, for there is room beside the one that runs"
    assert busy.open
    assert cold.open
    world.drain()


def test_the_device_is_ready_when_a_drained_slot_comes_free() -> None:
    world = world_of(max_loras=1, adapter_pages=2, max_host=2)
    hot, cold = mix_of(world, "hot"), mix_of(world, "cold")
    running = world.submit(PROMPT, hot, max_tokens=20, ignore_eos=True)
    steps(world, 2)
    waiting = world.submit(PROMPT, cold, max_tokens=1)
    world.now_s += 2  # past its patience: the slot is closed
    steps(world, 1)
    assert world.scheduler._slots.closed == {hot}
    assert world.residency.on_device(cold.versions[0])
    assert running.open
    steps(world, 18)
    assert not running.open
    assert not waiting.open


def test_looking_ahead_reads_each_adapter_once_however_many_wait() -> None:
    world = world_of(max_loras=1, adapter_pages=2, max_host=3)
    mixes = [mix_of(world, f"adapter{number}") for number in range(8)]
    reads: list[str] = []

    def note(version: AdapterVersion) -> str:
        reads.append(version.name)
        return "ok"

    world.answer_at_once = note
    evicted = [mix for mix in mixes if not world.residency.in_host(mix.versions[0])]
    tickets = [world.submit(PROMPT, mix, max_tokens=6, ignore_eos=True) for mix in evicted]
    steps(world, 1)
    assert reads == [mix.versions[0].name for mix in evicted[:3]], "as many as host memory holds"
    steps(world, 60)
    assert not any(ticket.open for ticket in tickets)
    assert sorted(reads) == sorted(mix.versions[0].name for mix in evicted)
