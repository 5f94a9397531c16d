"""Worker threads whose errors keep nothing alive."""

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def in_worker(work: Callable[[*Ts], T], *args: *Ts, limiter: anyio.CapacityLimiter | None = None) -> T:
    """`work(*args)`, in a worker thread.

    An error of its comes back as a value: raised through a future, it would lead to frames that lead to that future,
    and all they hold, a request with its images, would stay until Python collects circles.
    """
    return _value(await anyio.to_thread.run_sync(_outcome, work, args, limiter=limiter))


async def to_its_end(work: Callable[[*Ts], T], *args: *Ts) -> T:
    """The same, at once; who is cancelled meanwhile leaves when the work has ended.

    So what it works on is held, and counted, for as long.
    """
    turn = anyio.CapacityLimiter(1)
    doing = asyncio.ensure_future(anyio.to_thread.run_sync(_outcome, work, args, limiter=turn))
    try:
        await asyncio.wait([doing])
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([doing])
        raise
    outcome = [doing.result()]  # in no variable of this frame, which an error that is raised here leads to
    del doing
    return _value(outcome.pop())


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _outcome(work: Callable[[*Ts], T], args: tuple[*Ts]) -> T | _Failure:
    try:
        return work(*args)
    except Exception as error:
        return _Failure(error)


def _value(outcome: T | _Failure) -> T:
    if isinstance(outcome, _Failure):
        try:
            raise outcome.error
        finally:
            del outcome
    return outcome
