"""The bridge: streams, aborts, single-flight loads, and what everybody is told when the engine dies."""

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams
from aiolora.engine.runner import ModelRunner
from aiolora.errors import (
    AdapterConflictError,
    AdapterFormatError,
    AdapterNotFoundError,
    EngineDeadError,
    RequestError,
    UnknownModelError,
)
from aiolora.lora import loader
from aiolora.media.content import Split
from tests.conftest import ModelOf
from tests.engine.waiting import idle, running, until
from tests.tiny import make_loras

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


@pytest.fixture
async def engine(model_of: ModelOf) -> AsyncIterator[AsyncLLMEngine]:
    room = {"max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": 8}  # for one adapter, on the device and beside it
    args = EngineArgs(model=str(model_of("llama")), dtype="float32", device="cpu", enable_lora=True, **room)
    async with AsyncLLMEngine.from_engine_args(args) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    return make_loras(model_of("llama"), tmp_path_factory.mktemp("adapters"), 3)


async def tokens(engine: AsyncLLMEngine, params: SamplingParams = SHORT, lora: LoRARequest | None = None) -> list[int]:
    return [token.token_id async for token in engine.stream(PROMPT, params, lora=lora)]


async def test_leaving_a_stream_aborts_its_request_and_gives_its_pages_back(engine: AsyncLLMEngine) -> None:
    start = engine.snapshot().free_pages
    stream = engine.stream(PROMPT, LONG)
    async for _ in stream:
        break
    await stream.aclose()
    await idle(engine)
    assert engine.snapshot().free_pages == start


async def test_cancelling_a_generate_aborts_its_request(engine: AsyncLLMEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, LONG))
    await running(engine, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(engine)


async def test_abort_ends_the_stream_with_the_reason_abort(engine: AsyncLLMEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, LONG, request_id="mine"))
    await running(engine, 1)
    engine.abort("mine")
    engine.abort("nobody's")
    output = await task
    assert (output.request_id, output.finished, output.outputs[0].finish_reason) == ("mine", True, "abort")
    await idle(engine)


async def test_abort_ends_every_one_of_n_answers(engine: AsyncLLMEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, n=3)
    task = asyncio.create_task(engine.generate(PROMPT, params, request_id="mine"))
    await running(engine, 3)
    engine.abort("mine")
    output = await task
    assert [answer.finish_reason for answer in output.outputs] == ["abort"] * 3


async def test_an_id_used_again_at_once_never_gets_tokens_of_the_request_before(engine: AsyncLLMEngine) -> None:
    expected = await tokens(engine)
    for _ in range(20):
        stream = engine.stream([9, 9, 9], LONG, request_id="same")
        async for _ in stream:
            break
        await stream.aclose()
        again = [token.token_id async for token in engine.stream(PROMPT, SHORT, request_id="same")]
        assert again == expected


async def test_an_id_in_use_is_refused_and_its_stream_goes_on(engine: AsyncLLMEngine) -> None:
    task = asyncio.create_task(engine.generate(PROMPT, SHORT, request_id="same"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(RequestError, match="in use"):
        await engine.generate(PROMPT, SHORT, request_id="same")
    assert (await task).finished


async def test_many_who_ask_for_a_new_adapter_at_once_load_it_once(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = loader._build

    def counted(name: str, *args: object, **kwargs: object) -> object:
        loads.append(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "_build", counted)
    answers = await asyncio.gather(*(tokens(engine, lora=adapters[0]) for _ in range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert loads == ["a0"]
    assert [version.name for version in await engine.list_loras()] == ["a0"]


async def test_who_leaves_while_an_adapter_loads_takes_it_from_nobody(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    first, second = (asyncio.create_task(engine.add_lora(adapters[0])) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).name == "a0"


async def test_a_bad_path_under_a_name_is_its_own_callers_error(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    wrong = LoRARequest("a0", 1, "/nowhere/at/all")
    lost, kept = await asyncio.gather(engine.add_lora(wrong), engine.add_lora(adapters[0]), return_exceptions=True)
    assert isinstance(lost, AdapterNotFoundError)
    assert not isinstance(kept, BaseException)


async def test_one_id_for_two_names_is_refused_though_both_load_at_once(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    both = [LoRARequest(name, 9, adapters[0].lora_path) for name in ("x", "y")]
    outcomes = await asyncio.gather(*map(engine.add_lora, both), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AdapterConflictError", "AdapterVersion"]
    assert len(await engine.list_loras()) == 1


async def test_no_adapter_may_have_a_reserved_name(engine: AsyncLLMEngine, adapters: list[LoRARequest]) -> None:
    await engine.add_lora(adapters[0])
    with pytest.raises(AdapterConflictError, match="a0"):
        engine.reserve("a0")
    engine.reserve("a1")
    with pytest.raises(AdapterConflictError, match="base model"):
        await engine.add_lora(adapters[1])


async def test_adapters_beyond_every_cache_are_read_again_with_equal_answers(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    first = [await tokens(engine, lora=adapter) for adapter in adapters]
    assert len({tuple(answer) for answer in first}) == 3
    again = await asyncio.gather(*(tokens(engine, lora=adapter) for adapter in adapters * 2))
    assert again == first * 2


async def test_an_adapter_that_cannot_be_read_again_fails_its_own_requests_only(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(adapters[0].lora_path, folder)
    doomed = LoRARequest("doomed", 9, str(folder))
    await tokens(engine, lora=doomed)
    await tokens(engine, lora=adapters[1])  # takes its place on the device and in host memory
    shutil.rmtree(folder)
    lost, kept = await asyncio.gather(
        tokens(engine, lora=doomed), tokens(engine, lora=adapters[1]), return_exceptions=True
    )
    assert isinstance(lost, AdapterNotFoundError)
    assert isinstance(kept, list)


async def test_the_error_of_an_adapter_keeps_nobody_alive_who_has_got_it(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leads to the frames of who waited, so to their requests: nothing of it may wait for a collection."""

    async def failing(lora: LoRARequest) -> "weakref.ref[Exception]":
        try:
            await tokens(engine, lora=lora)
        except AdapterNotFoundError as error:
            return weakref.ref(error)
        raise AssertionError("it can be read")

    await tokens(engine, lora=adapters[0])
    await tokens(engine, lora=adapters[1])

    def broken(*_: object) -> object:
        raise AdapterNotFoundError("a", "gone")

    monkeypatch.setattr(loader, "open_tensors", broken)
    gc.disable()
    try:
        for lora in (adapters[0], adapters[2]):  # read again, and for the first time
            error = await failing(lora)
            await until(lambda error=error: error() is None, lambda: "it is held for ever")  # type: ignore[misc]
    finally:
        gc.enable()


async def test_whatever_goes_wrong_while_reading_again_is_the_adapters_error(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    await tokens(engine, lora=adapters[0])
    await tokens(engine, lora=adapters[1])

    def broken(*_: object) -> object:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(loader, "open_tensors", broken)
    with pytest.raises(AdapterFormatError, match="the disk is on fire"):
        await tokens(engine, lora=adapters[0])
    assert await tokens(engine)


async def test_a_removed_name_is_unknown_at_once_and_running_requests_finish(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    version = await engine.add_lora(adapters[0])
    task = asyncio.create_task(engine.generate(PROMPT, SHORT, lora="a0"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await engine.remove_lora("a0")
    assert not await engine.remove_lora("a0")
    with pytest.raises(UnknownModelError, match="'a0' does not exist"):
        await engine.generate(PROMPT, SHORT, lora="a0")
    assert (await task).adapter == version.label


async def test_when_a_step_fails_every_stream_is_told_and_new_requests_are_refused(
    engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [asyncio.create_task(tokens(engine, LONG)) for _ in range(3)]
    await running(engine, 3)

    def broken(*_: object) -> object:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ModelRunner, "launch", broken)
    for outcome in await asyncio.gather(*streams, return_exceptions=True):
        assert isinstance(outcome, EngineDeadError)
        assert str(outcome.__cause__) == "the device is gone"
    assert str(engine.death) == "the device is gone"
    with pytest.raises(EngineDeadError, match="the device is gone"):
        await tokens(engine)


async def test_an_engine_that_is_not_started_says_so_and_stop_may_come_twice(model_of: ModelOf) -> None:
    engine = AsyncLLMEngine.from_engine_args(EngineArgs(model=str(model_of("llama")), dtype="float32"))
    with pytest.raises(EngineDeadError, match="not started"):
        await tokens(engine)
    await engine.stop()
    await engine.start()
    await engine.start()
    assert len(await tokens(engine)) == 5
    await engine.stop()
    await engine.stop()
    for call in (tokens(engine), engine.start()):
        with pytest.raises(EngineDeadError, match="shut down"):
            await call


async def test_snapshot_counts_what_runs(engine: AsyncLLMEngine) -> None:
    stream = engine.stream(PROMPT, LONG)
    async for _ in stream:
        break
    assert engine.snapshot().running == 1
    assert engine.snapshot().free_pages < engine.snapshot().num_pages
    await stream.aclose()
    await idle(engine)


@pytest.mark.parametrize("length", [10, 10_000])
async def test_a_long_prompt_is_tokenised_off_the_loop_and_a_short_one_on_it(
    engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    loops, encode = [], engine.intake.tokenizer.encode

    def noted(text: str, *, special: bool = True) -> list[int]:
        loops.append(asyncio._get_running_loop())  # none in another thread
        return encode(text[:10], special=special)

    monkeypatch.setattr(engine.intake.tokenizer, "encode", noted)
    monkeypatch.setattr(engine.intake, "_check_characters", lambda _: None)
    await engine.generate("x" * length, SHORT)
    assert loops == [asyncio.get_running_loop() if length == 10 else None]


async def test_an_adapter_removed_while_its_prompt_is_tokenised_still_serves_it_and_a_refused_prompt_holds_nothing(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.add_lora(adapters[0])
    version = engine.intake.registry.find(adapters[0].lora_name)
    with pytest.raises(RequestError):
        await engine.prepare([], SHORT, lora=adapters[0])
    taken, go_on, request = asyncio.Event(), threading.Event(), engine.intake.request
    loop = asyncio.get_running_loop()

    def slow(*args: Any, **kwargs: Any) -> Any:
        loop.call_soon_threadsafe(taken.set)
        go_on.wait()
        return request(Split(PROMPT), *args[1:], **kwargs)

    monkeypatch.setattr(engine.intake, "request", slow)
    answer = asyncio.ensure_future(engine.generate("x" * 10_000, SHORT, lora=adapters[0]))
    await taken.wait()
    assert await engine.remove_lora(adapters[0].lora_name)
    [standing] = await engine.lora_standing()  # kept, for it is held
    assert standing.version == version
    go_on.set()
    assert (await answer).adapter == version.label
    del answer
    gc.collect()
    assert await engine.lora_standing() == []
