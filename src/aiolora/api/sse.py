"""Server-sent events: frames of bytes, and a response that writes them while its client is there."""

import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import msgspec
from litestar import Request, Response
from litestar.response.base import ASGIResponse
from litestar.response.streaming import ASGIStreamingResponse
from litestar.types import Receive, Send
from msgspec import Struct

from aiolora.api.leaving import ClientLeftError, finished_before_leaving
from aiolora.api.visits import visit_of

Write: TypeAlias = Callable[[bytes], Awaitable[None]]  # sends what is ready
Work: TypeAlias = Callable[[Write], Coroutine[Any, Any, None]]  # writes all of a stream

DONE = b"data: [DONE]\n\n"  # behind the last frame of completions and chat
HOLE = "\0"  # the text of a mould's chunk
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_encode = msgspec.json.Encoder().encode
_HOLE = _encode(HOLE)


def frames(events: Iterable[Struct]) -> bytes:
    """One `data:` frame an event, joined for one write."""
    return b"".join([b"data: " + _encode(event) + b"\n\n" for event in events])


class Named(Protocol):
    """An event that has a name."""

    @property
    def type(self) -> str: ...


def named_frames(events: Iterable[Named]) -> bytes:
    """An `event:` line and a `data:` line an event, joined for one write."""
    return b"".join([b"event: %b\ndata: %b\n\n" % (event.type.encode(), _encode(event)) for event in events])


class Mould:
    """Frames of chunks with one choice that differ in its index and text alone: all around it is encoded once."""

    __slots__ = ("_between", "_head", "_tail")

    def __init__(self, chunk: Struct) -> None:
        """`chunk` has choice 0 with `HOLE` for its text, and nothing that a client said behind that."""
        head, hole, self._tail = frames([chunk]).rpartition(_HOLE)
        head, at, self._between = head.rpartition(b'"index":0')
        assert hole, "the chunk has a hole"
        assert at, "its choice is the first"
        self._head = head + at[:-1]

    def frame(self, index: int, text: str) -> bytes:
        """`frames` of the chunk with this index and text."""
        return b"%b%d%b%b%b" % (self._head, index, self._between, _encode(text), self._tail)


class EventStream(Response[Any]):
    """A stream of frames. `Response` of anything: OpenAI's routes answer with one shape or a stream of its chunks."""

    def __init__(self, work: Work, headers: Mapping[str, str]) -> None:
        """`work` writes all frames; it is cancelled when the client leaves."""
        super().__init__(None, headers={**_HEADERS, **headers})
        self._work = work

    def to_asgi_response(self, app: object, request: Request[Any, Any, Any], **_: Any) -> ASGIResponse:
        """What Litestar sends; the route's own media type and headers have no say."""
        return _ASGIEventStream(self._work, self.headers, visit_of(request.scope).send)


class _ASGIEventStream(ASGIStreamingResponse):
    def __init__(self, work: Work, headers: dict[str, Any], send: Send) -> None:
        super().__init__(iterator=(), headers=headers, media_type="text/event-stream")
        self._work = work
        self._send = send

    async def send_body(self, send: Send, receive: Receive) -> None:
        """Send until the end or until the client leaves; either way the work has ended before this returns.

        Frames go straight to the server: the layers in between look at the head of an answer alone.
        """
        past_layers = self._send

        def write(body: bytes) -> Awaitable[None]:
            return past_layers({"type": "http.response.body", "body": body, "more_body": True})

        with contextlib.suppress(ClientLeftError):
            await finished_before_leaving(receive, self._work(write))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
