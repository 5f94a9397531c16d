"""Server-sent events: frames of bytes, and a response that closes its generator when the client leaves."""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

import anyio
import msgspec
from litestar import Request, Response
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Send
from msgspec import Struct

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_encode = msgspec.json.Encoder().encode


def frames(events: Iterable[Struct]) -> bytes:
    """One `data:` frame an event, joined for one write."""
    return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events])


class Named(Protocol):
    """An event that has a name."""

    @property
    def type(self) -> str: ...


def named_frames(events: Iterable[Named]) -> bytes:
    """An `event:` line and a `data:` line an event, joined for one write."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (event.type.encode(), _encode(event)) for event in events)


class Framing(NamedTuple):
    """How a route's events become bytes, and what comes behind the last."""

    frames: Callable[[Iterable[Any]], bytes]
    last: bytes


CHUNKS = Framing(frames, b"data: [DONE]\n\n")  # completions and chat
EVENTS = Framing(named_frames, b"")  # responses


class EventStream(Response[Any]):
    """A stream of frames. `Response` of anything: OpenAI's routes answer with one shape or a stream of its chunks."""

    def __init__(self, source: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(None, headers={**_HEADERS, **headers})
        self._source = source

    def to_asgi_response(self, app: object, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """What Litestar sends; the route's own media type and headers have no say."""
        return _ASGIEventStream(self._source, self.headers)


class _ASGIEventStream(ASGIStreamingResponse):
    def __init__(self, source: AsyncGenerator[bytes, None], headers: dict[str, Any]) -> None:
        super().__init__(iterator=source, headers=headers, media_type="text/event-stream")
        self._source = source

    async def send_body(self, send: Send, receive: Receive) -> None:
        """Send until the end or until the client leaves; either way the generator is closed before this returns."""
        async with aclosing(self._source) as source, anyio.create_task_group() as tasks:
            tasks.start_soon(_send_all, source, send, tasks.cancel_scope)
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()


async def _send_all(source: AsyncGenerator[bytes, None], send: Send, scope: anyio.CancelScope) -> None:
    """In a task of its own: a wake-up then runs through these few coroutines, not through all that lead to a route."""
    async for part in source:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    scope.cancel()
