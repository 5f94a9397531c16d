"""Mailbox: the loop's end of a stream, filled once a step and read by one task."""

import asyncio

from aiolora.errors import EngineDeadError
from aiolora.types import TokenDelta


class Mailbox:
    """Deltas of one request, from the loop's callback to the one task that reads them."""

    __slots__ = ("_failure", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[TokenDelta] = []
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: TokenDelta) -> None:
        self._items.append(delta)
        self._wake()

    def fail(self, error: BaseException) -> None:
        self._failure = error
        self._wake()

    async def get(self) -> list[TokenDelta]:
        """All that has come, at least one."""
        while not self._items:
            if self._failure is not None:
                raise EngineDeadError(f"the engine has stopped: {self._failure}") from self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
