"""Masks: what tokens grammars allow next, computed beside the steps."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeAlias

from aiolora.types import Matcher

Landed: TypeAlias = Sequence[tuple[Matcher, int]]  # each with the token that was sampled for it


class Masks:
    """Advances matchers in threads of its own; a matcher is `ready` when its next mask is there. Engine thread only.

    All of a step go in one call (64 rows one by one are 1.7 ms). Those that were slow of late have a thread to
    themselves, one after another, so that they hold up only each other. Suspects, most of which were merely beside a
    slow one, have a thread of theirs, where it shows: they neither wait for those that are known to be slow, nor do
    the quick wait for them.
    """

    def __init__(self, advance: Callable[[Landed], None]) -> None:
        """`advance`: `Matcher.advance` of several together, in whatever thread."""
        self._quick, self._suspect, self._slow = _Lane(advance), _Lane(_one_by_one), _Lane(_one_by_one)

    def advance(self, landed: Landed) -> None:
        """Take the token of each matcher in."""
        for matcher, _ in landed:
            matcher.ready = False
        parts: dict[_Lane, list[tuple[Matcher, int]]] = {}
        for matcher, token in landed:
            lane = self._slow if matcher.slow else self._suspect if matcher.suspect else self._quick
            parts.setdefault(lane, []).append((matcher, token))
        for lane, part in parts.items():
            lane.begin(part)

    def wait(self, timeout_s: float | None) -> None:
        """That long, or until the quick are ready; None: until some are, whichever."""
        lanes = self._quick, self._suspect, self._slow
        if timeout_s is None:
            ended = wait([job for lane in lanes for job in lane.jobs], return_when=FIRST_COMPLETED).done
            for lane in lanes:
                lane.forget(ended)
        else:
            wait(self._quick.jobs, timeout_s)


class _Lane:
    """A thread, and what it has to do, one after another."""

    def __init__(self, advance: Callable[[Landed], None]) -> None:
        self._advance = advance
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aiolora-masks")
        self.jobs: list[Future[None]] = []  # one that has just ended stays, or who comes to wait for it would miss it

    def begin(self, landed: Landed) -> None:
        self.forget({job for job in self.jobs if job.done()})
        self.jobs.append(self._pool.submit(self._advance, landed))

    def forget(self, ended: Collection[Future[None]]) -> None:
        self.jobs = [job for job in self.jobs if job not in ended]


def _one_by_one(landed: Landed) -> None:
    for matcher, token in landed:
        matcher.advance(token)
