"""The blocking faces where they differ from the async one: names that a resolver finds, adapters read ahead."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiolora import LLM, LLMEngine, LoRARequest, SamplingParams
from aiolora.errors import AdapterFormatError, AdapterResolveError, RequestError, UnknownModelError
from aiolora.lora.resolver import LoRAResolver, LoRAResolverRegistry
from tests.conftest import ModelOf
from tests.engine.test_announced import before_each_read
from tests.tiny import make_adapter, make_loras

SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


class Finds(LoRAResolver):
    """Knows `good`, finds rubbish for `broken`, fails on `cursed`."""

    def __init__(self, good: Path, broken: Path) -> None:
        self.folders = {"good": good, "broken": broken}
        self.asked: list[str] = []

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        self.asked.append(lora_name)
        await asyncio.sleep(0)
        if lora_name == "cursed":
            raise RuntimeError("no network")
        folder = self.folders.get(lora_name)
        return None if folder is None else LoRARequest(lora_name, len(self.asked), str(folder))


def test_steps_go_on_while_adapters_beyond_the_slots_are_read(
    model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(model_of("llama")), dtype="float32", enable_lora=True, max_lora_rank=8, max_loras=2)
    loras = make_loras(model_of("llama"), tmp_path, 3)
    wanted = [loras[0], None, loras[1], loras[2], loras[0]]
    stepped, advance = threading.Event(), LLMEngine.advance
    monkeypatch.setattr(LLMEngine, "advance", lambda engine: (advance(engine), stepped.set())[0])
    early: list[str] = []

    def before(adapter: str) -> None:
        if adapter == loras[2].lora_name:
            assert stepped.wait(60), "nobody steps before the third adapter is read"
        elif stepped.is_set():
            early.append(adapter)

    before_each_read(monkeypatch, before)
    outputs = llm.generate([PROMPT] * 5, SHORT, lora_request=wanted, use_tqdm=False)
    assert not early, "the first that have slots begin together"
    again = llm.generate([PROMPT] * 5, SHORT, lora_request=wanted, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in again]
    assert [output.adapter for output in outputs] == [output.adapter for output in again]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4


@pytest.fixture
def resolver(model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Finds]:
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "1")
    broken = make_adapter(model_of("llama"), tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"rubbish")
    resolver = Finds(make_adapter(model_of("llama"), tmp_path / "good", strength=2.0), broken)
    LoRAResolverRegistry.register_resolver("finds", resolver)
    yield resolver
    LoRAResolverRegistry.remove_resolver("finds")


def llm_of(model_of: ModelOf) -> LLM:
    return LLM(str(model_of("llama")), dtype="float32", device="cpu", enable_lora=True, max_lora_rank=8)


def test_an_unknown_name_is_resolved_once_and_serves_from_then_on(model_of: ModelOf, resolver: Finds) -> None:
    llm = llm_of(model_of)
    plain, *resolved = llm.generate([PROMPT] * 3, SHORT, lora_request=[None, "good", "good"], use_tqdm=False)
    by_path = llm.generate([PROMPT], SHORT, lora_request=LoRARequest("mine", 9, str(resolver.folders["good"])))
    assert resolver.asked == ["good"]
    assert resolved[0].outputs[0].token_ids == by_path[0].outputs[0].token_ids != plain.outputs[0].token_ids
    assert resolved[1].adapter == resolved[0].adapter
    assert (resolved[0].adapter or "").startswith("good@")


def test_what_no_resolver_finds_or_what_it_finds_is_broken_fails_its_own_call(
    model_of: ModelOf, resolver: Finds
) -> None:
    llm = llm_of(model_of)
    for name, error in (
        ("nobody", UnknownModelError),
        ("cursed", AdapterResolveError),
        ("broken", AdapterFormatError),
    ):
        with pytest.raises(error):
            llm.generate([PROMPT], SHORT, lora_request=name, use_tqdm=False)
    assert not llm.engine.resolve_lora("nobody"), "remembered for a while"
    assert resolver.asked == ["nobody", "cursed", "broken"]
    assert llm.generate([PROMPT], SHORT, lora_request="good", use_tqdm=False)[0].finished


def test_no_resolver_is_asked_where_it_is_not_allowed(
    model_of: ModelOf, resolver: Finds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "0")
    with pytest.raises(UnknownModelError):
        llm_of(model_of).generate([PROMPT], SHORT, lora_request="good", use_tqdm=False)
    assert not resolver.asked


def test_priorities_are_one_for_all_or_one_each(model_of: ModelOf) -> None:
    llm = llm_of(model_of)
    plain = llm.generate([PROMPT] * 2, SHORT, use_tqdm=False)
    for priority in (-1, [3, 0]):
        outputs = llm.generate([PROMPT] * 2, SHORT, priority=priority, use_tqdm=False)
        assert [each.outputs[0].token_ids for each in outputs] == [each.outputs[0].token_ids for each in plain]
    with pytest.raises(RequestError, match="priority has 1 items for 2 prompts"):
        llm.generate([PROMPT] * 2, SHORT, priority=[1], use_tqdm=False)
    with pytest.raises(RequestError, match="priority=1001"):
        llm.generate([PROMPT], SHORT, priority=1001, use_tqdm=False)


async def test_it_works_where_a_loop_runs_already(model_of: ModelOf, resolver: Finds) -> None:
    assert llm_of(model_of).generate([PROMPT], SHORT, lora_request="good", use_tqdm=False)[0].finished
