"""Roll-back, aliases and policies over HTTP: what each does, and what each refusal says."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from aiolora.api import create_app
from tests.api.conftest import inside
from tests.api.test_adapters import PROMPT, cards, complete, load, refusal, text, unload
from tests.conftest import ModelOf
from tests.tiny import make_adapter

Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def folders(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(model_of("llama"), folder / f"a{seed}", seed=seed, strength=2.0) for seed in range(3)]


@pytest.fixture
async def http(model_of: ModelOf, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A server that allows it, with the adapter `a0`."""
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "True")
    args = EngineArgs(
        model=str(model_of("llama")), dtype="float32", device="cpu", enable_lora=True, max_loras=2, max_lora_rank=8
    )
    engine = AsyncLLMEngine.from_engine_args(args)
    app = create_app(engine, lora_modules=[LoRARequest("a0", 1, str(folders[0]))], served_model_name="base")
    async with inside(app) as client:
        yield client


async def change(http: Client, name: str, verb: str, **body: Any) -> httpx.Response:
    return await http.post(f"/v1/lora_adapters/{name}/{verb}", json=body)


async def card(http: Client, name: str) -> dict[str, Any]:
    (found,) = [each for each in (await cards(http)).values() if each["id"] == name]
    return found


async def test_a_name_is_rolled_back_and_the_list_says_to_what_it_could_be(http: Client, folders: list[Path]) -> None:
    old, first = await text(http, "a0"), await card(http, "a0")
    assert first["earlier"] is None
    await load(http, "a0", folders[1], load_inplace=True)
    second = await card(http, "a0")
    assert second["earlier"] == first["version"]
    answer = await http.post("/v1/lora_adapters/a0/rollback")
    said = f"Success: LoRA adapter 'a0' rolled back to {first['version']} successfully"
    assert (answer.status_code, answer.text) == (200, said)
    assert await text(http, "a0") == old
    assert (await complete(http, "a0")).headers["x-aiolora-adapter"] == first["version"]
    assert (await card(http, "a0"))["earlier"] == second["version"]
    assert (await change(http, "a0", "rollback", digest=second["digest"])).status_code == 200
    assert await text(http, "a0") != old


async def test_an_alias_is_a_model_of_its_own_to_clients(http: Client, folders: list[Path]) -> None:
    answer = await change(http, "a0", "alias", alias="org/prod")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a0' aliased as 'org/prod' successfully")
    assert await text(http, "org/prod") == await text(http, "a0")
    models = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["base", "a0", "org/prod"]
    assert models[2]["root"] == models[1]["root"]
    assert (await http.get("/v1/models/org/prod")).json()["id"] == "org/prod"
    assert (await card(http, "a0"))["aliases"] == ["org/prod"]
    assert refusal(await unload(http, "a0")) == (400, None, "adapter_conflict")
    assert refusal(await load(http, "org/prod", folders[1], load_inplace=True)) == (400, None, "adapter_conflict")
    assert (await unload(http, "org/prod")).status_code == 200
    assert (await unload(http, "a0")).status_code == 200


async def test_what_was_never_read_is_listed_with_its_aliases_and_policy(http: Client) -> None:
    await change(http, "a0", "alias", alias="prod")
    await change(http, "prod", "policy", weight=3)
    unread = await card(http, "a0")
    assert (unread["digest"], unread["earlier"], unread["aliases"]) == (None, None, ["prod"])
    assert unread["policy"]["weight"] == 3
    assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["base", "a0", "prod"]
    assert (await http.get("/v1/models/prod")).json()["id"] == "prod"
    asked = await http.post("/v1/completions", json=PROMPT | {"model": "prodd"})
    assert "did you mean 'prod'" in asked.json()["error"]["message"]
    assert (await complete(http, "prod")).headers["x-aiolora-adapter"] == (await card(http, "a0"))["version"]


async def test_over_its_tokens_a_minute_it_is_429_with_the_seconds_to_wait(http: Client, folders: list[Path]) -> None:
    await load(http, "a1", folders[1], policy={"tokens_per_minute": 6, "weight": 2})
    policy = {"weight": 2.0, "max_concurrency": None, "tokens_per_minute": 6}
    assert (await card(http, "a1"))["policy"] == policy
    await text(http, "a1", max_tokens=8)
    for stream in (False, True):
        body = PROMPT | {"model": "a1", "max_tokens": 4, "stream": stream}
        refused = await http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert refused.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "tokens",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        assert 60 <= int(refused.headers["retry-after"]) <= 70  # 4 + 8 tokens of 6, and one to go on with
    await text(http, "a0")
    answer = await change(http, "a1", "policy", max_concurrency=3)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a1' limited successfully")
    await text(http, "a1")


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("nobody/rollback", {}, (404, None, "adapter_not_found")),
        ("base/rollback", {}, (404, None, "adapter_not_found")),
        ("a0/rollback", {}, (404, None, "adapter_not_found")),
        ("a0/rollback", {"digest": 5}, (400, "digest", "invalid_value")),
        ("a0/alias", {"alias": "base"}, (400, None, "adapter_conflict")),
        ("a0/alias", {"alias": "a0"}, (400, None, "adapter_conflict")),
        ("a0/alias", {"alias": ""}, (400, "alias", "invalid_value")),
        ("a0/alias", {}, (400, "alias", "invalid_value")),
        ("a0/policy", {"weight": 0}, (400, "weight", "invalid_value")),
        ("a0/policy", {"weigth": 2}, (400, None, "invalid_value")),
        ("nobody/policy", {}, (404, None, "adapter_not_found")),
        ("a0/promote", {}, (404, None, "unknown_url")),
    ],
)
async def test_each_refusal_names_its_culprit(
    http: Client, path: str, body: dict[str, object], expected: tuple[int, str | None, str]
) -> None:
    answer = await http.post(f"/v1/lora_adapters/{path}", json=body)
    assert refusal(answer) == expected, answer.text


async def test_without_the_operators_word_nothing_changes(model_of: ModelOf, folders: list[Path]) -> None:
    engine = AsyncLLMEngine.from_engine_args(
        EngineArgs(model=str(model_of("llama")), dtype="float32", device="cpu", enable_lora=True, max_lora_rank=8)
    )
    app = create_app(engine, lora_modules=[LoRARequest("a0", 1, str(folders[0]))], served_model_name="base")
    async with inside(app) as closed:
        for verb, body in (("rollback", {}), ("alias", {"alias": "prod"}), ("policy", {})):
            assert refusal(await change(closed, "a0", verb, **body)) == (404, None, "switched_off")
