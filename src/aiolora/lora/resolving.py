"""The chain: a name that nobody loaded is asked of every resolver in turn, once however many requests ask."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from aiolora.errors import AdapterResolveError, EngineDeadError
from aiolora.lora.resolver import LoRAResolver, LoRAResolverRegistry, may_be_resolved
from aiolora.types import LoRARequest

logger = logging.getLogger(__name__)

_AT_WORK, _WAITING = 16, 256  # names that are asked for side by side, and all that are not decided yet
_UNKNOWN_S, _MAX_UNKNOWN = 10.0, 1024


@dataclass
class _Flight:
    task: asyncio.Task[bool]
    askers: int = 0


class Resolving:
    """What is being resolved, and which names nobody knew a moment ago. Owned by the loop.

    `chosen` are asked before the `LoRAResolverRegistry`'s. `load` publishes what a resolver gave.
    """

    def __init__(
        self,
        base_model: str,
        chosen: Mapping[str, LoRAResolver],
        load: Callable[[LoRARequest], Awaitable[object]],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_model, self._chosen, self._load = base_model, chosen, load
        self._timeout_s, self._clock = timeout_s, clock
        self._flights: dict[str, _Flight] = {}
        self._unknown: dict[str, float] = {}  # name -> when it may be asked for again, soonest first
        self._at_work = asyncio.Semaphore(_AT_WORK)
        self._abandoned: set[asyncio.Task[LoRARequest | None]] = set()

    async def resolve(self, name: str) -> bool:
        """Whether a resolver knows `name`, which is loaded then. Leaving takes it from nobody else who asks.

        Raises `AdapterResolveError` where none knows it and one failed, or the `AdapterError` of loading it.
        """
        if not may_be_resolved(name) or self._is_unknown(name):
            return False
        flight = self._flights.get(name)
        if flight is None:
            if len(self._flights) >= _WAITING:
                raise AdapterResolveError(name, f"{_WAITING} other names are being resolved; ask again later")
            flight = self._flights[name] = _Flight(asyncio.ensure_future(self._find(name)))
            flight.task.add_done_callback(_heard)
        flight.askers += 1
        try:
            await asyncio.wait((flight.task,))
        finally:
            flight.askers -= 1
            if flight.askers == 0:
                flight.task.cancel()
            if (flight.askers == 0 or flight.task.done()) and self._flights.get(name) is flight:
                del self._flights[name]
        if flight.task.cancelled():
            raise EngineDeadError("the engine has stopped")
        try:
            return flight.task.result()
        finally:
            del flight  # an error leads to this frame: it must not lead on to the task that has the error

    def stop(self) -> None:
        """End every question; who waits gets `EngineDeadError`."""
        for flight in self._flights.values():
            flight.task.cancel()

    def _is_unknown(self, name: str) -> bool:
        now = self._clock()
        while self._unknown and (len(self._unknown) > _MAX_UNKNOWN or next(iter(self._unknown.values())) <= now):
            del self._unknown[next(iter(self._unknown))]
        return name in self._unknown

    async def _find(self, name: str) -> bool:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._at_work.acquire()
        except TimeoutError:
            raise AdapterResolveError(name, f"had no turn within {self._timeout_s:g} s; ask again later") from None
        try:
            request = await self._ask_all(name)
        finally:
            self._at_work.release()
        if request is None:
            self._unknown[name] = self._clock() + _UNKNOWN_S
            return False
        await self._load(request)
        return True

    async def _ask_all(self, name: str) -> LoRARequest | None:
        failures: list[tuple[str, Exception]] = []
        names = LoRAResolverRegistry.get_supported_resolvers()
        for label, resolver in [*self._chosen.items(), *((n, LoRAResolverRegistry.get_resolver(n)) for n in names)]:
            try:
                request = await self._ask(resolver, name)
            except Exception as error:
                logger.warning("resolver %r failed on %r", label, name, exc_info=error)
                failures.append((label, error))
            else:
                if request is not None:
                    return request
        if failures:  # told by class only: what a resolver's error says may hold addresses and keys
            told = ", ".join(f"{label!r} ({type(error).__name__})" for label, error in failures)
            raise AdapterResolveError(name, f"no resolver found it, and it failed in {told}") from failures[0][1]
        return None

    async def _ask(self, resolver: LoRAResolver, name: str) -> LoRARequest | None:
        async def call() -> LoRARequest | None:
            return await resolver.resolve_lora(self._base_model, name)

        task = asyncio.ensure_future(call())  # a task of its own: one that ignores its cancellation is left behind
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)
        task.add_done_callback(_heard)
        try:
            await asyncio.wait((task,), timeout=self._timeout_s)
            late = not task.done()
        finally:
            task.cancel()
        if late:
            raise TimeoutError(f"no answer within {self._timeout_s:g} s")
        if task.cancelled():
            raise RuntimeError("it was cancelled from within")
        request = task.result()
        if request is not None and not isinstance(request, LoRARequest):
            raise TypeError(f"it gave a {type(request).__name__}, no LoRARequest")
        if request is not None and request.lora_name != name:
            raise ValueError(f"it gave {request.lora_name!r}, which is another adapter")
        return request


def _heard(task: "asyncio.Task[bool] | asyncio.Task[LoRARequest | None]") -> None:
    """Its error is told by who asked, or nobody is left to hear it."""
    with suppress(asyncio.CancelledError):
        task.exception()
