"""What a loop does itself, and what a worker thread does beside it, so that nobody's tokens wait for one request."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, TypeVarTuple

from msgspec import Struct, structs

from aiolora.engine.workers import in_worker

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_LONG = 4096  # characters that are tokenised while a thread is handed something and hands it back (100 us)
_PLAIN = frozenset({int, float, bool, type(None)})
_ITEM = 8  # of them as long as any other value takes: a token id, a message, a key of a schema


async def beside(long: bool, work: Callable[[*Ts], T], *args: *Ts) -> T:
    """`work(*args)`, in a worker thread where it takes `long`."""
    return await in_worker(work, *args) if long else work(*args)


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
