"""uvicorn inside our own loop: bounded headers, signals that drain and then return, one line when it listens."""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from litestar import Litestar


def config(app: Litestar, host: str, port: int, shutdown_timeout_s: int) -> uvicorn.Config:
    """What the server needs to know."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",  # httptools takes a header of 50 MB
        h11_max_incomplete_event_size=16 << 10,
        ws="none",
        timeout_graceful_shutdown=shutdown_timeout_s,
        log_level="warning",
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
    """uvicorn raises a signal again once it has drained, which would end the process before the engine is stopped."""

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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if not self.should_exit:
            print(f"ready at http://{self.config.host}:{self.config.port}", file=sys.stderr, flush=True)
