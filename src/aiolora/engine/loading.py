"""Loading: adapters on their way from a name to the engine thread, on the loop."""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any

import anyio

from aiolora.engine.bridge import Bridge
from aiolora.engine.build import Built
from aiolora.engine.core import Engine
from aiolora.engine.names import Names, not_held
from aiolora.engine.workers import in_worker
from aiolora.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AioloraError,
    EngineDeadError,
)
from aiolora.lora.memory import InMemory
from aiolora.lora.resolver import LoRAResolver
from aiolora.lora.resolving import Resolving
from aiolora.types import AdapterVersion, LoRARequest, read_again

READS = 8  # of adapters side by side; each is read by several threads


class Loading:
    """What is being read, in worker threads: once however many ask, and what is to be replaced in the order asked.

    `resolvers`: who is asked for unknown names, before the registered ones; None: nobody ever is. Owned by the loop.
    """

    def __init__(
        self,
        built: Built,
        bridge: Bridge,
        names: Names,
        resolvers: Mapping[str, LoRAResolver] | None,
        *,
        resolver_timeout_s: float,
    ) -> None:
        self._registry = built.intake.registry
        self._check = built.check
        self._load = built.load
        self._readers = anyio.CapacityLimiter(READS)  # slow disks hold up no prompt that is to be tokenised
        self._bridge = bridge
        self._names = names
        self._loading: dict[object, asyncio.Future[AdapterVersion]] = {}
        self._replacing = asyncio.Lock()  # what was asked for later is read later
        self._tasks: set[asyncio.Task[None]] = set()
        self._resolving: Resolving | None = None  # None: unknown names stay unknown
        if resolvers is not None:
            self._resolving = Resolving(
                built.intake.model, resolvers, self._load_resolved, timeout_s=resolver_timeout_s
            )

    async def version(self, lora: str | LoRARequest) -> AdapterVersion:
        """The version that `lora` means. Raises `AdapterError` and `UnknownModelError`."""
        if isinstance(lora, str):
            await self.resolve(lora)
            return self._registry.find(lora)
        known = self._registry.match(lora)
        if known is not None:
            return known
        number, replace = lora.lora_int_id, lora.load_inplace
        return await self._shared(object() if replace else lora, self._publish(lora, number, replace=replace))

    async def add(self, source: InMemory, *, replace: bool) -> AdapterVersion:
        """The version made of what is in memory. Raises `AdapterError`."""
        number = self._registry.number(source.lora_name)
        return await self._shared(object(), self._publish(source, number, replace=replace))

    async def roll_back(self, lora: str | int, digest: str | None) -> AdapterVersion:
        """What the name of `lora` stands for again. Raises as `Names.earlier` and `Names.bring_back`."""
        return await self._shared(object(), self._roll_back(lora, digest))

    async def announce(self, lora: LoRARequest) -> None:
        """Check config and header, and know the name from then on. Raises `AdapterError`."""
        if self._registry.match(lora) is None:
            self._registry.announce(await in_worker(self._check, lora, limiter=self._readers))

    async def resolve(self, name: str) -> bool:
        """Whether `name` is known; what was announced, or what a resolver finds, is read for it.

        Raises `AdapterError` where that cannot be read.
        """
        await self._read_announced(name)
        if not self._registry.knows(name) and self._resolving is not None:
            await self._resolving.resolve(name)
            await self._read_announced(name)  # somebody may have announced it while it was looked for
        return self._registry.knows(name)

    def read_again(self, version: AdapterVersion) -> None:
        """Begin to read an evicted version; the engine thread hears how it ended."""
        task = asyncio.ensure_future(self._reading(version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """End everything; who waits gets `EngineDeadError`."""
        for task in self._tasks:
            task.cancel()
        if self._resolving is not None:
            self._resolving.stop()
        for loading in self._loading.values():
            loading.cancel()

    async def _shared(self, key: object, load: Coroutine[Any, Any, AdapterVersion]) -> AdapterVersion:
        """Run `load`, or wait for the one that runs under `key`: nobody's in particular, no caller can take it away."""
        loading = self._loading.get(key)
        if loading is None:
            loading = self._loading[key] = asyncio.ensure_future(load)

            def end(done: asyncio.Future[AdapterVersion]) -> None:
                del self._loading[key]
                if not done.cancelled():
                    done.exception()  # who asked may have left

            loading.add_done_callback(end)
        else:
            load.close()
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():
                raise EngineDeadError("the engine has stopped") from None
            raise
        finally:
            del loading  # an error leads to this frame: it must not lead on to the future that has the error

    async def _read_announced(self, name: str) -> None:
        """Read what was announced under `name`, if it is still to be read."""
        while (announced := self._registry.announced(name)) is not None:
            try:
                await self.version(announced.request)
            except AdapterError:
                if self._registry.announced(name) is announced:
                    raise  # else it was removed or replaced meanwhile: the name says what holds now

    async def _load_resolved(self, lora: LoRARequest) -> None:
        if not self._registry.knows(lora.lora_name):  # else somebody has loaded it while it was looked for
            await self.version(lora)

    async def _publish(self, source: LoRARequest | InMemory, number: int, *, replace: bool) -> AdapterVersion:
        """Read and publish."""
        registry = self._registry
        registry.check(source.lora_name, number)
        announced = registry.announced(source.lora_name)
        async with self._replacing if replace else contextlib.nullcontext():
            weights = await in_worker(self._load, source, limiter=self._readers)
            if isinstance(source, LoRARequest) and (known := registry.match(source)) is not None:
                return known  # others have loaded it since then
            still = registry.announced(source.lora_name)
            if announced is not None and not replace and (still is None or still.request != announced.request):
                raise AdapterNotFoundError(source.lora_name, "was removed or replaced while it was read")
            return self._names.publish(weights, number, replace=replace)

    async def _roll_back(self, lora: str | int, digest: str | None) -> AdapterVersion:
        async with self._replacing:
            version = self._names.earlier(lora, digest)
            weights = None
            if not await self._bridge.ask(lambda engine: engine.adapters.revive(version)):
                if version.source is None:
                    raise not_held(version)
                weights = await in_worker(self._load, read_again(version), limiter=self._readers)
            return self._names.bring_back(version, weights)

    async def _reading(self, version: AdapterVersion) -> None:
        try:
            weights = await in_worker(self._load, read_again(version), limiter=self._readers)
        except Exception as error:
            self._bridge.post(partial(_failed, version=version, error=error))
        else:
            self._bridge.post(lambda engine: engine.adapters.landed(version, weights))


def _failed(engine: Engine, *, version: AdapterVersion, error: Exception) -> None:
    known = error if isinstance(error, AioloraError) else None
    engine.adapters.failed(version, known or AdapterFormatError(version.name, f"could not be read again: {error!r}"))
