"""Masks beside the steps: a grammar that is slow holds up no other."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from aiolora.engine.masks import Masks


def together(landed: Sequence[tuple[Any, int]]) -> None:
    for matcher, token in landed:
        matcher.together.append(token)
        matcher.advance(token)


class Matcher:
    """Takes a token in as soon as `gate` is open."""

    def __init__(self, *, slow: bool = False, suspect: bool = False, gate: threading.Event | None = None) -> None:
        self.ready = True
        self.bits = b""
        self.error: str | None = None
        self.slow, self.suspect = slow, suspect
        self.gate = gate
        self.seen: list[int] = []
        self.together: list[int] = []  # of them, those that came with others'

    def advance(self, token: int) -> None:
        assert self.gate is None or self.gate.wait(60)
        self.seen.append(token)
        self.ready = True


def test_all_are_ready_when_they_have_been_waited_for() -> None:
    masks, matchers = Masks(together), [Matcher() for _ in range(3)]
    for token in (7, 8):
        masks.advance([(matcher, token) for matcher in matchers])
        masks.wait(60)
        assert all(matcher.ready for matcher in matchers)
    assert [matcher.seen for matcher in matchers] == [[7, 8]] * 3


def test_one_that_is_under_way_is_not_ready_and_the_wait_for_it_ends() -> None:
    masks, gate = Masks(together), threading.Event()
    matcher = Matcher(gate=gate)
    masks.advance([(matcher, 1)])
    assert not matcher.ready
    masks.wait(0.001)
    assert not matcher.ready
    gate.set()
    masks.wait(60)
    assert matcher.ready


def test_a_suspect_waits_for_none_that_is_slow() -> None:
    masks, gate = Masks(together), threading.Event()
    slow, suspect = Matcher(gate=gate, slow=True), Matcher(suspect=True)
    masks.advance([(slow, 1), (suspect, 1)])
    masks.wait(None)
    assert (slow.ready, suspect.ready) == (False, True)
    assert suspect.together == []
    gate.set()
    masks.wait(None)


@pytest.mark.parametrize("why", ["slow", "suspect"])
def test_the_quick_are_waited_for_and_no_other(why: str) -> None:
    masks, gate = Masks(together), threading.Event()
    other, quick = Matcher(gate=gate, **{why: True}), Matcher()  # type: ignore[arg-type]
    masks.advance([(other, 1), (quick, 1)])
    masks.wait(60)  # it would be for the other, and a minute
    assert (other.ready, quick.ready) == (False, True)
    gate.set()
    masks.wait(None)


def test_what_ended_before_it_was_waited_for_is_not_missed_for_one_that_has_not() -> None:
    masks, gate = Masks(together), threading.Event()
    slow, quick = Matcher(gate=gate, slow=True), Matcher()
    masks.advance([(slow, 1), (quick, 1)])
    masks.wait(60)
    assert (slow.ready, quick.ready) == (False, True)
    masks.wait(None)  # of the slow one alone it would be until the gate opens
    assert not slow.ready
    gate.set()
    masks.wait(None)
    masks.wait(None)
    assert slow.ready


@pytest.mark.parametrize("why", ["slow", "suspect"])
def test_one_that_was_slow_or_may_have_been_holds_up_nobody_else(why: str) -> None:
    masks, gate = Masks(together), threading.Event()
    slow, quick = Matcher(gate=gate, **{why: True}), Matcher()  # type: ignore[arg-type]
    for token in range(5):
        masks.advance([(slow, token), (quick, token)] if token == 0 else [(quick, token)])
        masks.wait(None)
        assert quick.ready
        assert not slow.ready
    gate.set()
    masks.wait(None)
    assert slow.seen == [0]
    assert slow.together == []
    assert quick.together == quick.seen == list(range(5))
