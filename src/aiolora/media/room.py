"""Room: how many bytes of files are held for all requests together, and who may take of it next."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from aiolora.errors import MediaBusyError


class _Turn(NamedTuple):
    nbytes: int
    comes: "asyncio.Future[None]"


class Part:
    """What one request has of a room, until it is given back."""

    def __init__(self, room: "Room", owner: str, nbytes: int) -> None:
        self._room = room
        self._owner = owner
        self._nbytes = nbytes

    @contextmanager
    def held(self) -> Iterator["Part"]:
        """Given back at the end."""
        try:
            yield self
        finally:
            self.keep(0)

    def keep(self, nbytes: int) -> None:
        """So much of it; the rest is given back now."""
        if nbytes < self._nbytes:
            self._room._take_back(self._owner, self._nbytes - nbytes)
            self._nbytes = nbytes


class Room:
    """`nbytes` in all, of which an owner has half at most: what one fetches from slow hosts leaves room to the others.

    Who finds none waits, those of an owner in their order, and owners take turns. Owned by a loop.
    """

    def __init__(self, nbytes: int, *, most_waiting: int) -> None:
        """`most_waiting`: requests of one owner."""
        self._free = nbytes
        self._share = nbytes // 2
        self._most_waiting = most_waiting
        self._held: Counter[str] = Counter()  # bytes an owner
        self._lines: dict[str, deque[_Turn]] = {}  # by owner, the one whose turn comes first at the front

    async def take(self, owner: str, nbytes: int, *, param: str) -> Part:
        """`nbytes`, at most half of it all, when it is its turn. Raises `MediaBusyError` about `param`."""
        assert nbytes <= self._share, "no turn would ever come"
        waiting = len(self._lines.get(owner, ()))
        if waiting >= self._most_waiting:
            raise MediaBusyError(
                f"{waiting} requests wait already for the files behind their URLs; the limit is {self._most_waiting}: "
                "ask again when some have been answered, or send files as data URLs",
                param=param,
            )
        turn = _Turn(nbytes, asyncio.get_running_loop().create_future())
        self._lines.setdefault(owner, deque()).append(turn)
        self._serve()
        try:
            await turn.comes
        except asyncio.CancelledError:
            if turn.comes.cancelled():
                self._leave(owner, turn)
            else:  # it had just come
                self._take_back(owner, nbytes)
            raise
        return Part(self, owner, nbytes)

    def _leave(self, owner: str, turn: _Turn) -> None:
        line = self._lines.get(owner, deque())
        if turn in line:
            line.remove(turn)
            if not line:
                del self._lines[owner]
            self._serve()

    def _take_back(self, owner: str, nbytes: int) -> None:
        self._free += nbytes
        self._held[owner] -= nbytes
        if not self._held[owner]:
            del self._held[owner]
        self._serve()

    def _serve(self) -> None:
        """Who is first and fits gets theirs; a large one is not overtaken by the small ones of others."""
        while (owner := self._next()) is not None:
            line = self._lines.pop(owner)
            turn = line.popleft()
            if line:
                self._lines[owner] = line  # behind the others
            if not turn.comes.done():  # else it is about to leave
                self._free -= turn.nbytes
                self._held[owner] += turn.nbytes
                turn.comes.set_result(None)

    def _next(self) -> str | None:
        for owner, line in self._lines.items():
            if self._held[owner] + line[0].nbytes <= self._share:
                return owner if line[0].nbytes <= self._free else None
        return None
