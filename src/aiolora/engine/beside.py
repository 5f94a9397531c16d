"""What a loop does itself, and what a worker thread does beside it, so that nobody's tokens wait for one request."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, TypeVarTuple

import anyio
from anyio.lowlevel import RunVar
from msgspec import Struct, structs

from aiolora.engine.workers import in_worker

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LONG = 4096  # characters that are tokenised while a thread is handed something and hands it back (100 us)
_PLAIN = frozenset({int, float, bool, type(None)})
_ITEM = 8  # of them as long as any other value takes: a token id, a message, a key of a schema
_AT_ONCE = min(32, max(2, os.cpu_count() or 1))  # more would only take the interpreter from each other and the loop
_turns: RunVar[anyio.CapacityLimiter] = RunVar("aiolora.engine.beside")  # a loop's


async def beside(long: bool, work: Callable[[*Ts], T], *args: *Ts) -> T:
    """`work(*args)`, in a worker thread where it takes `long`, when a core is free for it; it waits for nothing else.

    Files, adapters and whatever else is done in threads waits for none of these.
    """
    if not long:
        return work(*args)
    turns = _turns.get(None)
    if turns is None:
        turns = anyio.CapacityLimiter(_AT_ONCE)
        _turns.set(turns)
    return await in_worker(work, *args, limiter=turns)


def takes_long(value: object) -> bool:
    """Whether to word, tokenise and check `value` takes longer than to hand it to a thread, whatever it consists of.

    Looks at no more of it than takes that long.
    """
    left, unseen = _LONG, [value]
    while unseen and left >= 0:
        one = unseen.pop()
        if isinstance(one, (str, bytes)):
            left -= len(one)
        elif isinstance(one, Struct):
            unseen += structs.astuple(one)
        elif isinstance(one, (Mapping, Sequence)):
            left -= _ITEM * len(one)
            if left >= 0:
                within = [*one.keys(), *one.values()] if isinstance(one, Mapping) else one
                unseen += [each for each in within if type(each) not in _PLAIN]
    return left < 0
