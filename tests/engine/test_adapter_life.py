"""Adapters that come, stay and go while others are served: pins, loads from memory, removal, reloads."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from aiolora import AsyncLLMEngine, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.engine.adapters import AdapterStanding
from aiolora.errors import (
    AdapterConflictError,
    AdapterFormatError,
    AdapterMemoryError,
    RequestError,
    UnknownModelError,
)
from tests.conftest import ModelOf
from tests.engine.waiting import running, until
from tests.tiny import make_loras

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def args_of(model: Path, **room: int) -> EngineArgs:
    room = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8} | room
    return EngineArgs(model=str(model), dtype="float32", device="cpu", enable_lora=True, **room)  # type: ignore[arg-type]


@pytest.fixture
async def engine(model_of: ModelOf) -> AsyncIterator[AsyncLLMEngine]:
    async with AsyncLLMEngine.from_engine_args(args_of(model_of("llama"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    return make_loras(model_of("llama"), tmp_path_factory.mktemp("adapters"), 4)


def tensors_of(request: LoRARequest) -> dict[str, Tensor]:
    return load_file(Path(request.lora_path) / "adapter_model.safetensors")


def config_of(request: LoRARequest) -> LoraConfig:
    return LoraConfig.from_pretrained(request.lora_path)


async def tokens(engine: AsyncLLMEngine, lora: LoRARequest | str, params: SamplingParams = SHORT) -> list[int]:
    return (await engine.generate(PROMPT, params, lora=lora)).outputs[0].token_ids


async def standing(engine: AsyncLLMEngine) -> dict[str, AdapterStanding]:
    return {each.version.label: each for each in await engine.lora_standing()}


async def settled(engine: AsyncLLMEngine) -> None:
    """Until no adapter is left of those whose names are gone."""
    for _ in range(500):
        if not any(each.draining for each in await engine.lora_standing()):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never free: {await engine.lora_standing()}")


async def test_a_pinned_adapter_stays_while_others_come_and_go(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    await engine.add_lora(adapters[0])
    await engine.pin_lora("a0")
    await engine.pin_lora(1)
    expected = await tokens(engine, "a0")
    for adapter in adapters[1:] * 2:
        await tokens(engine, adapter)
    seen = {each.version.name: (each.residency, each.pinned) for each in await engine.lora_standing()}
    assert seen == {"a0": ("gpu", True), "a1": ("disk", False), "a2": ("disk", False), "a3": ("gpu", False)}
    assert await tokens(engine, "a0") == expected
    await engine.unpin_lora("a0")
    for adapter in adapters[1:3]:
        await tokens(engine, adapter)
    assert not any(
        each.pinned or each.version.name == "a0" for each in await engine.lora_standing() if each.residency == "gpu"
    )


async def test_a_pin_of_an_evicted_adapter_brings_it_back_to_host_memory(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    for adapter in adapters[:3]:
        await engine.add_lora(adapter)
    assert [each.residency for each in await engine.lora_standing()] == ["disk", "cpu", "cpu"]
    await engine.pin_lora("a0")
    for _ in range(500):
        if (await engine.lora_standing())[0].residency == "cpu":
            break
        await asyncio.sleep(0.01)
    assert (await engine.lora_standing())[0].residency == "cpu"


async def test_a_pin_that_leaves_no_room_for_others_is_refused_and_changes_nothing(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    for adapter in adapters[:2]:
        await engine.add_lora(adapter)
    await engine.pin_lora("a0")
    with pytest.raises(AdapterMemoryError, match="'a1': cannot be pinned"):
        await engine.pin_lora("a1")
    assert [each.pinned for each in await engine.lora_standing()] == [True, False]
    for unknown in ("nobody", 99):
        with pytest.raises(UnknownModelError, match=str(unknown)):
            await engine.pin_lora(unknown)


async def test_a_pin_goes_over_to_what_replaces_the_version(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    await engine.add_lora(adapters[0])
    await engine.pin_lora("a0")
    version = await engine.add_lora(LoRARequest("a0", 1, adapters[1].lora_path, load_inplace=True))
    assert [(each.version, each.pinned) for each in await engine.lora_standing()] == [(version, True)]


async def test_an_adapter_from_memory_is_the_one_from_its_file(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    from_file = await engine.add_lora(adapters[0])
    expected = await tokens(engine, "a0")
    tensors = tensors_of(adapters[0])
    version = await engine.add_lora("mine", tensors=tensors, config=config_of(adapters[0]))
    for tensor in tensors.values():
        tensor.zero_()
    assert version.digest == from_file.digest
    assert (version.source, version.rank, version.pages) == (None, from_file.rank, from_file.pages)
    assert await tokens(engine, "mine") == expected
    for adapter in adapters[1:]:
        await tokens(engine, adapter)
    assert await tokens(engine, "mine") == expected, "never evicted from host memory: it could not be read again"


async def test_a_name_is_loaded_from_memory_once_unless_it_is_to_be_replaced(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    first = await engine.add_lora("mine", tensors=tensors_of(adapters[0]), config=config_of(adapters[0]))
    other = {"tensors": tensors_of(adapters[1]), "config": config_of(adapters[1]).to_dict()}
    with pytest.raises(AdapterConflictError, match="load_inplace=True"):
        await engine.add_lora("mine", **other)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="tensors="):
        await engine.add_lora("mine")
    assert await engine.list_loras() == [first]
    answer = asyncio.create_task(tokens(engine, "mine", LONG))
    await running(engine, 1)
    second = await engine.add_lora("mine", **other, load_inplace=True)  # type: ignore[arg-type]
    assert second.digest != first.digest
    assert set(await standing(engine)) == {first.label, second.label}, "the first serves who is under way"
    assert (await answer)[:5] != await tokens(engine, "mine")
    await settled(engine)
    assert set(await standing(engine)) == {second.label}


@pytest.mark.parametrize("from_memory", [False, True])
async def test_a_removed_adapter_is_free_when_its_last_request_ends(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], from_memory: bool
) -> None:
    if from_memory:
        await engine.add_lora("a0", tensors=tensors_of(adapters[0]), config=config_of(adapters[0]))
    else:
        await engine.add_lora(adapters[0])
    alone = await tokens(engine, "a0", LONG)
    prepared = await engine.prepare(PROMPT, SHORT, lora="a0")
    answer = asyncio.create_task(tokens(engine, "a0", LONG))
    await running(engine, 1)
    assert await engine.remove_lora("a0" if from_memory else 1)
    (left,) = await engine.lora_standing()
    assert (left.draining, left.requests, left.in_use, left.residency) == (True, 1, True, "gpu")
    assert await answer == alone
    (left,) = await engine.lora_standing()
    assert left.draining, "a request that was prepared in time may still come"
    del prepared
    await settled(engine)
    assert not await engine.lora_standing()
    await until(lambda: not engine.snapshot().resident_adapters, engine.snapshot)


async def test_of_several_adapters_each_is_held_as_soon_as_it_is_found(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = await engine.add_lora("mine", tensors=tensors_of(adapters[0]), config=config_of(adapters[0]))
    await engine.announce_lora(adapters[1])
    await engine.announce_lora(LoRARequest("broken", 9, adapters[2].lora_path))
    gate, load = threading.Event(), engine._adapters._load

    def gated(source: LoRARequest) -> Any:
        gate.wait()
        if source.lora_name == "broken":
            raise AdapterFormatError("broken", "no luck")
        return load(source)

    monkeypatch.setattr(engine._adapters, "_load", gated)
    answered = asyncio.ensure_future(engine.generate(PROMPT, SHORT, lora={"mine": 0.5, "a1": 0.5}))
    refused = asyncio.ensure_future(engine.generate(PROMPT, SHORT, lora={"mine": 0.5, "broken": 0.5}))
    try:
        await until(lambda: len(engine._adapters._loading) == 2, lambda: "nothing is read")
        assert await engine.remove_lora("mine")
        assert [each.version for each in await engine.lora_standing() if each.draining] == [mine]
    finally:
        gate.set()
    assert mine.label in ((await answered).adapter or "")
    with pytest.raises(AdapterFormatError, match="no luck"):
        await refused
    del answered, refused
    await settled(engine)


async def test_force_ends_the_requests_under_way_and_nobody_elses(
    engine: AsyncLLMEngine, adapters: list[LoRARequest]
) -> None:
    for adapter in adapters[:2]:
        await engine.add_lora(adapter)
    alone = await tokens(engine, "a1", LONG)
    doomed, other = (asyncio.create_task(engine.generate(PROMPT, LONG, lora=name)) for name in ("a0", "a1"))
    await running(engine, 2)
    assert await engine.remove_lora("a0", force=True)
    assert (await doomed).outputs[0].finish_reason == "abort"
    assert (await other).outputs[0].token_ids == alone
    await settled(engine)
    assert [each.version.name for each in await engine.lora_standing()] == ["a1"]


def test_the_blocking_engine_has_the_same_verbs(model_of: ModelOf, adapters: list[LoRARequest]) -> None:
    engine = LLMEngine.from_engine_args(args_of(model_of("llama")))
    engine.add_lora("mine", tensors=tensors_of(adapters[0]), config=config_of(adapters[0]))
    engine.add_lora(adapters[1])
    engine.pin_lora("mine")
    assert [(each.version.name, each.pinned) for each in engine.lora_standing()] == [("mine", True), ("a1", False)]
    engine.unpin_lora("mine")
    engine.add_request("one", PROMPT, LONG, lora_request="mine")
    engine.step()
    assert engine.remove_lora("mine", force=True)
    ends = [output for _ in range(10) if engine.has_unfinished_requests() for output in engine.step()]
    assert ends[-1].outputs[0].finish_reason == "abort"
    assert engine.remove_lora(2)
    assert not engine.remove_lora(2)
    assert not engine.lora_standing()
