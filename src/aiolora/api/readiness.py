"""Whether tokens move: the engine's thread answers, and it steps while somebody waits."""

import asyncio
import time

from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.errors import AioloraError

_EVERY_S = 1.0


class Pulse:
    """Feels the engine's pulse once a second. Owned by the loop.

    A thread that hangs in a step does not answer; one that turns without stepping, though sequences run or wait, moves
    nothing either. Both make it still.
    """

    def __init__(self, engine: AsyncLLMEngine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._moved_s = time.monotonic()
        self._steps = -1

    def trouble(self) -> str | None:
        """Why no token would come; None: they move, or would if somebody asked."""
        if not self._engine.started:
            return "the engine has not started"
        if self._engine.death is not None:
            return "the engine has stopped"
        still_s = time.monotonic() - self._moved_s
        if still_s > self._timeout_s:
            return f"the engine has not stepped for {still_s:.0f} s, though somebody waits"
        return None

    async def watch(self) -> None:
        """Until cancelled."""
        self._moved_s = time.monotonic()
        while True:
            try:
                now = await self._engine.probe()
            except AioloraError:
                return  # it has stopped for good: `death` says why
            if now.steps != self._steps or not (now.running or now.waiting):
                self._moved_s, self._steps = time.monotonic(), now.steps
            await asyncio.sleep(_EVERY_S)
