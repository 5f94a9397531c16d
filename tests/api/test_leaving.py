"""Requests that end early, by an error or because their client leaves: nothing of them stays behind."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import msgspec
import pytest
from litestar import Litestar
from msgspec import structs

from aiolora.api import create_app
from aiolora.engine import grammar
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.intake import Settled
from aiolora.errors import AdapterNotFoundError
from aiolora.types import LoRARequest, TokenDelta
from tests.api.conftest import inside
from tests.engine.waiting import running, until

TEXT = "hello"
LONG = "x" * 10_000  # worded in a worker thread; more than the context holds
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
    "/v1/responses": {"input": TEXT},
}


@pytest.fixture
async def app(byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest]) -> AsyncIterator[Litestar]:
    app = create_app(byte_engine, lora_modules=three_adapters, served_model_name="base")
    async with inside(app):
        yield app


@pytest.fixture
def settled(
    app: Litestar, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[weakref.ref[Settled]]]:
    """What was settled for requests, as long as something needs it; nothing is collected meanwhile."""
    refs, settle = [], byte_engine.settle

    async def noted(*args: Any, **kwargs: Any) -> Settled:
        settled = await settle(*args, **kwargs)
        refs.append(weakref.ref(settled))
        return settled

    monkeypatch.setattr(byte_engine, "settle", noted)
    gc.disable()
    yield refs
    gc.enable()


class Client:
    """One request of a client who may leave."""

    def __init__(self, app: Litestar, path: str, body: object) -> None:
        self._body = msgspec.json.encode(body)
        self._sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = asyncio.Event()
        self.status = 0
        self.heard = b""
        scope: Any = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "state": {},
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(self._body))],
            "client": ("127.0.0.1", 1), "server": ("test", 80),
        }  # fmt: skip
        self.answered = asyncio.ensure_future(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> Any:
        if not self._sent.done():
            self._sent.set_result(None)
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.heard += message.get("body", b"")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", BODIES)
async def test_what_fails_on_the_way_lets_go_of_its_adapter_at_once(
    app: Litestar, byte_engine: AsyncLLMEngine, settled: list[weakref.ref[Settled]], path: str, stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    streams = byte_engine._streaming
    deliver = streams.deliver

    def broken(deltas: Iterable[TokenDelta]) -> None:
        deliver(
            structs.replace(delta, error=AdapterNotFoundError("alpha", "no luck"), finish_reason="error")
            for delta in deltas
        )

    monkeypatch.setattr(streams, "deliver", broken)
    client = Client(app, path, {"model": "alpha", "stream": stream, **BODIES[path]})
    await client.answered
    assert b'"error"' in client.heard
    await let_go(settled)


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_refused_lets_go_of_its_adapter_at_once(
    app: Litestar, settled: list[weakref.ref[Settled]], path: str
) -> None:
    body = msgspec.json.encode({"model": "alpha", **BODIES[path]}).replace(TEXT.encode(), LONG.encode())
    client = Client(app, path, msgspec.Raw(body))
    await client.answered
    assert client.status == 400
    await let_go(settled)


@pytest.mark.parametrize("stream", [True, False])
async def test_who_leaves_lets_go_of_the_adapter_at_once(
    app: Litestar, byte_engine: AsyncLLMEngine, settled: list[weakref.ref[Settled]], stream: bool
) -> None:
    said = {"max_tokens": 200, "ignore_eos": True, "stream": stream, **BODIES["/v1/completions"]}
    client = Client(app, "/v1/completions", {"model": "alpha", **said})
    await running(byte_engine, 1)
    client.leave()
    await client.answered
    await let_go(settled)


@pytest.mark.parametrize("path", BODIES)
async def test_who_leaves_while_an_adapter_is_read_is_gone_at_once_and_it_is_read_for_others(
    app: Litestar, byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest], path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gate, load = threading.Event(), byte_engine._adapters._load

    def gated(source: Any) -> Any:
        gate.wait()
        return load(source)

    monkeypatch.setattr(byte_engine._adapters, "_load", gated)
    await byte_engine.announce_lora(LoRARequest("delta", 9, three_adapters[0].lora_path))
    body = {"model": "delta", **BODIES[path]}
    leaving, staying = Client(app, path, body), Client(app, path, body)
    try:
        await until(lambda: len(byte_engine._adapters._loading) == 1, lambda: "nothing is read")
        leaving.leave()
        await until(leaving.answered.done, lambda: "it waits for the adapter")
        assert leaving.status == 499
        assert not staying.answered.done()
    finally:
        gate.set()
    await staying.answered
    assert staying.status == 200


async def test_who_leaves_while_a_grammar_waits_leaves_the_line(
    app: Litestar, byte_engine: AsyncLLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, compiled, lines = threading.Event(), [], byte_engine._parts.grammars._lines
    work = grammar._compile

    def gated(tokenizer: Any, wish: Any) -> Any:
        gate.wait()
        compiled.append(wish)
        return work(tokenizer, wish)

    monkeypatch.setattr(grammar, "_compile", gated)

    def ask(regex: str) -> Client:
        said = {"model": "base", "structured_outputs": {"regex": regex}, **BODIES["/v1/completions"]}
        return Client(app, "/v1/completions", said)

    def waiting() -> int:
        return sum(line.waiting.total() for line in lines._lines.values())

    def begun() -> int:
        return sum(line.turn.locked() for line in lines._lines.values())

    first = ask("a")
    try:
        await until(lambda: begun() == 1 and waiting() == 0, lambda: lines._lines)
        second, third = ask("b"), ask("c")
        await until(lambda: waiting() == 2, lambda: lines._lines)
        second.leave()
        await until(second.answered.done, lambda: "it waits for its turn")
        assert second.status == 499
        assert waiting() == 1
    finally:
        gate.set()
    await asyncio.gather(first.answered, third.answered)
    assert (first.status, third.status) == (200, 200)
    assert len(compiled) == 2, "nobody's turn was for who had left"


async def let_go(settled: list[weakref.ref[Settled]]) -> None:
    """As soon as the loop and a worker thread have gone on from what they did last."""
    assert settled
    await until(lambda: all(ref() is None for ref in settled), lambda: "it is held for ever")
