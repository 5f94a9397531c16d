"""What a name stands for, and what it may take, while others are served: roll-back, aliases, policies."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from aiolora import AdapterPolicy, AsyncLLMEngine, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.engine.adapters import AdapterStanding
from aiolora.errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterConflictError,
    AdapterNotFoundError,
    RequestError,
    UnknownModelError,
)
from tests.conftest import ModelOf
from tests.engine.waiting import running
from tests.tiny import make_adapter

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def args_of(model: Path) -> EngineArgs:
    room = {"max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 8}
    return EngineArgs(model=str(model), dtype="float32", device="cpu", enable_lora=True, **room)  # type: ignore[arg-type]


@pytest.fixture
async def engine(model_of: ModelOf) -> AsyncIterator[AsyncLLMEngine]:
    async with AsyncLLMEngine.from_engine_args(args_of(model_of("llama"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def folders(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(model_of("llama"), folder / f"a{seed}", seed=seed, strength=2.0) for seed in range(5)]


def request(folder: Path, name: str = "sql", *, replace: bool = False) -> LoRARequest:
    return LoRARequest(name, abs(hash(name)), str(folder), load_inplace=replace)


async def tokens(engine: AsyncLLMEngine, lora: str, params: SamplingParams = SHORT) -> list[int]:
    return (await engine.generate(PROMPT, params, lora=lora)).outputs[0].token_ids


async def standing(engine: AsyncLLMEngine, name: str = "sql") -> AdapterStanding:
    (found,) = [each for each in await engine.lora_standing() if each.version.name == name and not each.draining]
    return found


# ---- roll-back ----


async def test_a_name_goes_back_to_what_it_stood_for_and_forth_again(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    first = await engine.add_lora(request(folders[0]))
    assert (await standing(engine)).earlier is None
    old = await tokens(engine, "sql")
    second = await engine.add_lora(request(folders[1], replace=True))
    new = await tokens(engine, "sql")
    assert new != old
    assert (await standing(engine)).earlier == first
    for digest, version, expected in ((None, first, old), (second.digest, second, new), (first.digest[:6], first, old)):
        assert await engine.rollback_lora("sql", digest) == version
        assert await engine.list_loras() == [version]
        assert await tokens(engine, "sql") == expected


async def test_a_roll_back_works_when_the_folder_was_overwritten_as_long_as_host_memory_has_the_bytes(
    engine: AsyncLLMEngine, folders: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[0], tmp_path / "sql")
    first = await engine.add_lora(request(tmp_path / "sql"))
    old = await tokens(engine, "sql")
    shutil.copytree(folders[1], tmp_path / "sql", dirs_exist_ok=True)
    second = await engine.add_lora(request(tmp_path / "sql", replace=True))
    await engine.rollback_lora("sql")
    assert await tokens(engine, "sql") == old
    await engine.rollback_lora("sql")
    for number in (2, 3, 4):  # host memory has room for three, and guests are the first to go
        await engine.add_lora(request(folders[number], f"other{number}"))
    with pytest.raises(AdapterChangedError, match=f"{first.digest[:12]} is not held any more"):
        await engine.rollback_lora("sql")
    assert (await engine.list_loras())[0] == second
    assert await tokens(engine, "sql") != old


async def test_what_host_memory_has_no_more_is_read_again_where_it_still_is(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    first = await engine.add_lora(request(folders[0]))
    old = await tokens(engine, "sql")
    await engine.add_lora(request(folders[1], replace=True))
    for number in (2, 3, 4):
        await engine.add_lora(request(folders[number], f"other{number}"))
    back = await engine.rollback_lora("sql")
    assert (back.digest, back.source) == (first.digest, first.source)
    assert await tokens(engine, "sql") == old


async def test_a_version_from_memory_comes_back_while_host_memory_has_it(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    def given(number: int) -> dict[str, object]:
        tensors = load_file(folders[number] / "adapter_model.safetensors")
        return {"tensors": tensors, "config": LoraConfig.from_pretrained(folders[number])}

    first = await engine.add_lora("sql", **given(0))  # type: ignore[arg-type]
    await engine.add_lora("sql", **given(1), load_inplace=True)  # type: ignore[arg-type]
    assert await engine.rollback_lora("sql") == first
    for number in (2, 3, 4):
        await engine.add_lora(request(folders[number], f"other{number}"))
    assert (await standing(engine)).earlier is None, "nothing that could come back"
    with pytest.raises(AdapterNotFoundError, match="from memory and is not held any more"):
        await engine.rollback_lora("sql")


async def test_requests_under_way_end_on_what_they_began_with(engine: AsyncLLMEngine, folders: list[Path]) -> None:
    await engine.add_lora(request(folders[0]))
    alone = await tokens(engine, "sql", LONG)
    await engine.add_lora(request(folders[1], replace=True))
    newer = await tokens(engine, "sql", LONG)
    answer = asyncio.create_task(tokens(engine, "sql", LONG))
    await running(engine, 1)
    await engine.rollback_lora("sql")
    assert await tokens(engine, "sql", LONG) == alone
    assert await answer == newer
    await engine.rollback_lora("sql")
    assert await tokens(engine, "sql", LONG) == newer


async def test_only_the_version_replaced_last_is_kept_and_takes_nothing_on_the_device(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    versions = []
    for folder in folders[:3]:
        versions.append(await engine.add_lora(request(folder, replace=True)))
        await tokens(engine, "sql")
    found = await engine.add_lora(request(folders[2], replace=True))  # the same again
    assert found.digest == versions[2].digest
    assert (await standing(engine)).earlier == versions[1]
    with pytest.raises(AdapterNotFoundError, match=f"no earlier version '{versions[0].digest[:12]}', only"):
        await engine.rollback_lora("sql", versions[0].digest)
    await tokens(engine, "sql")
    assert engine.snapshot().resident_adapters == (found.label,)
    assert await engine.remove_lora("sql")
    assert not await engine.lora_standing()


async def test_a_pin_goes_back_with_the_name(engine: AsyncLLMEngine, folders: list[Path]) -> None:
    await engine.add_lora(request(folders[0]))
    await engine.add_lora(request(folders[1], replace=True))
    await engine.pin_lora("sql")
    await engine.rollback_lora("sql")
    assert (await standing(engine)).pinned


async def test_a_roll_back_of_nothing_says_so(engine: AsyncLLMEngine, folders: list[Path]) -> None:
    with pytest.raises(UnknownModelError, match="nobody"):
        await engine.rollback_lora("nobody")
    with pytest.raises(UnknownModelError):
        await engine.rollback_lora(engine.args.model)
    await engine.add_lora(request(folders[0]))
    with pytest.raises(AdapterNotFoundError, match="has no earlier version: it was not replaced"):
        await engine.rollback_lora("sql")


# ---- aliases ----


async def test_an_alias_means_what_its_name_means_also_after_a_reload(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    await engine.add_lora(request(folders[0]))
    await engine.add_lora(request(folders[1], "style"))
    await engine.alias_lora("prod", "sql")
    assert await tokens(engine, "prod") == await tokens(engine, "sql")
    output = await engine.generate(PROMPT, SHORT, lora={"prod": 0.5, "sql": 0.5})
    assert output.outputs[0].token_ids == await tokens(engine, "sql"), "two names of one adapter add up"
    assert (output.adapter or "").startswith("sql@"), "an answer names the adapter, not the alias"
    await engine.add_lora(request(folders[2], replace=True))
    assert await tokens(engine, "prod") == await tokens(engine, "sql")
    await engine.alias_lora("prod", "style")
    assert await tokens(engine, "prod") == await tokens(engine, "style")
    await engine.pin_lora("prod")
    assert (await standing(engine, "style")).pinned
    assert await engine.remove_lora("prod")
    with pytest.raises(UnknownModelError, match="prod"):
        await tokens(engine, "prod")
    assert [version.name for version in await engine.list_loras()] == ["sql", "style"]


async def test_names_of_models_are_no_aliases_and_aliases_no_names_of_adapters(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    await engine.add_lora(request(folders[0]))
    for taken in (engine.args.model, "sql"):
        with pytest.raises(AdapterConflictError, match="name of a model that is served"):
            await engine.alias_lora(taken, "sql")
    with pytest.raises(UnknownModelError):
        await engine.alias_lora("prod", "nobody")
    with pytest.raises(RequestError, match="empty"):
        await engine.alias_lora(" ", "sql")
    await engine.alias_lora("prod", "sql")
    with pytest.raises(AdapterConflictError, match="is an alias of 'sql'"):
        await engine.add_lora(request(folders[1], "prod"))
    with pytest.raises(AdapterConflictError):
        engine.reserve("prod")


async def test_an_adapter_is_not_removed_from_under_its_alias_unless_by_force(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    await engine.add_lora(request(folders[0]))
    await engine.alias_lora("prod", "sql")
    with pytest.raises(AdapterConflictError, match="has the alias 'prod'"):
        await engine.remove_lora("sql")
    assert await tokens(engine, "prod")
    assert await engine.remove_lora("sql", force=True)
    for name in ("sql", "prod"):
        with pytest.raises(UnknownModelError):
            await tokens(engine, name)


# ---- policies ----


async def test_over_its_tokens_a_minute_an_adapter_is_refused_and_nobody_else(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    await engine.add_lora(request(folders[0]), policy=AdapterPolicy(tokens_per_minute=20))
    await engine.add_lora(request(folders[1], "style"))
    await tokens(engine, "sql")
    await tokens(engine, "sql", LONG)
    with pytest.raises(AdapterBusyError, match="'sql': has used its 20 tokens a minute") as refused:
        await tokens(engine, "sql")
    used = 2 * len(PROMPT) + 5 + 200
    assert refused.value.retry_after_s == pytest.approx((used - 20 + 1) * 60 / 20, abs=30)
    with pytest.raises(AdapterBusyError):
        await engine.generate(PROMPT, SHORT, lora={"style": 0.5, "sql": 0.5})
    assert await tokens(engine, "style")
    await engine.set_lora_policy("sql", AdapterPolicy())
    assert await tokens(engine, "sql")


async def test_over_its_concurrency_an_adapter_waits_and_everybody_is_served(
    engine: AsyncLLMEngine, folders: list[Path]
) -> None:
    await engine.add_lora(request(folders[0]), policy=AdapterPolicy(max_concurrency=1))
    alone = await tokens(engine, "sql", LONG)
    several = [asyncio.create_task(tokens(engine, "sql", LONG)) for _ in range(3)]
    await running(engine, 1)
    most = 0
    while not all(task.done() for task in several):
        await asyncio.sleep(0.002)
        most = max(most, engine.snapshot().running)
    assert most == 1
    assert [await task for task in several] == [alone] * 3


async def test_a_policy_belongs_to_a_name_that_is_loaded(engine: AsyncLLMEngine, folders: list[Path]) -> None:
    with pytest.raises(UnknownModelError):
        await engine.set_lora_policy("sql", AdapterPolicy())
    policy = AdapterPolicy(tokens_per_minute=1)
    await engine.add_lora(request(folders[0]), policy=policy)
    await engine.add_lora(request(folders[1], replace=True))
    assert engine.intake.policies.get("sql") == policy
    await engine.remove_lora("sql")
    await engine.add_lora(request(folders[0]))
    assert engine.intake.policies.get("sql") == AdapterPolicy()


def test_the_blocking_engine_has_the_same_verbs(model_of: ModelOf, folders: list[Path]) -> None:
    engine = LLMEngine.from_engine_args(args_of(model_of("llama")))
    first = engine.add_lora(request(folders[0]), policy=AdapterPolicy(tokens_per_minute=6))
    engine.add_lora(request(folders[1], replace=True))
    assert engine.rollback_lora("sql") == first
    engine.alias_lora("prod", "sql")
    engine.add_request("one", PROMPT, SHORT, lora_request="prod")
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert outputs[-1].adapter == first.label
    with pytest.raises(AdapterBusyError):
        engine.add_request("two", PROMPT, SHORT, lora_request="sql")
    engine.set_lora_policy("sql", AdapterPolicy(weight=0.5))
    engine.add_request("two", PROMPT, SHORT, lora_request="sql")
    engine.abort_request("two")
    for number in (2, 3, 4):
        engine.add_lora(request(folders[number], f"other{number}"))
    assert engine.rollback_lora("sql").source == str(folders[1])
    assert engine.remove_lora("prod")
    assert engine.remove_lora("sql")
