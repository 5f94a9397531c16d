"""Health, version, documentation; and whose engine it is."""

import httpx
import pytest
from litestar.testing import AsyncTestClient

import aiolora
from aiolora.api import create_app
from aiolora.errors import ConfigError
from aiolora.types import LoRARequest
from tests.api.conftest import Standing


async def test_a_living_engine_is_healthy(http: httpx.AsyncClient) -> None:
    for method in ("GET", "HEAD"):
        response = await http.request(method, "/health")
        assert (response.status_code, response.content) == (200, b"")


async def test_a_dead_engine_is_503_for_probes_and_requests() -> None:
    engine = Standing(started=True, death=RuntimeError("a step failed in /secret/place"))
    async with AsyncTestClient(create_app(engine)) as client:
        for method in ("GET", "HEAD"):
            assert (await client.request(method, "/health")).status_code == 503
        response = await client.post("/v1/completions", json={"model": "none", "prompt": "x"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "secret" not in response.text


async def test_an_engine_is_started_and_stopped_with_the_app() -> None:
    engine = Standing(started=False)
    async with AsyncTestClient(create_app(engine)):
        assert engine.calls == ["start"]
    assert engine.calls == ["start", "stop"]


async def test_an_engine_that_the_host_started_stays_the_hosts() -> None:
    engine = Standing(started=True)
    async with AsyncTestClient(create_app(engine)):
        pass
    assert "stop" not in engine.calls


def test_an_adapter_cannot_have_the_name_of_the_base() -> None:
    with pytest.raises(ConfigError, match="'shared' is the name of the base model"):
        create_app(Standing(started=False), lora_modules=[LoRARequest("shared", 1, "/x")], served_model_name="shared")


async def test_the_version_is_told(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": aiolora.__version__}


async def test_the_documentation_lists_every_route(http: httpx.AsyncClient) -> None:
    assert (await http.get("/docs")).status_code == 200
    paths = (await http.get("/docs/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/version"} <= set(paths)
