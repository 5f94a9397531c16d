"""Who may begin next: owners take turns, and nobody waits for another's backlog."""

import asyncio
from concurrent.futures import Future
from typing import Any

import pytest

from aiolora.engine.lines import Lines


class Work:
    """Runs until it is told that it has ended."""

    def __init__(self, what: str, begun: list[str]) -> None:
        self.done: Future[None] = Future()
        begun.append(what)


class Walk:
    """Work that was asked for, by name, and in which order it began."""

    def __init__(self, at_once: int, *, patience_s: float = 60.0) -> None:
        self.lines: Lines[str] = Lines(at_once, most=100, patience_s=patience_s)
        self.begun: list[str] = []
        self.asked: dict[str, asyncio.Task[Work]] = {}

    async def ask(self, owner: str, *whats: str) -> None:
        for what in whats:
            begin: Any = self.lines.begin(owner, what, lambda what=what: Work(what, self.begun))
            self.asked[what] = asyncio.ensure_future(begin)
        await settled()

    async def end(self, what: str) -> None:
        self.asked[what].result().done.set_result(None)
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_owners_take_turns_each_with_one_at_a_time() -> None:
    walk = Walk(2)
    await walk.ask("hog", "h0", "h1", "h2", "h3")
    assert walk.begun == ["h0"], "one of the two places is left for others"
    await walk.ask("a", "a0", "a1")
    await walk.ask("b", "b0")
    assert walk.begun == ["h0", "a0"]
    for what, begins in (("h0", "b0"), ("a0", "h1"), ("h1", "a1"), ("b0", "h2")):
        await walk.end(what)
        assert walk.begun[-1] == begins
    for what in ("a1", "h2", "h3"):
        await walk.end(what)
    assert walk.lines._lines == {}, "nothing is kept of who has nothing left"


async def test_work_beyond_its_time_gives_its_place_to_others_but_its_owner_waits_for_it() -> None:
    walk = Walk(1, patience_s=0.01)
    await walk.ask("hog", "h0", "h1")
    await walk.ask("a", "a0")
    await asyncio.wait_for(asyncio.shield(walk.asked["a0"]), 60)
    assert walk.begun == ["h0", "a0"]
    await walk.end("a0")
    assert walk.begun == ["h0", "a0"]
    await walk.end("h0")
    assert walk.begun == ["h0", "a0", "h1"]
    await walk.end("h1")
    await walk.ask("a", "a1")
    await walk.ask("b", "b0")
    assert walk.begun[3:] == ["a1"], "there is still one place, not two"
    await walk.end("a1")
    await walk.end("b0")


@pytest.mark.parametrize("leaves", ["h1", "a0"])
async def test_who_leaves_the_line_costs_nobody_a_turn(leaves: str) -> None:
    walk = Walk(1)
    await walk.ask("hog", "h0", "h1", "h2")
    await walk.ask("a", "a0", "a1")
    walk.asked[leaves].cancel()
    await settled()
    for _ in range(3):
        await walk.end(walk.begun[-1])
    assert sorted(walk.begun) == sorted({"h0", "h1", "h2", "a0", "a1"} - {leaves})
    await walk.end(walk.begun[-1])
    assert walk.lines._lines == {}


async def test_what_cannot_begin_takes_no_place() -> None:
    walk = Walk(1)

    def fails() -> Work:
        raise OSError("no more threads")

    for _ in range(2):
        with pytest.raises(OSError, match="threads"):
            await walk.lines.begin("a", "x", fails)
    await walk.ask("a", "a0")
    assert walk.begun == ["a0"]
    await walk.end("a0")


async def test_a_line_is_overfull_by_what_waits_in_it_equal_wishes_once() -> None:
    walk = Walk(1)
    sizes = {"h0": 90, "h1": 60, "h2": 50, "h3": 40, "x": 900}
    assert walk.lines.overfull("hog", "x", sizes.__getitem__) is None, "it waits for nobody"
    await walk.ask("hog", "h0", "h1", "h1")
    assert walk.lines.overfull("hog", "h1", sizes.__getitem__) is None
    assert walk.lines.overfull("hog", "h3", sizes.__getitem__) is None
    assert walk.lines.overfull("hog", "h2", sizes.__getitem__) == 110
    assert walk.lines.overfull("a", "h2", sizes.__getitem__) is None
