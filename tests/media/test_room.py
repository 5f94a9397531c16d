import asyncio

import pytest

from aiolora.errors import MediaBusyError
from aiolora.media.room import Part, Room


def asked(room: Room, owner: str, nbytes: int) -> "asyncio.Task[Part]":
    return asyncio.ensure_future(room.take(owner, nbytes, param="p"))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_owner_has_half_at_most_and_waits_in_order() -> None:
    room = Room(8, most_waiting=9)
    tasks = [asked(room, "a", 2) for _ in range(4)]
    await settled()
    assert [task.done() for task in tasks] == [True, True, False, False]
    assert await room.take("b", 4, param="p")
    (await tasks[1]).keep(0)
    await settled()
    assert [task.done() for task in tasks] == [True, True, True, False]


async def test_owners_take_turns_and_a_large_one_is_not_overtaken() -> None:
    room = Room(8, most_waiting=9)
    held = [await room.take(owner, 4, param="p") for owner in ("x", "y")]
    lined = [asked(room, "a", 2), asked(room, "a", 2), asked(room, "b", 4), asked(room, "c", 1)]
    await settled()
    held[0].keep(2)
    await settled()
    assert [task.done() for task in lined] == [True, False, False, False]
    held[0].keep(0)
    await settled()
    assert [task.done() for task in lined] == [True, False, False, False], "the one of b is next, and does not fit"
    held[1].keep(0)
    await settled()
    assert [task.done() for task in lined] == [True, False, True, True]
    (await lined[2]).keep(0)
    await settled()
    assert all(task.done() for task in lined)


async def test_who_leaves_the_line_gives_way_and_holds_nothing() -> None:
    room = Room(8, most_waiting=9)
    held = await room.take("a", 4, param="p")
    waiting, behind = asked(room, "a", 4), asked(room, "a", 1)
    await settled()
    waiting.cancel()
    held.keep(3)
    await settled()
    assert behind.done()
    (await behind).keep(0)
    come = asked(room, "a", 1)
    await settled()
    late = asked(room, "a", 4)
    await settled()
    (await come).keep(0)
    held.keep(0)  # its turn comes, and in the same moment it is cancelled
    late.cancel()
    await settled()
    assert late.cancelled()
    assert [await room.take(owner, 4, param="p") for owner in ("a", "b")], "all of it is free again"


async def test_more_of_an_owner_than_may_wait_are_refused_and_nobody_elses() -> None:
    room = Room(8, most_waiting=2)
    tasks = [asked(room, "a", 4) for _ in range(3)]
    await settled()
    with pytest.raises(MediaBusyError, match=r"2 requests wait already .* limit is 2: .* data URLs") as caught:
        await room.take("a", 4, param="p")
    assert caught.value.param == "p"
    assert await room.take("b", 4, param="p")
    for task in tasks:
        task.cancel()
    await settled()
