"""The two ways between the loop and the engine thread."""

import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aiolora.engine.bridge import Bridge


class Idle:
    """An engine that never has work. Notes what it is told."""

    has_work = stalled = False

    def __init__(self) -> None:
        self.told: list[object] = []

    def snapshot(self) -> Any:
        return None


class Bridged:
    """A bridge to an idle engine, and what to post to it."""

    def __init__(self) -> None:
        self.bridge, self.engine = Bridge(lambda *_: None, lambda _: None), Idle()

    def tell(self, what: object) -> None:
        self.bridge.post(lambda _: self.engine.told.append(what))

    async def told(self) -> list[object]:
        """All of it, when what was posted before is done."""
        return await self.bridge.ask(lambda _: list(self.engine.told))


@pytest.fixture
async def bridged() -> AsyncIterator[Bridged]:
    bridged = Bridged()
    yield bridged
    await bridged.bridge.stop()


async def test_messages_are_done_in_the_order_posted_and_each_wakes_an_idle_engine(bridged: Bridged) -> None:
    bridged.tell(0)
    bridged.bridge.start(bridged.engine)  # type: ignore[arg-type]
    for number in range(1, 100):
        bridged.tell(number)
        if number % 10 == 0:
            assert await bridged.told() == list(range(number + 1))


async def test_a_finaliser_may_post_at_any_moment_of_another_post(bridged: Bridged) -> None:
    """As Python's collector would run one; the profiler's calls come as deep inside."""
    bridged.bridge.start(bridged.engine)  # type: ignore[arg-type]

    def post() -> None:
        sys.setprofile(lambda *_: bridged.tell("in between"))
        bridged.tell("posted")
        sys.setprofile(None)

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "it waits for itself"
    told = await bridged.told()
    assert told.count("posted") == 1
    assert told.count("in between") > 1
