"""Masks beside the steps: a grammar that is slow holds up no other."""

import threading

from aiolora.engine.masks import Masks


class Matcher:
    """Takes a token in as soon as `gate` is open."""

    def __init__(self, *, took_s: float = 0.0, gate: threading.Event | None = None) -> None:
        self.ready = True
        self.bits = b""
        self.error: str | None = None
        self.took_s = took_s
        self.gate = gate
        self.seen: list[int] = []

    def advance(self, token: int) -> None:
        assert self.gate is None or self.gate.wait(60)
        self.seen.append(token)
        self.ready = True


def test_all_are_ready_when_they_have_been_waited_for() -> None:
    masks, matchers = Masks(), [Matcher() for _ in range(3)]
    for token in (7, 8):
        masks.advance([(matcher, token) for matcher in matchers])
        masks.wait(60)
        assert all(matcher.ready for matcher in matchers)
    assert [matcher.seen for matcher in matchers] == [[7, 8]] * 3


def test_one_that_is_under_way_is_not_ready_and_the_wait_for_it_ends() -> None:
    masks, gate = Masks(), threading.Event()
    matcher = Matcher(gate=gate)
    masks.advance([(matcher, 1)])
    assert not matcher.ready
    masks.wait(0.001)
    assert not matcher.ready
    gate.set()
    masks.wait(60)
    assert matcher.ready


def test_one_that_was_slow_holds_up_nobody_else() -> None:
    masks, gate = Masks(), threading.Event()
    slow, quick = Matcher(took_s=0.01, gate=gate), Matcher()
    for token in range(5):
        masks.advance([(slow, token), (quick, token)] if token == 0 else [(quick, token)])
        masks.wait(None)
        assert quick.ready
        assert not slow.ready
    gate.set()
    masks.wait(None)
    assert slow.seen == [0]
    assert quick.seen == list(range(5))
