"""Counts of each adapter under a bounded number of names. Pure Python: what /metrics tells is read from here."""

from collections.abc import Callable, Iterator

OTHER = "other"


class Tally:
    """What was asked of one model. `waiting` and `running` go up and down, the others only up."""

    __slots__ = ("generated_tokens", "prompt_tokens", "requests", "running", "waiting")

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.waiting = 0  # requests without a token so far
        self.running = 0

    def take_over(self, other: "Tally") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens


class Tallies:
    """A tally for each of up to `limit` names, one under `OTHER` for the rest.

    Who comes when all names are given out gets that of an adapter that is gone and has no request under way; what was
    counted for it goes to `OTHER`, so no sum over all of them ever falls.
    """

    def __init__(self, limit: int, known: Callable[[str], bool]) -> None:
        self._limit = limit
        self._known = known
        self._of: dict[str, Tally] = {}
        self._other = Tally()

    def of(self, name: str) -> Tally:
        """The tally to count on."""
        tally = self._of.get(name)
        if tally is None:
            if name == OTHER:
                return self._other
            if len(self._of) >= self._limit:
                self._forget_one()
            if len(self._of) >= self._limit:
                return self._other
            tally = self._of[name] = Tally()
        return tally

    def named(self, name: str) -> bool:
        """Whether it is counted by its name."""
        return name in self._of

    def __iter__(self) -> Iterator[tuple[str, Tally]]:
        yield from self._of.items()
        if self._other.requests:
            yield OTHER, self._other

    def _forget_one(self) -> None:
        for name, tally in self._of.items():
            if not (tally.waiting or tally.running or self._known(name)):
                self._other.take_over(self._of.pop(name))
                return
