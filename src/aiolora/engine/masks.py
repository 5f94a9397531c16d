"""Masks: what tokens grammars allow next, computed beside the steps."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeAlias

from aiolora.types import Matcher

Landed: TypeAlias = Sequence[tuple[Matcher, int]]  # each with the token that was sampled for it


class Masks:
    """Advances matchers in threads of its own; a matcher is `ready` when its next mask is there. Engine thread only.

    All of a step go in one call (64 rows one by one are 1.7 ms). Those that were slow of late have a thread to
    themselves, one after another, so that they hold up only each other.
    """

    def __init__(self, advance: Callable[[Landed], None]) -> None:
        """`advance`: `Matcher.advance` of several together, in whatever thread."""
        self._advance = advance
        self._quick, self._slow = (ThreadPoolExecutor(1, thread_name_prefix="aiolora-masks") for _ in range(2))
        self._jobs: list[Future[None]] = []

    def advance(self, landed: Landed) -> None:
        """Take the token of each matcher in."""
        for matcher, _ in landed:
            matcher.ready = False
        slow = [(matcher, token) for matcher, token in landed if matcher.slow or matcher.suspect]
        quick = [(matcher, token) for matcher, token in landed if not (matcher.slow or matcher.suspect)]
        for pool, advance, part in ((self._quick, self._advance, quick), (self._slow, _one_by_one, slow)):
            if part:
                self._jobs.append(pool.submit(advance, part))

    def wait(self, timeout_s: float | None) -> None:
        """That long, or until all are ready; None: until some are."""
        until = {"return_when": FIRST_COMPLETED} if timeout_s is None else {}
        self._jobs = list(wait(self._jobs, timeout_s, **until).not_done)


def _one_by_one(landed: Landed) -> None:
    for matcher, token in landed:
        matcher.advance(token)
