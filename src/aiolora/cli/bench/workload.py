"""What is asked in a benchmark: prompts of random tokens, an adapter each, arrivals in time; and how it is driven."""

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from aiolora.errors import AioloraError

Popularity: TypeAlias = Literal["distinct", "uniform", "zipf", "identical"]
_TOKENS = range(10, 250)  # ids that every vocabulary has


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    model: str
    prompt: list[int]
    max_tokens: int
    after_s: float  # it arrives so long after the first


@dataclass(slots=True)
class Outcome:
    """What came of it. Times in seconds of `time.perf_counter()`."""

    model: str
    sent_s: float
    token_s: list[float] = field(default_factory=list)  # when each token came
    error: str | None = None

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def whole_s(self) -> float:
        return self.token_s[-1] - self.sent_s

    @property
    def between_s(self) -> list[float]:
        """Between one token and the next."""
        return [late - early for early, late in zip(self.token_s, self.token_s[1:])]


Send: TypeAlias = Callable[[Ask], AsyncIterator[int]]  # the number of tokens that have just come, each time some have


def models_asked(models: Sequence[str], count: int, popularity: Popularity, chance: random.Random) -> list[str]:
    """Which of `models` each of `count` requests names.

    `distinct`: in turn; `identical`: always the first; `zipf`: the k-th with a weight of 1/k.
    """
    if popularity == "distinct":
        return [models[number % len(models)] for number in range(count)]
    if popularity == "identical":
        return [models[0]] * count
    weights = [1 / rank if popularity == "zipf" else 1 for rank in range(1, len(models) + 1)]
    return chance.choices(models, weights, k=count)


def workload(
    models: Sequence[str],
    *,
    count: int,
    popularity: Popularity,
    input_len: int,
    output_len: int,
    rate: float = math.inf,
    seed: int = 0,
) -> list[Ask]:
    """`count` requests that arrive `rate` a second, as a Poisson process; infinite: all at once."""
    chance = random.Random(seed)
    now_s, asks = 0.0, []
    for model in models_asked(models, count, popularity, chance):
        prompt = chance.choices(_TOKENS, k=input_len)
        asks.append(Ask(model, prompt, output_len, now_s))
        now_s += chance.expovariate(rate) if math.isfinite(rate) else 0.0
    return asks


async def drive(
    asks: Sequence[Ask], send: Send, *, at_once: int | None = None, done: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Send each when its time has come (at most `at_once` under way), and note when its tokens come."""
    gate = asyncio.Semaphore(at_once or len(asks) or 1)
    start_s = time.perf_counter()

    async def follow(ask: Ask) -> Outcome:
        await asyncio.sleep(ask.after_s - (time.perf_counter() - start_s))
        async with gate:
            outcome = Outcome(ask.model, time.perf_counter())
            try:
                async for count in send(ask):
                    outcome.token_s += [time.perf_counter()] * count
            except AioloraError as error:
                outcome.error = str(error)
            if not outcome.token_s:
                outcome.error = outcome.error or "no token came"
            done()
            return outcome

    return await asyncio.gather(*(follow(ask) for ask in asks))
