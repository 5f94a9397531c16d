"""Shares: what operators let adapters take of the device. Pure Python."""

from collections import Counter

from aiolora.types import AdapterPolicy, Mix

MAX_KNOWN = 1024  # weights of mixes kept at hand: every step asks for those of all that run


class Shares:
    """Weights and concurrency of adapters by name, reloads included; a mix has the least of its adapters'.

    Engine thread only.
    """

    def __init__(self) -> None:
        self.policies: dict[str, AdapterPolicy] = {}  # of those that have one
        self._weights: dict[Mix, float] = {}  # worked out already
        self._running: Counter[str] = Counter()  # answers that hold leases

    def put(self, name: str, policy: AdapterPolicy | None) -> None:
        """From now on; None: the adapter may take what it gets."""
        self._weights.clear()
        if policy is None:
            self.policies.pop(name, None)
        else:
            self.policies[name] = policy

    def weight(self, mix: Mix | None) -> float:
        """What a token counts less, the more of it."""
        if mix is None:
            return 1.0
        known = self._weights.get(mix)
        if known is None:
            if len(self._weights) >= MAX_KNOWN:
                self._weights.clear()
            weights = [self.policies[name].weight if name in self.policies else 1.0 for name in _names(mix)]
            known = self._weights[mix] = min(weights)
        return known

    def full(self, mix: Mix | None) -> bool:
        """Whether one more answer of `mix` has to wait for another to end."""
        if mix is None or not self.policies:
            return False
        limits = ((name, self.policies[name].max_concurrency) for name in _names(mix) if name in self.policies)
        return any(limit is not None and self._running[name] >= limit for name, limit in limits)

    def enter(self, mix: Mix) -> None:
        """An answer of `mix` runs."""
        self._running.update(_names(mix))

    def leave(self, mix: Mix) -> None:
        """It runs no more."""
        self._running.subtract(_names(mix))
        for name in _names(mix):
            if not self._running[name]:
                del self._running[name]


def _names(mix: Mix) -> set[str]:
    return {version.name for version in mix.versions}
