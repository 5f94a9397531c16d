"""Lines: who may begin next, where work is slow and cannot be interrupted."""

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar


class Begun(Protocol):
    """Work that is being done, or was."""

    @property
    def done(self) -> Future[Any]: ...


Work = TypeVar("Work", bound=Begun)
What = TypeVar("What", bound=Hashable)


@dataclass(slots=True)
class _Line(Generic[What]):
    """Those who wait for one owner's turn."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # held until the owner's work has ended
    waiting: Counter[What] = field(default_factory=Counter)  # for what, and how many


class Lines(Generic[What]):
    """A line an owner. The first of each come into one line of all, of which `at_once` work at a time.

    So whatever an owner asks for, others wait for one piece of that at most, and whoever leaves the line costs nobody
    anything. Work that takes longer than `patience_s` goes on, no longer as one of the `at_once`; its owner begins
    nothing else until it has ended. Owned by a loop.
    """

    def __init__(self, at_once: int, *, most: int, patience_s: float) -> None:
        """`most`: how much may wait in an owner's line, in the unit of what is asked for."""
        self._slots = asyncio.Semaphore(at_once)
        self._most = most
        self._patience_s = patience_s
        self._lines: dict[str, _Line[What]] = {}

    def overfull(self, owner: str, what: What, size: Callable[[What], int]) -> int | None:
        """How much would wait in the line of `owner` with `what`, where that is too much. The same counts once."""
        waiting = self._lines[owner].waiting if owner in self._lines else ()
        much = sum(map(size, {*waiting, what}))
        return much if waiting and much > self._most else None

    async def begin(self, owner: str, what: What, start: Callable[[], Work]) -> Work:
        """Call `start`, which begins what it returns, when it is the turn of `owner`."""
        line = self._lines.setdefault(owner, _Line())
        with self._waiting(owner, what), ExitStack() as held:
            await line.turn.acquire()
            held.callback(line.turn.release)
            await self._slots.acquire()
            slot = held.enter_context(ExitStack())
            slot.callback(self._slots.release)
            work = start()
            held = held.pop_all()  # from here on until the work has ended
        late = asyncio.get_running_loop().call_later(self._patience_s, slot.close)

        def ended(_: object) -> None:
            late.cancel()
            held.close()
            self._tidy(owner)

        asyncio.wrap_future(work.done).add_done_callback(ended)
        return work

    @contextmanager
    def _waiting(self, owner: str, what: What) -> Iterator[None]:
        waiting = self._lines[owner].waiting
        waiting[what] += 1
        try:
            yield
        finally:
            waiting[what] -= 1
            if not waiting[what]:
                del waiting[what]
            self._tidy(owner)

    def _tidy(self, owner: str) -> None:
        line = self._lines.get(owner)
        if line is not None and not line.waiting and not line.turn.locked():
            del self._lines[owner]
