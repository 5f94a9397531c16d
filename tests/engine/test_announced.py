"""Adapters that are known by name and read when they are first asked for."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from aiolora import AdapterPolicy, AsyncLLMEngine, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterRankError,
    UnknownModelError,
)
from aiolora.lora.tensorfile import Entry, TensorFile
from tests.conftest import ModelOf
from tests.tiny import make_loras, reconfigure, rewrite

PROMPT = [5, 6, 7, 8]
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def args_of(model: Path) -> EngineArgs:
    return EngineArgs(model=str(model), dtype="float32", enable_lora=True, max_loras=2, max_cpu_loras=3)


@pytest.fixture
async def engine(model_of: ModelOf) -> AsyncIterator[AsyncLLMEngine]:
    async with AsyncLLMEngine.from_engine_args(args_of(model_of("llama"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    return make_loras(model_of("llama"), tmp_path_factory.mktemp("announced"), 3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters of whose tensors something was read, a tensor at a time."""
    seen: list[str] = []
    before_each_read(monkeypatch, seen.append)
    return seen


def before_each_read(monkeypatch: pytest.MonkeyPatch, call: Callable[[str], None]) -> None:
    """Let `call` know the adapter of each tensor before it is read, by compiled code (which asks where) or not."""
    read, where = TensorFile.read, TensorFile.where

    def reading(self: TensorFile, entry: Entry, into: memoryview) -> None:
        call(self.adapter)
        read(self, entry, into)

    def asked(self: TensorFile, entries: Sequence[Entry]) -> tuple[int, npt.NDArray[np.int64]]:
        for _ in entries:
            call(self.adapter)
        return where(self, entries)

    monkeypatch.setattr(TensorFile, "read", reading)
    monkeypatch.setattr(TensorFile, "where", asked)


@dataclass
class Held:
    """The first read of an adapter, which does not begin before `go_on`."""

    under_way: threading.Event
    go_on: threading.Event


def _hold(monkeypatch: pytest.MonkeyPatch, name: str) -> Held:
    held = Held(threading.Event(), threading.Event())

    def wait(adapter: str) -> None:
        if adapter == name and not held.under_way.is_set():
            held.under_way.set()
            assert held.go_on.wait(20)

    before_each_read(monkeypatch, wait)
    return held


async def tokens(engine: AsyncLLMEngine, lora: str | LoRARequest) -> list[int]:
    return (await engine.generate(PROMPT, SHORT, lora=lora)).outputs[0].token_ids


def copied(adapter: LoRARequest, folder: Path) -> LoRARequest:
    shutil.copytree(adapter.lora_path, folder)
    return LoRARequest(adapter.lora_name, adapter.lora_int_id, str(folder))


async def test_an_announced_adapter_is_read_once_by_who_asks_first_and_answers_as_any(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], reads: list[str]
) -> None:
    for adapter in adapters:
        await engine.announce_lora(adapter)
    await engine.announce_lora(adapters[0])
    assert reads == []
    assert await engine.list_loras() == []
    answers = await asyncio.gather(*(tokens(engine, name) for name in ("a1", "a1", "a0", "a1")))
    assert set(reads) == {"a0", "a1"}
    assert len(reads) == 2 * len(load_file(Path(adapters[0].lora_path) / "adapter_model.safetensors"))
    assert [version.name for version in await engine.list_loras()] == ["a0", "a1"], "in the order of their names"
    async with AsyncLLMEngine.from_engine_args(engine.args) as other:
        versions = [await other.add_lora(adapter) for adapter in adapters[:2]]
        assert [version.digest for version in versions] == [each.digest for each in await engine.list_loras()]
        assert [await tokens(other, name) for name in ("a1", "a1", "a0", "a1")] == answers


async def test_what_config_and_header_say_is_refused_at_once_and_leaves_no_name(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    wide = copied(adapters[0], tmp_path / "wide")
    reconfigure(Path(wide.lora_path), r=128)
    rewrite(Path(wide.lora_path), lambda t: {n: torch.cat([v] * 16, 0 if "lora_A" in n else 1) for n, v in t.items()})
    other = copied(adapters[0], tmp_path / "other")
    rewrite(Path(other.lora_path), lambda t: {n: v[:, :-1] for n, v in t.items()})
    for wrong, error in (
        (wide, AdapterRankError),
        (other, AdapterError),
        (_nowhere(adapters[0]), AdapterNotFoundError),
    ):
        with pytest.raises(error, match="'a0'"):
            await engine.announce_lora(wrong)
        with pytest.raises(UnknownModelError):
            await tokens(engine, "a0")
    await engine.announce_lora(adapters[0])
    for conflict in (LoRARequest("a0", 1, adapters[1].lora_path), LoRARequest("new", 1, adapters[0].lora_path)):
        with pytest.raises(AdapterConflictError):
            await engine.announce_lora(conflict)
    with pytest.raises(AdapterConflictError, match="load_inplace"):
        await engine.add_lora("a0", tensors=_tensors(adapters[1]), config=_config())


def _nowhere(adapter: LoRARequest) -> LoRARequest:
    return LoRARequest(adapter.lora_name, adapter.lora_int_id, "/no/such/folder")


def _tensors(adapter: LoRARequest) -> dict[str, torch.Tensor]:
    return load_file(Path(adapter.lora_path) / "adapter_model.safetensors")


def _config() -> dict[str, object]:
    return {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


async def test_what_only_the_bytes_tell_fails_who_asks_for_it_until_it_is_mended(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], tmp_path: Path
) -> None:
    adapter = copied(adapters[0], tmp_path / "a0")
    good = _tensors(adapter)
    rewrite(tmp_path / "a0", lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()})
    await engine.announce_lora(adapter)
    await engine.announce_lora(adapters[1])
    bad, fine = await asyncio.gather(tokens(engine, "a0"), tokens(engine, "a1"), return_exceptions=True)
    assert isinstance(bad, AdapterFormatError)
    assert isinstance(fine, list)
    rewrite(tmp_path / "a0", lambda _: good)
    assert len(await tokens(engine, "a0")) == 5


@pytest.mark.parametrize("then", ["removed", "replaced", "announced again"])
async def test_a_name_that_changes_while_it_is_first_read_means_what_it_means_last(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    second = await tokens(engine, LoRARequest("second", 9, adapters[1].lora_path))
    await engine.announce_lora(adapters[0])
    held = _hold(monkeypatch, "a0")
    asked = asyncio.ensure_future(tokens(engine, "a0"))
    assert await asyncio.to_thread(held.under_way.wait, 20)
    moved = LoRARequest("a0", 1, adapters[1].lora_path, load_inplace=then == "replaced")
    if then == "replaced":
        asyncio.get_running_loop().call_later(0.2, held.go_on.set)
        await engine.add_lora(moved)
    else:
        assert await engine.remove_lora("a0")
        if then == "announced again":
            await engine.announce_lora(moved)
    held.go_on.set()
    if then == "removed":
        with pytest.raises(UnknownModelError):
            await asked
        assert [version.name for version in await engine.list_loras()] == ["second"]
    else:
        assert await asked == second
        assert await tokens(engine, "a0") == second


async def test_verbs_that_need_the_version_read_it_and_removal_does_not(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], reads: list[str]
) -> None:
    for adapter in adapters:
        await engine.announce_lora(adapter)
    assert await engine.remove_lora("a2")
    assert await engine.remove_lora(2)
    assert not await engine.remove_lora("a2")
    assert reads == []
    await engine.pin_lora(1)
    assert [(each.version.name, each.pinned) for each in await engine.lora_standing()] == [("a0", True)]
    with pytest.raises(UnknownModelError):
        await tokens(engine, "a1")


def test_the_blocking_engine_announces_too(model_of: ModelOf, adapters: list[LoRARequest], reads: list[str]) -> None:
    engine = LLMEngine.from_engine_args(args_of(model_of("llama")))
    for adapter in adapters:
        engine.announce_lora(adapter)
    assert reads == []
    assert engine.remove_lora("a2")
    engine.alias_lora("prod", "a1")
    engine.set_lora_policy("prod", AdapterPolicy(weight=2))
    engine.unpin_lora("a1")
    assert reads == []
    engine.add_request("one", PROMPT, SHORT, lora_request="prod")
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert set(reads) == {"a1"}
    assert outputs[0].adapter == engine.list_loras()[0].label
    engine.pin_lora("a0")
    assert [(each.version.name, each.pinned) for each in engine.lora_standing()] == [("a0", True), ("a1", False)]


async def test_an_alias_of_an_announced_adapter_reads_it_and_follows_where_it_is_moved(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], reads: list[str]
) -> None:
    for adapter in adapters[:2]:
        await engine.announce_lora(adapter)
    await engine.alias_lora("prod", "a0")
    with pytest.raises(AdapterConflictError, match="prod"):
        await engine.announce_lora(LoRARequest("prod", 7, adapters[2].lora_path))
    with pytest.raises(UnknownModelError, match="did you mean 'prod'"):
        await tokens(engine, "prodd")
    assert reads == []
    first = await tokens(engine, "prod")
    assert set(reads) == {"a0"}
    assert first == await tokens(engine, "a0")
    await engine.alias_lora("prod", "a1")
    with pytest.raises(AdapterConflictError, match="prod"):
        await engine.remove_lora("a1")
    assert set(reads) == {"a0"}
    assert await tokens(engine, "prod") == await tokens(engine, "a1")


async def test_an_alias_that_moves_while_its_adapter_is_first_read_means_what_it_means_last(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    for adapter in adapters[:2]:
        await engine.announce_lora(adapter)
    await engine.alias_lora("prod", "a0")
    held = _hold(monkeypatch, "a0")
    asked = asyncio.ensure_future(tokens(engine, "prod"))
    assert await asyncio.to_thread(held.under_way.wait, 20)
    await engine.alias_lora("prod", "a1")
    held.go_on.set()
    assert await asked == await tokens(engine, "a1")


async def test_what_an_adapter_may_take_is_said_before_it_is_read_and_goes_with_its_name(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], reads: list[str]
) -> None:
    await engine.announce_lora(adapters[0], policy=AdapterPolicy(tokens_per_minute=4))
    await engine.announce_lora(adapters[1])
    await engine.set_lora_policy("a1", AdapterPolicy(weight=2))
    assert engine.intake.policies.get("a1").weight == 2
    assert reads == []
    assert len(await tokens(engine, "a0")) == 5
    with pytest.raises(AdapterBusyError, match="'a0'"):
        await tokens(engine, "a0")
    assert await engine.remove_lora("a1")
    await engine.announce_lora(adapters[1])
    assert engine.intake.policies.get("a1") == AdapterPolicy()


async def test_what_was_never_read_has_no_earlier_version_and_is_not_pinned(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], reads: list[str]
) -> None:
    await engine.announce_lora(adapters[0])
    with pytest.raises(AdapterNotFoundError, match="no earlier version"):
        await engine.rollback_lora("a0")
    await engine.unpin_lora("a0")
    with pytest.raises(UnknownModelError):
        await engine.unpin_lora("a1")
    assert reads == []
    moved = LoRARequest("a0", 1, adapters[1].lora_path, load_inplace=True)
    await engine.add_lora(moved)
    with pytest.raises(AdapterNotFoundError, match="no earlier version"):
        await engine.rollback_lora("a0")
    second = await tokens(engine, "a0")
    await engine.add_lora(LoRARequest("a0", 1, adapters[2].lora_path, load_inplace=True))
    await engine.rollback_lora("a0")
    assert await tokens(engine, "a0") == second


async def test_what_is_announced_while_a_resolver_looks_for_it_is_read(
    engine: AsyncLLMEngine, adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def announce(name: str) -> bool:
        await engine.announce_lora(adapters[0])
        return False

    monkeypatch.setattr(engine._adapters, "_resolving", SimpleNamespace(resolve=announce, stop=lambda: None))
    assert await engine.resolve_lora("a0")
    assert [version.name for version in await engine.list_loras()] == ["a0"]
