"""Keys: who may ask, for which adapters, and who may change them. What a key may not use does not exist for it."""

from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import httpx
import pytest

from aiolora.api import create_app
from aiolora.config import ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.grammar import CompiledGrammar
from aiolora.engine.intake import Settled
from aiolora.errors import ConfigError
from aiolora.types import LoRARequest, Request, SamplingParams
from tests.api.conftest import NAMING, inside

HASHED = "sha256:" + sha256(b"hashed-key").hexdigest()
ARGS = ServerArgs(
    api_key=("whole-key", HASHED, '{"key": "alpha-key", "name": "team-a", "adapters": ["alpha", "later"]}'),
    admin_key=("the-admin",),
)


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def client(
    byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = create_app(byte_engine, lora_modules=three_adapters, served_model_name="base", args=ARGS)
    async with inside(app) as client:
        yield client


async def ask(client: httpx.AsyncClient, key: str, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "hello", "max_tokens": 1}
    return await client.post("/v1/completions", json=body, headers=bearing(key))


@pytest.mark.parametrize("header", [{}, bearing("wrong"), bearing(HASHED), {"authorization": "Basic whole-key"}])
async def test_without_a_key_nothing_is_told(client: httpx.AsyncClient, header: dict[str, str]) -> None:
    for method, path in [("GET", "/v1/models"), ("GET", "/v1/lora_adapters"), ("GET", "/metrics")]:
        response = await client.request(method, path, headers=header)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"].startswith("Bearer")
    for path in (*NAMING, "/v1/embeddings"):
        assert (await client.post(path, headers=header, json={})).status_code == 401


async def test_probes_take_no_key(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/version"):
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("key", ["whole-key", "hashed-key", "the-admin"])
async def test_a_key_without_a_list_uses_every_adapter(client: httpx.AsyncClient, key: str) -> None:
    for model in ("base", "alpha", "beta"):
        assert (await ask(client, key, model)).status_code == 200


async def test_each_key_has_a_line_of_its_own_for_grammars(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = []
    take = byte_engine._parts.grammars.take

    async def seen(params: SamplingParams | None, owner: str = "") -> CompiledGrammar | None:
        owners.append(owner)
        return await take(params, owner)

    monkeypatch.setattr(byte_engine._parts.grammars, "take", seen)
    for key, model in (("whole-key", "base"), ("whole-key", "beta"), ("hashed-key", "base"), ("the-admin", "base")):
        assert (await ask(client, key, model)).status_code == 200
    assert owners[0] == owners[1]
    assert len(set(owners)) == 3
    assert not any("key" in owner for owner in owners), "nothing of it is kept"


@pytest.mark.parametrize("path", NAMING)
async def test_on_every_route_a_forbidden_adapter_looks_like_an_unknown_one(
    client: httpx.AsyncClient, path: str
) -> None:
    async def ask(model: str) -> httpx.Response:
        return await client.post(path, json=NAMING[path] | {"model": model}, headers=bearing("alpha-key"))

    assert (await ask("alpha")).status_code == 200
    assert (await ask("base")).status_code == 200
    forbidden, unknown = await ask("gamma"), await ask("gomma")
    assert forbidden.status_code == unknown.status_code == 404
    assert forbidden.text.replace("gamma", "gomma") == unknown.text
    assert set(forbidden.headers) == set(unknown.headers)


@pytest.mark.parametrize("lora", [{"gamma": 1}, {"alpha": 1, "gamma": 0.5}, {"gamma": 1, "alpha": 0.5}])
async def test_a_mix_with_a_forbidden_adapter_looks_like_one_with_an_unknown_adapter(
    client: httpx.AsyncClient, lora: dict[str, float]
) -> None:
    body = {"model": "base", "prompt": "hello", "max_tokens": 1}
    unknown = {name.replace("gamma", "gomma"): weight for name, weight in lora.items()}
    said = [
        await client.post("/v1/completions", json=body | {"lora": names}, headers=bearing("alpha-key"))
        for names in (lora, unknown)
    ]
    assert [answer.status_code for answer in said] == [404, 404]
    assert said[0].json()["error"]["param"] == "lora"
    assert said[0].text.replace("gamma", "gomma") == said[1].text
    allowed = await client.post("/v1/completions", json=body | {"lora": lora}, headers=bearing("whole-key"))
    assert allowed.status_code == 200


async def alias(client: httpx.AsyncClient, alias: str, name: str) -> None:
    path = f"/v1/lora_adapters/{name}/alias"
    assert (await client.post(path, json={"alias": alias}, headers=bearing("the-admin"))).status_code == 200


async def names(client: httpx.AsyncClient, path: str) -> list[str]:
    """What is shown there to the key that may use `alpha` and whatever is called `later`."""
    answer = await client.get(path, headers=bearing("alpha-key"))
    return [card["id"] for card in answer.json()["data"] if card["id"] != "base"]


async def test_an_adapter_may_be_used_by_its_aliases_and_a_forbidden_one_by_none(client: httpx.AsyncClient) -> None:
    await alias(client, "mine", "alpha")
    await alias(client, "theirs", "gamma")
    assert (await ask(client, "alpha-key", "mine")).status_code == 200
    forbidden, unknown = await ask(client, "alpha-key", "theirs"), await ask(client, "alpha-key", "thoirs")
    assert forbidden.text.replace("theirs", "thoirs") == unknown.text
    assert await names(client, "/v1/models") == ["alpha", "mine"]
    assert await names(client, "/v1/lora_adapters") == ["alpha"]
    assert (await client.get("/v1/models/mine", headers=bearing("alpha-key"))).json()["id"] == "mine"
    assert (await client.get("/v1/models/theirs", headers=bearing("alpha-key"))).status_code == 404
    await alias(client, "mine", "gamma")  # the key's adapter it was, no more
    assert (await ask(client, "alpha-key", "mine")).status_code == 404


async def test_an_alias_in_the_list_allows_what_it_stands_for_by_that_name_only(client: httpx.AsyncClient) -> None:
    await alias(client, "later", "gamma")
    answer = await ask(client, "alpha-key", "later")
    assert answer.headers["x-aiolora-adapter"].startswith("gamma@")
    assert (await ask(client, "alpha-key", "gamma")).status_code == 404
    assert await names(client, "/v1/models") == ["alpha", "later"]


async def test_an_alias_that_moves_while_its_adapter_is_read_answers_with_nothing_forbidden(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alias(client, "mine", "alpha")
    settle = byte_engine.settle

    async def moved(*args: Any, **kwargs: Any) -> Settled:
        await byte_engine.alias_lora("mine", "gamma")
        return await settle(*args, **kwargs)

    monkeypatch.setattr(byte_engine, "settle", moved)
    answer = await ask(client, "alpha-key", "mine")
    assert answer.headers["x-aiolora-adapter"].startswith("alpha@")


async def test_an_adapter_removed_under_a_request_is_told_in_words_for_its_key(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = byte_engine.settle

    async def removed(*args: Any, **kwargs: Any) -> Settled:
        await byte_engine.remove_lora("alpha")
        return await settle(*args, **kwargs)

    monkeypatch.setattr(byte_engine, "settle", removed)
    answer = await ask(client, "alpha-key", "alpha")
    assert answer.status_code == 404
    assert "'alpha' does not exist; GET /v1/models lists what is served" in answer.json()["error"]["message"]


async def test_one_removed_after_it_was_settled_still_answers(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = byte_engine.prepare

    async def removed(*args: Any, **kwargs: Any) -> Request:
        await byte_engine.remove_lora("alpha")
        return await prepare(*args, **kwargs)

    monkeypatch.setattr(byte_engine, "prepare", removed)
    answer = await ask(client, "alpha-key", "alpha")
    assert answer.headers["x-aiolora-adapter"].startswith("alpha@")
    assert (await ask(client, "alpha-key", "alpha")).status_code == 404


async def test_an_adapter_removed_before_its_template_is_looked_at_is_told_in_words_for_its_key(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alias(client, "later", "gamma")
    resolve = byte_engine.resolve_lora

    async def removed(name: str) -> bool:
        if name == "later":
            await byte_engine.remove_lora("alpha")
        return await resolve(name)

    monkeypatch.setattr(byte_engine, "resolve_lora", removed)
    body = NAMING["/v1/chat/completions"] | {"model": "base", "lora": {"alpha": 1, "later": 1}}
    answer = await client.post("/v1/chat/completions", json=body, headers=bearing("alpha-key"))
    assert answer.status_code == 404
    assert "'alpha' does not exist; GET /v1/models lists what is served" in answer.json()["error"]["message"]


async def test_did_you_mean_names_only_what_the_key_may_use(client: httpx.AsyncClient) -> None:
    assert "did you mean 'beta'" in (await ask(client, "whole-key", "betaa")).text
    assert "did you mean" not in (await ask(client, "alpha-key", "gammaa")).text
    assert "'beta'" not in (await ask(client, "alpha-key", "betaa")).text


async def test_lists_show_only_what_the_key_may_use(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/v1/lora_adapters"):
        shown = (await client.get(path, headers=bearing("alpha-key"))).json()["data"]
        assert {card["id"] for card in shown} - {"base"} == {"alpha"}
    for name in ("gamma", "gomma"):
        assert (await client.get(f"/v1/models/{name}", headers=bearing("alpha-key"))).status_code == 404
    assert (await client.get("/metrics", headers=bearing("alpha-key"))).status_code == 403
    assert (await client.get("/metrics", headers=bearing("whole-key"))).status_code == 200


async def test_only_the_admin_key_changes_adapters(
    client: httpx.AsyncClient, three_adapters: list[LoRARequest]
) -> None:
    calls = [
        ("/v1/load_lora_adapter", {"lora_name": "later", "lora_path": three_adapters[0].lora_path}),
        ("/v1/lora_adapters/later/pin", {}),
        ("/v1/lora_adapters/later/unpin", {}),
        ("/v1/lora_adapters/later/alias", {"alias": "prod"}),
        ("/v1/lora_adapters/later/policy", {"weight": 2}),
        (
            "/v1/load_lora_adapter",
            {"lora_name": "later", "lora_path": three_adapters[1].lora_path, "load_inplace": True},
        ),
        ("/v1/lora_adapters/later/rollback", {}),
        ("/v1/unload_lora_adapter", {"lora_name": "prod"}),
        ("/v1/unload_lora_adapter", {"lora_name": "later"}),
    ]
    for path, body in calls:
        for key in ("whole-key", "alpha-key"):
            response = await client.post(path, json=body, headers=bearing(key))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "not_allowed")
        assert (await client.post(path, json=body, headers=bearing("the-admin"))).status_code == 200


async def test_with_an_admin_key_alone_everybody_may_ask_and_nobody_else_may_change(
    byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = create_app(byte_engine, served_model_name="base", args=ServerArgs(admin_key=("the-admin",)))
    async with inside(app) as client:
        assert (await ask(client, "none", "base")).status_code == 200
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})).status_code == 403
        unknown = await client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}, headers=bearing("the-admin"))
        assert unknown.status_code == 404


@pytest.mark.parametrize("path", NAMING)
async def test_a_resolver_is_not_asked_for_what_the_key_may_not_use(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    asked = []

    async def resolve(name: str) -> bool:
        asked.append(name)
        return False

    monkeypatch.setattr(byte_engine, "resolve_lora", resolve)
    for model, known in (("never", []), ("later", ["later"])):
        response = await client.post(path, json=NAMING[path] | {"model": model}, headers=bearing("alpha-key"))
        assert response.status_code == 404
        assert asked == known


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        ({"api_key": ("a", "a")}, r"api_key\[1\]: the same key"),
        ({"api_key": ("a",), "admin_key": ("a",)}, r"admin_key\[0\]: the same key"),
        ({"api_key": ("sha256:12",)}, r"api_key\[0\]: `sha256:` is followed by the 64 hex digits"),
        ({"api_key": ('{"kee": "secret"}',)}, r"api_key\[0\]"),
        ({"api_key": ("",)}, r"api_key\[0\]: a key is"),
        ({"admin_key": ('{"key": "a", "adapters": []}',)}, "leave `adapters` out"),
    ],
)
def test_a_wrong_key_is_named_by_its_place_and_not_told(args: dict[str, tuple[str, ...]], culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit) as caught:
        create_app(AsyncLLMEngine.__new__(AsyncLLMEngine), served_model_name="base", args=ServerArgs(**args))
    assert "secret" not in str(caught.value)


async def test_pages_of_allowed_origins_may_call_and_their_preflight_needs_no_key(byte_engine: AsyncLLMEngine) -> None:
    args = ServerArgs(api_key=("k",), cors_origin=("https://page.example",))
    async with inside(create_app(byte_engine, served_model_name="base", args=args)) as client:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await client.options("/v1/completions", headers={"origin": "https://page.example", **asks})
        assert preflight.status_code < 300
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        refused = await client.get("/v1/models", headers={"origin": "https://page.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")
        other = await client.get("/v1/models", headers={"origin": "https://other.example", **bearing("k")})
        assert other.status_code == 200
        assert "access-control-allow-origin" not in other.headers
