"""Phases: what a start spends its time on."""

import time


class Phases:
    """Seconds of each phase of a start, by name in their order; the first begins now."""

    def __init__(self) -> None:
        self.took: dict[str, float] = {}
        self._since = time.monotonic()

    def over(self, name: str) -> None:
        """What went on since the last phase was `name`."""
        now = time.monotonic()
        self.took[name] = self.took.get(name, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.took.items())
        return f"{sum(self.took.values()):.1f} s: {each}"
