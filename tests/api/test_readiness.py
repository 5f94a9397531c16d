"""/health and /ready, and an app that stops: what is under way ends, what comes is sent elsewhere."""

import asyncio
import threading

import httpx
import pytest

from aiolora.api import create_app, drain
from aiolora.api.readiness import Pulse
from aiolora.config import ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.core import Engine
from tests.api.conftest import NAMING, Standing, inside

BODY = {"model": "base", "prompt": "hello", "max_tokens": 50, "ignore_eos": True}


async def test_an_engine_that_steps_is_ready(byte_engine: AsyncLLMEngine) -> None:
    async with inside(create_app(byte_engine, served_model_name="base")) as client:
        for method in ("GET", "HEAD"):
            response = await client.request(method, "/ready")
            assert (response.status_code, response.content) == (200, b"")


async def test_an_engine_that_is_not_started_or_has_died_is_not_ready() -> None:
    assert "not started" in (Pulse(Standing(started=False), 1).trouble() or "")
    engine = Standing(started=True, death=RuntimeError("a step failed"))
    async with inside(create_app(engine)) as client:
        response = await client.get("/ready")
        assert (response.status_code, response.text) == (503, "the engine has stopped")


async def test_an_engine_stuck_in_a_step_is_alive_and_not_ready_until_it_goes_on(
    byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, step = threading.Event(), Engine.step

    def stuck(self: Engine) -> object:
        go_on.wait()
        return step(self)

    monkeypatch.setattr(Engine, "step", stuck)
    monkeypatch.setattr("aiolora.api.readiness._EVERY_S", 0.01)
    app = create_app(byte_engine, served_model_name="base", args=ServerArgs(ready_timeout=0.2))
    async with inside(app) as client:
        try:
            answer = asyncio.ensure_future(client.post("/v1/completions", json=BODY))
            response = await until(client, 503)
            assert "has not stepped" in response.text
            assert (await client.get("/health")).status_code == 200
        finally:
            go_on.set()
        await until(client, 200)
        assert (await answer).status_code == 200


async def test_an_engine_that_turns_without_stepping_is_not_ready(
    byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiolora.engine.scheduler.Scheduler._admit", lambda *_: None)
    monkeypatch.setattr("aiolora.api.readiness._EVERY_S", 0.01)
    app = create_app(byte_engine, served_model_name="base", args=ServerArgs(ready_timeout=0.2))
    async with inside(app) as client:
        answer = asyncio.ensure_future(client.post("/v1/completions", json=BODY))
        assert "has not stepped" in (await until(client, 503)).text
        answer.cancel()


async def test_an_app_that_drains_ends_what_is_under_way_and_takes_nothing_new(byte_engine: AsyncLLMEngine) -> None:
    app = create_app(byte_engine, served_model_name="base")
    async with inside(app) as client:
        answers = [asyncio.ensure_future(client.post("/v1/completions", json=BODY)) for _ in range(3)]
        while byte_engine.snapshot().running < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        draining = asyncio.ensure_future(drain(app, 60))
        await asyncio.sleep(0)
        for path, body in NAMING.items():
            refused = await client.post(path, json=body | {"model": "base"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) > 0
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert await draining
        for answer in answers:
            assert (await answer).json()["usage"]["completion_tokens"] == 50


async def test_a_drain_ends_at_its_deadline(byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiolora.engine.scheduler.Scheduler._admit", lambda *_: None)
    app = create_app(byte_engine, served_model_name="base")
    async with inside(app) as client:
        answer = asyncio.ensure_future(client.post("/v1/completions", json=BODY))
        await asyncio.sleep(0.05)
        assert not await drain(app, 0.05)
        answer.cancel()


async def until(client: httpx.AsyncClient, status: int) -> httpx.Response:
    async with asyncio.timeout(30):
        while True:
            response = await client.get("/ready")
            if response.status_code == status:
                return response
            await asyncio.sleep(0.01)
