"""Policies: what each adapter may take, and what is left of its tokens a minute. Pure Python."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiolora.errors import AdapterBusyError
from aiolora.types import AdapterPolicy, Mix

_UNLIMITED = AdapterPolicy()


@dataclass
class _Allowance:
    """Tokens that may still be used, as of `at_s`; under 0: more were than are allowed, and that is waited for."""

    left: float
    at_s: float


class Policies:
    """Policies by the name of an adapter. Owned by the loop (or by the caller of a blocking face).

    Tokens a minute are a bucket that holds a minute's worth and fills evenly. A request is let in while something is
    left, whatever it will use; prompts are charged when they run, answers as they come.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._policies: dict[str, AdapterPolicy] = {}
        self._allowances: dict[str, _Allowance] = {}

    def get(self, name: str) -> AdapterPolicy:
        """What `name` may take: all it gets, where nobody said otherwise."""
        return self._policies.get(name, _UNLIMITED)

    def put(self, name: str, policy: AdapterPolicy) -> None:
        """From now on. What was used of the minute stays used."""
        left = self._left(name)
        self._policies[name] = policy
        limit = policy.tokens_per_minute
        if limit is None:
            self._allowances.pop(name, None)
        else:
            self._allowances[name] = _Allowance(limit if left is None else min(left, limit), self._clock())

    def forget(self, name: str) -> None:
        """The name is gone."""
        self._policies.pop(name, None)
        self._allowances.pop(name, None)

    def check(self, mix: Mix | None) -> None:
        """Raise `AdapterBusyError` where an adapter of `mix` has used its tokens of the minute."""
        for name in self._limited(mix):
            left, limit = self._left(name), self._policies[name].tokens_per_minute
            assert left is not None
            assert limit is not None
            if left < 1:
                wait_s = max(1, math.ceil((1 - left) * 60 / limit))
                raise AdapterBusyError(
                    name, f"has used its {limit} tokens a minute; ask again in {wait_s} s", retry_after_s=wait_s
                )

    def charge(self, mix: Mix | None, tokens: int) -> None:
        """So many tokens were used with each adapter of `mix`."""
        for name in self._limited(mix):
            left = self._left(name)
            assert left is not None
            self._allowances[name] = _Allowance(left - tokens, self._clock())

    def _limited(self, mix: Mix | None) -> set[str]:
        if mix is None or not self._allowances:
            return set()
        return {version.name for version in mix.versions} & self._allowances.keys()

    def _left(self, name: str) -> float | None:
        """None: it has no limit."""
        allowance, limit = self._allowances.get(name), self.get(name).tokens_per_minute
        if allowance is None or limit is None:
            return None
        return min(limit, allowance.left + (self._clock() - allowance.at_s) * limit / 60)
