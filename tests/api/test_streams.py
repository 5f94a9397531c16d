"""Many clients at once, clients that leave, and streams that fail on the way."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import httpx
import msgspec
import pytest
from openai import APIError, AsyncOpenAI

from aiolora.engine.output import Assembler
from aiolora.errors import EngineDeadError
from aiolora.types import TokenOutput
from tests.api.conftest import BASE, LOADED, Server

MODELS = (BASE, *LOADED)
QUESTIONS = (
    "Tell me about a cat.",
    "Which boats have crew greater than 12?",
    "Clara is 47 years old, works as a dentist and lives in Lisbon.",
    "What is the capital of France?",
)
STREAMS = 64
LONG: dict[str, Any] = {"model": "sql", "max_tokens": 900, "temperature": 0, "ignore_eos": True}


async def answer(client: AsyncOpenAI, model: str, question: str) -> str:
    """The text of one stream, every chunk of which is held against the rules."""
    text, ids, reasons = "", set(), []
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=8, temperature=0, stream=True
    )
    async for chunk in stream:
        [choice] = chunk.choices
        assert chunk.model == model
        ids.add(chunk.id)
        reasons.append(choice.finish_reason)
        text += choice.delta.content or ""
    assert len(ids) == 1
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) == {None}
    return text


async def test_many_streams_over_the_base_and_four_adapters_each_equal_their_solo_run(client: AsyncOpenAI) -> None:
    pairs = [(model, question) for question in QUESTIONS for model in MODELS]
    solo = {pair: await answer(client, *pair) for pair in pairs}
    chosen = [pairs[index % len(pairs)] for index in range(STREAMS)]
    together = await asyncio.gather(*(answer(client, *pair) for pair in chosen))
    assert together == [solo[pair] for pair in chosen]
    assert len(set(solo.values())) > len(QUESTIONS), "adapters make a difference"


@pytest.mark.parametrize("prompt", ["Tell me", ["Tell me", "Tell you", "Tell them"]])
@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_takes_the_request_along(server: Server, prompt: str | list[str], stream: bool) -> None:
    count = 1 if isinstance(prompt, str) else len(prompt)
    await until(lambda: server.engine.snapshot().running == 0)
    free = server.engine.snapshot().free_pages
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        reading = asyncio.ensure_future(read(http, {**LONG, "prompt": prompt, "stream": stream}))
        await until(lambda: server.engine.snapshot().running == count)
        began = server.engine.snapshot().steps
        await until(lambda: server.engine.snapshot().steps >= began + 3)
        assert not reading.done()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    left_at = server.engine.snapshot().steps
    await until(lambda: server.engine.snapshot().running == 0)
    assert server.engine.snapshot().steps - left_at <= 2
    assert server.engine.snapshot().free_pages == free
    assert server.engine.snapshot().waiting == 0


async def read(http: httpx.AsyncClient, said: dict[str, Any]) -> None:
    async with http.stream("POST", "/v1/completions", json=said) as response:
        async for _ in response.aiter_bytes():
            pass


async def until(condition: Any, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("failure", "code"),
    [(RuntimeError("a secret at /srv/secret"), "internal_error"), (EngineDeadError("/srv/secret"), "engine_dead")],
)
async def test_an_error_on_the_way_is_the_last_frame(
    server: Server, http: httpx.AsyncClient, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch,
    failure: Exception, code: str,
) -> None:  # fmt: skip
    real = server.engine.run

    async def fails(assemblers: Sequence[Assembler]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
        async with aclosing(real(assemblers)) as bursts:
            async for burst in bursts:
                yield burst
                raise failure

    monkeypatch.setattr(server.engine, "run", fails)
    said: dict[str, Any] = {"model": BASE, "prompt": "Hi", "max_tokens": 50, "ignore_eos": True}
    response = await http.post("/v1/completions", json={**said, "stream": True})
    *tokens, last = [frame.removeprefix("data: ") for frame in response.text.split("\n\n") if frame]
    assert response.status_code == 200
    assert tokens
    error = msgspec.json.decode(last)["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", code, None)
    assert "secret" not in last
    with pytest.raises(APIError):
        async for _ in await client.completions.create(model=BASE, prompt="Hi", stream=True):
            pass
    whole = await http.post("/v1/completions", json=said)
    assert whole.json()["error"]["code"] == code
    assert whole.status_code == {"internal_error": 500, "engine_dead": 503}[code]
    monkeypatch.undo()
    await until(lambda: server.engine.snapshot().running == 0)
