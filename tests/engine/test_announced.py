"""Adapters that are known by name and read when they are first asked for."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aiolora import AsyncLLMEngine, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.errors import (
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterRankError,
    UnknownModelError,
)
from aiolora.lora.tensorfile import Entry, TensorFile
from tests.conftest import ModelOf
from tests.tiny import make_adapter, reconfigure, rewrite

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
    folder = tmp_path_factory.mktemp("announced")
    made = [make_adapter(model_of("llama"), folder / f"a{seed}", seed=seed, strength=2.0) for seed in range(3)]
    return [LoRARequest(path.name, number, str(path)) for number, path in enumerate(made, start=1)]


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

    def asked(self: TensorFile, entry: Entry) -> tuple[int, int]:
        call(self.adapter)
        return where(self, entry)

    monkeypatch.setattr(TensorFile, "read", reading)
    monkeypatch.setattr(TensorFile, "where", asked)


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
    under_way, go_on = threading.Event(), threading.Event()

    def wait(adapter: str) -> None:
        if adapter == "a0" and not under_way.is_set():
            under_way.set()
            assert go_on.wait(20)

    before_each_read(monkeypatch, wait)
    asked = asyncio.ensure_future(tokens(engine, "a0"))
    assert await asyncio.to_thread(under_way.wait, 20)
    moved = LoRARequest("a0", 1, adapters[1].lora_path, load_inplace=then == "replaced")
    if then == "replaced":
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        await engine.add_lora(moved)
    else:
        assert await engine.remove_lora("a0")
        if then == "announced again":
            await engine.announce_lora(moved)
    go_on.set()
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
    engine.add_request("one", PROMPT, SHORT, lora_request="a1")
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert set(reads) == {"a1"}
    assert outputs[0].adapter == engine.list_loras()[0].label
    engine.pin_lora("a0")
    assert [(each.version.name, each.pinned) for each in engine.lora_standing()] == [("a0", True), ("a1", False)]
