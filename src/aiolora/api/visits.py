"""Every HTTP request from the outside: its id, its line in the log, and who is still inside when the server stops."""

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from msgspec import Struct

access_log = logging.getLogger("aiolora.access")

_STATE = "aiolora_visit"
_SANE = re.compile(rb"[\x21-\x7e]{1,128}")
_PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds: no lines for what is well


class Caller(Struct, frozen=True):
    """What somebody may do."""

    name: str | None = None  # for the log
    adapters: frozenset[str] | None = None  # beside the base; None: all
    admin: bool = False
    key: str = ""  # tells callers apart, and nothing of the key; empty: none was needed

    def may_use(self, adapter: str) -> bool:
        """What may not be used does not exist, for this caller."""
        return self.adapters is None or adapter in self.adapters


class Visit:
    """One HTTP request, and what is known of it so far: nothing of what was said."""

    __slots__ = ("caller", "generated_tokens", "id", "model", "prompt_tokens", "send", "status", "traceparent")

    def __init__(self, request_id: str, send: Send, traceparent: str | None = None) -> None:
        self.id = request_id
        self.send = send  # the server's own: past the layers that want to see the head of an answer
        self.traceparent = traceparent
        self.caller: Caller | None = None  # until the guard has looked
        self.model: str | None = None  # that answers
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.status = 0  # none sent: the client left before

    def answered_by(self, model: str, prompt_tokens: int, generated_tokens: int) -> None:
        """A generation has ended, well or not."""
        self.model, self.prompt_tokens, self.generated_tokens = model, prompt_tokens, generated_tokens

    def fields(self) -> dict[str, object]:
        """For the log."""
        known: dict[str, object] = {"request_id": self.id}
        if self.caller is not None and self.caller.name is not None:
            known["key"] = self.caller.name
        if self.model is not None:
            known |= {
                "model": self.model,
                "prompt_tokens": self.prompt_tokens,
                "generated_tokens": self.generated_tokens,
            }
        return known


class Door:
    """The outermost ASGI layer. Everybody who comes in is counted until they have left. Owned by the loop.

    `x-request-id` is taken from the client where it is one word of ASCII, else made, and always sent back.
    """

    def __init__(self, *, log: bool) -> None:
        self._log = log
        self._inside = 0
        self._left = asyncio.Event()
        self.closed = False  # the guard lets nobody in any more

    async def emptied(self) -> None:
        """Wait until nobody is inside."""
        while self._inside:
            self._left.clear()
            await self._left.wait()

    def before(self, app: ASGIApp) -> ASGIApp:
        """`app` with this door in front."""

        async def enter(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP:
                await app(scope, receive, send)
                return
            visit = _arrival(scope, send)
            began = time.perf_counter()
            header = (b"x-request-id", visit.id.encode())

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    visit.status = message["status"]
                    message["headers"] = [*message["headers"], header]
                await send(message)

            self._inside += 1
            try:
                await app(scope, receive, sending)
            finally:
                self._inside -= 1
                self._left.set()
                if self._log:
                    _write(scope, visit, time.perf_counter() - began)

        return enter


def visit_of(scope: Any) -> Visit:
    """The visit of a request that came through the door."""
    visit: Visit = scope["state"][_STATE]
    return visit


def _arrival(scope: Scope, send: Send) -> Visit:
    headers = dict(scope["headers"])
    said = headers.get(b"x-request-id", b"")
    request_id = said.decode() if _SANE.fullmatch(said) else uuid.uuid4().hex
    trace = headers.get(b"traceparent")
    visit = Visit(request_id, send, trace.decode("latin-1") if trace else None)
    scope.setdefault("state", {})[_STATE] = visit
    return visit


def _write(scope: Scope, visit: Visit, seconds: float) -> None:
    path = scope["path"].encode("unicode_escape").decode()  # one line, whatever the client sent
    if visit.status == 200 and path.endswith(_PROBES):
        return
    fields = {
        "method": scope.get("method"),
        "path": path,
        "status": visit.status,
        "duration_ms": round(seconds * 1e3, 1),
        **visit.fields(),
    }
    line = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("method", "path", "status"))
    access_log.info("%s %s %s %s", fields["method"], path, visit.status, line, extra={"fields": fields})
