"""Masks: what tokens grammars allow next, computed beside the steps."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from aiolora.types import Matcher

_SLOW_S = 0.0005  # a token of most grammars takes some 30 us


class Masks:
    """Advances matchers in threads of its own; a matcher is `ready` when its next mask is there. Engine thread only.

    Those that were slow of late have a thread to themselves, so that they hold up only each other.
    """

    def __init__(self) -> None:
        self._quick, self._slow = (ThreadPoolExecutor(1, thread_name_prefix="aiolora-masks") for _ in range(2))
        self._jobs: list[Future[None]] = []

    def advance(self, landed: Sequence[tuple[Matcher, int]]) -> None:
        """Take the token of each matcher in; one job for all: 64 rows are 1.7 ms, and 4.6 ms with a job each."""
        for matcher, _ in landed:
            matcher.ready = False
        slow = [(matcher, token) for matcher, token in landed if matcher.took_s > _SLOW_S]
        quick = [(matcher, token) for matcher, token in landed if matcher.took_s <= _SLOW_S]
        for pool, part in ((self._quick, quick), (self._slow, slow)):
            if part:
                self._jobs.append(pool.submit(_advance, part))

    def wait(self, timeout_s: float | None) -> None:
        """That long, or until all are ready; None: until some are."""
        until = {"return_when": FIRST_COMPLETED} if timeout_s is None else {}
        self._jobs = list(wait(self._jobs, timeout_s, **until).not_done)


def _advance(landed: Sequence[tuple[Matcher, int]]) -> None:
    for matcher, token in landed:
        matcher.advance(token)
