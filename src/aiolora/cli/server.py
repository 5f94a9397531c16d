"""uvicorn inside our own loop: bounded headers, signals that drain and then return, one line when it listens."""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from litestar import Litestar

from aiolora.api import drain

_AFTERWARDS_S = 1  # for streams that are still open when the deadline of the drain is over


def config(app: Litestar, host: str, port: int) -> uvicorn.Config:
    """What the server needs to know."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",  # httptools takes a header of 50 MB
        h11_max_incomplete_event_size=16 << 10,
        ws="none",
        timeout_graceful_shutdown=_AFTERWARDS_S,
        log_config=None,
        access_log=False,  # the app writes its own
    )


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class Server(uvicorn.Server):
    """Goes on listening while it drains, so that who comes then is told to go elsewhere; then `serve` returns.

    (uvicorn by itself closes its sockets first, and raises the signal again at the end, before the engine is stopped.)
    """

    def __init__(self, config: uvicorn.Config, app: Litestar, drain_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_s = drain_s
        self._draining: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on the first SIGINT or SIGTERM, leave at once on the second; `serve` returns."""
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if not self.should_exit:
            port = self.servers[0].sockets[0].getsockname()[1] if self.servers else self.config.port
            print(f"ready at http://{self.config.host}:{port}", file=sys.stderr, flush=True)

    async def _drain(self) -> None:
        print(f"stopping: requests under way have {self._drain_s:g} s to end", file=sys.stderr, flush=True)
        if not await drain(self._app, self._drain_s):
            print("stopping: some had not ended, and are cut off", file=sys.stderr, flush=True)
        self.should_exit = True
