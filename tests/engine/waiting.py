"""Until an engine in its own thread is where a test wants it: soon, or within a minute where the machine is busy."""

import asyncio
import time
from collections.abc import Callable

from aiolora import AsyncLLMEngine


async def until(holds: Callable[[], bool], told: Callable[[], object]) -> None:
    """`told`: what to say where it never comes to hold."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, told()
        await asyncio.sleep(0.001)


async def running(engine: AsyncLLMEngine, count: int) -> None:
    await until(lambda: engine.snapshot().running == count, engine.snapshot)


async def idle(engine: AsyncLLMEngine) -> None:
    """Until nothing runs; the messages are in the inbox already, so a few steps suffice."""
    await until(lambda: engine.snapshot().running == engine.snapshot().waiting == 0, engine.snapshot)
