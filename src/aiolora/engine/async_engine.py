"""AsyncLLMEngine: the one bridge between the asyncio loop and the engine thread.

Down: a message into a deque and an event, once a request. Up: one `call_soon_threadsafe` a step with all its deltas.
"""

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import anyio.to_thread
from msgspec import structs
from torch import Tensor

from aiolora.config import EngineArgs, Environment
from aiolora.engine.build import Built, build
from aiolora.engine.core import AdapterStanding, Engine, Snapshot
from aiolora.engine.grammar import COMPILE_TIMEOUT_S, too_slow
from aiolora.engine.intake import Intake, LoRA
from aiolora.engine.mailbox import Mailbox
from aiolora.engine.output import Assembler
from aiolora.engine.plan import Plan
from aiolora.errors import AdapterFormatError, AioloraError, EngineDeadError, RequestError
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.memory import AnyConfig, InMemory, in_memory
from aiolora.lora.resolvers import choose_resolvers
from aiolora.lora.resolving import Resolving
from aiolora.types import (
    AdapterVersion,
    Grammar,
    LoRARequest,
    Messages,
    Mix,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
    TokenDelta,
    TokenOutput,
    read_again,
)

T = TypeVar("T")
Message = Callable[[Engine], None]


class AsyncLLMEngine:
    """One base model and its adapters, for many concurrent streams of one asyncio loop.

        async with AsyncLLMEngine.from_engine_args(EngineArgs(model=..., enable_lora=True)) as engine:
            async for token in engine.stream("Hello", SamplingParams(max_tokens=16), lora="sql"):
                print(token.text, end="")

    Everything public is called on the loop that started it. The model is loaded, and adapters are read, in worker
    threads; the engine steps in a thread of its own.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self._built: Built | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inbox: deque[Message] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._death: BaseException | None = None
        self._mailboxes: dict[str, Mailbox] = {}  # by ticket
        self._tickets: dict[str, str] = {}  # request id -> the name the engine knows it by, never used twice
        self._num_tickets = itertools.count()
        self._loading: dict[object, asyncio.Future[AdapterVersion]] = {}
        self._reloading = asyncio.Lock()  # what was asked for later is read later
        self._questions: set[asyncio.Future[Any]] = set()  # to the engine thread, not answered
        self._resolving: Resolving | None = None  # None: unknown names stay unknown
        self._starting = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._snapshot: Snapshot | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "AsyncLLMEngine":
        """An engine that is not started yet: enter it (`async with`) or `await start()`."""
        return cls(engine_args)

    async def __aenter__(self) -> "AsyncLLMEngine":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Load the model in a worker thread and begin to step; started already: nothing.

        Raises `ConfigError`, a `ModelError`, or `EngineDeadError` where it has stopped before.
        """
        async with self._starting:
            if self._thread is not None:
                self._alive()
                return
            self._loop = asyncio.get_running_loop()
            environment = Environment.read()
            if environment.runtime_lora_updating and self.args.enable_lora:
                chosen = await anyio.to_thread.run_sync(choose_resolvers, environment)
                self._resolving = Resolving(
                    self.args.model, chosen, self._load_resolved, timeout_s=environment.resolver_timeout_s
                )
            self._built = await anyio.to_thread.run_sync(build, self.args, self._read_again)
            self._snapshot = self._built.engine.snapshot()
            engine = self._built.engine
            self._thread = threading.Thread(target=self._run, args=(engine,), name="aiolora-engine", daemon=True)
            self._thread.start()

    async def stop(self) -> None:
        """End every stream with `EngineDeadError` and the thread with its step. Idempotent."""
        if self._thread is None:
            return
        self._stopping = True
        self._wake.set()
        for task in self._tasks:
            task.cancel()
        if self._resolving is not None:
            self._resolving.stop()
        for loading in self._loading.values():
            loading.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)
        self._fail(RuntimeError("it was shut down"))

    @property
    def intake(self) -> Intake:
        """The loop's side of the engine: tokenizer, names, limits."""
        return self._parts.intake

    @property
    def plan(self) -> Plan:
        """Sizes and bounds that were derived at start."""
        return self._parts.plan

    @property
    def started(self) -> bool:
        """Whether `start` has been called and has loaded the model."""
        return self._thread is not None

    @property
    def death(self) -> BaseException | None:
        """Why the engine has stopped; None while it lives."""
        return self._death

    def snapshot(self) -> Snapshot:
        """The engine as of its last step, or of its falling idle."""
        assert self._parts is not None
        assert self._snapshot is not None
        return self._snapshot

    async def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: LoRA = None,
        request_id: str | None = None,
    ) -> AsyncIterator[TokenOutput]:
        """Every token as it comes. Leaving the iteration (break, cancellation, aclose) aborts the request.

        `lora`: the name of an adapter that is loaded or that a resolver finds, a LoRARequest (loaded on first use), or
        {name: weight}.
        Raises `RequestError`, `AdapterError`, or `EngineDeadError` where the engine stops on the way.
        """
        request = await self.prepare(prompt, sampling_params, lora=lora, request_id=request_id)
        async with contextlib.aclosing(self.run([Assembler(request, self.intake.tokenizer)])) as bursts:
            async for burst in bursts:
                for _, output in burst:
                    yield output

    async def generate(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: LoRA = None,
        request_id: str | None = None,
    ) -> RequestOutput:
        """The whole answer. Cancelling aborts the request."""
        request = await self.prepare(prompt, sampling_params, lora=lora, request_id=request_id)
        assembler = Assembler(request, self.intake.tokenizer)
        async for _ in self.run([assembler]):
            pass
        return assembler.output()

    async def prepare(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: LoRA = None,
        request_id: str | None = None,
    ) -> Request:
        """The checked request, its adapters loaded, not yet running: what can be wrong is raised here."""
        self._alive()
        parts = self.intake.parts(lora)
        mix = Mix(tuple([(await self._version(part), weight) for part, weight in parts])) if parts else None
        request = self.intake.request(
            prompt,
            sampling_params,
            mix,
            grammar=await self._grammar(sampling_params),
            request_id=request_id,
            lora_request=lora if isinstance(lora, LoRARequest) else None,
        )
        if mix is not None:  # removed or replaced from now on, it still serves this request, be it run soon or late
            self._post(lambda engine: engine.hold_adapters(mix))
            weakref.finalize(request, self._post, lambda engine: engine.let_go(mix)).atexit = False
        return request

    async def run(self, assemblers: Sequence[Assembler]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
        """Run prepared requests side by side; each time, every token that has come, with its request's position.

        Leaving the iteration aborts what is unfinished. One request that fails ends them all with its error.
        """
        self._alive()
        requests = [assembler.request for assembler in assemblers]
        taken = next((request.id for request in requests if request.id in self._tickets), None)
        if taken is not None:
            raise RequestError(f"request_id {taken!r} is in use; give each request its own", param="request_id")
        # a delta of a request that was left may still be on its way when its id is used again: tickets tell them apart
        tickets = [f"{request.id}#{next(self._num_tickets)}" for request in requests]
        positions = {ticket: position for position, ticket in enumerate(tickets)}
        mailbox = Mailbox()
        try:
            for request, ticket in zip(requests, tickets):
                self._tickets[request.id] = ticket
                self._mailboxes[ticket] = mailbox
                self._post(partial(_add, request=structs.replace(request, id=ticket)))
            while not all(assembler.finished for assembler in assemblers):
                burst = []
                for delta in await mailbox.get():
                    position = positions[delta.request_id]
                    output = assemblers[position].feed(delta)
                    if output is None:
                        continue
                    if output.finish_reason is not None and delta.finish_reason is None:
                        self._abort(delta.request_id, delta.index)  # a stop string, which only text can show
                    burst.append((position, output))
                if burst:
                    yield burst
        finally:
            for assembler, ticket in zip(assemblers, tickets):
                self._tickets.pop(assembler.request.id, None)
                self._mailboxes.pop(ticket, None)
                if not assembler.finished:
                    self._abort(ticket)

    def abort(self, request_id: str) -> None:
        """End a request: its stream simply ends, its answers with "abort". Unknown ids are fine."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._abort(ticket)
            self._mailboxes[ticket].put(TokenDelta(ticket, 0, token_id=None, finish_reason="abort"))

    async def add_lora(
        self,
        lora: LoRARequest | str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: AnyConfig | None = None,
        load_inplace: bool = False,
    ) -> AdapterVersion:
        """Load an adapter, or find it loaded. Raises `AdapterError`; a failed load changes nothing.

        With a name for `lora`, from memory: `tensors` under the names that PEFT saves, on any device, and `config` as
        in adapter_config.json, or a `peft.LoraConfig`. They are copied. `load_inplace` replaces what the name stands
        for; requests under way finish on the old version.
        """
        self._alive()
        if isinstance(lora, LoRARequest):
            self.intake.parts(lora)
            return await self._version(lora)
        source = in_memory(lora, tensors, config)
        self.intake.parts(lora)
        number = self.intake.registry.number(lora)
        return await self._shared(object(), self._load(source, number, replace=load_inplace))

    async def resolve_lora(self, lora_name: str) -> bool:
        """Load the adapter that a resolver finds for a name; True: it is loaded, or was before. False: nobody knows it.

        Resolvers are asked only with `AIOLORA_ALLOW_RUNTIME_LORA_UPDATING`. Raises `AdapterError`.
        """
        self._alive()
        if self.intake.registry.knows(lora_name):
            return True
        return self._resolving is not None and await self._resolving.resolve(lora_name)

    async def remove_lora(self, lora: str | int, *, force: bool = False) -> bool:
        """Forget an adapter, by name or `lora_int_id`. False: it was not known.

        Requests under way finish, and what it takes is free after the last; `force`: they end with "abort".
        """
        self._alive()
        registry = self.intake.registry
        name = registry.named(lora)
        version = registry.forget(name) if name is not None else None
        if version is not None:
            self._post(lambda engine: engine.drop_adapter(version, force=force))
        return version is not None

    async def pin_lora(self, lora: str | int) -> None:
        """Keep an adapter, by name or `lora_int_id`, in host memory and, once it is there, on the device.

        Until `unpin_lora` or `remove_lora`; a version that replaces it takes the pin over. Raises `UnknownModelError`,
        and `AdapterMemoryError` where what is left beside all pinned ones would hold no adapter of `max_lora_rank`.
        """
        version = self.intake.registry.get(lora)
        await self._ask(lambda engine: engine.pin_adapter(version))

    async def unpin_lora(self, lora: str | int) -> None:
        """It may be evicted again. Not pinned: nothing. Raises `UnknownModelError`."""
        version = self.intake.registry.get(lora)
        await self._ask(lambda engine: engine.unpin_adapter(version))

    async def lora_standing(self) -> list[AdapterStanding]:
        """Where every loaded adapter is and who needs it; at the end those removed that requests still run with."""
        versions = self.intake.registry.versions()
        return await self._ask(lambda engine: engine.standing(versions))

    async def list_loras(self) -> list[AdapterVersion]:
        """Loaded adapters in the order they came."""
        return self.intake.registry.versions()

    def reserve(self, name: str) -> None:
        """`name` means the base model too: no adapter may have it. Raises `AdapterConflictError` where one has."""
        self.intake.registry.reserve(name)

    @property
    def _parts(self) -> Built:
        if self._built is None:
            raise EngineDeadError("the engine is not started; use `async with engine:` or `await engine.start()`")
        return self._built

    def _alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine has stopped: {self._death}") from self._death
        assert self._parts is not None

    async def _grammar(self, params: SamplingParams | None) -> Grammar | None:
        """What the answers must match, compiled in a worker thread; `RequestError` where that fails or takes long."""
        if params is None or params.structured_outputs is None:
            return None
        compiled = asyncio.wrap_future(self._parts.grammars.compile(params.structured_outputs))
        try:
            return await asyncio.wait_for(asyncio.shield(compiled), COMPILE_TIMEOUT_S)  # others may wait for it too
        except TimeoutError:
            raise too_slow() from None

    async def _version(self, lora: str | LoRARequest) -> AdapterVersion:
        """The version that `lora` means, loaded once however many ask at the same time."""
        registry = self.intake.registry
        if isinstance(lora, str):
            await self.resolve_lora(lora)
            return registry.find(lora)
        known = registry.match(lora)
        if known is not None:
            return known
        number, replace = lora.lora_int_id, lora.load_inplace
        return await self._shared(object() if replace else lora, self._load(lora, number, replace=replace))

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
                raise EngineDeadError("the engine has stopped") from self._death
            raise

    async def _load_resolved(self, lora: LoRARequest) -> None:
        if not self.intake.registry.knows(lora.lora_name):  # else somebody has loaded it while it was looked for
            await self._version(lora)

    async def _load(self, source: LoRARequest | InMemory, number: int, *, replace: bool) -> AdapterVersion:
        """Read and publish."""
        registry = self.intake.registry
        registry.check(source.lora_name, number)
        async with self._reloading if replace else contextlib.nullcontext():
            weights = await anyio.to_thread.run_sync(self._parts.load, source)
            if isinstance(source, LoRARequest) and (known := registry.match(source)) is not None:
                return known  # others have loaded it since then
            old = registry.publish(weights.version, number, replace=replace)
        if old is None:
            self._post(lambda engine: engine.add_adapter(weights))
        else:
            self._post(lambda engine: engine.replace_adapter(old, weights))
        return weights.version

    async def _ask(self, question: Callable[[Engine], T]) -> T:
        """Let the engine thread do something between two steps; its answer, or the `AioloraError` it raises."""
        self._alive()
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._questions.add(answer)
        answer.add_done_callback(self._questions.discard)

        def asked(engine: Engine) -> None:
            try:
                self._to_loop(partial(_resolve, answer, question(engine)))
            except AioloraError as error:
                self._to_loop(partial(_reject, answer, error))

        self._post(asked)
        return await answer

    def _abort(self, ticket: str, index: int | None = None) -> None:
        self._post(lambda engine: engine.abort(ticket, index))

    def _post(self, message: Message) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _deliver(self, deltas: list[TokenDelta], snapshot: Snapshot) -> None:
        """On the loop: what one step brought, onto each stream."""
        self._snapshot = snapshot
        for delta in deltas:
            mailbox = self._mailboxes.get(delta.request_id)
            if mailbox is not None:
                mailbox.put(delta)

    def _fail(self, error: BaseException) -> None:
        """On the loop: the engine has stopped; say so to every stream."""
        self._death = self._death or error
        for mailbox in self._mailboxes.values():
            mailbox.fail(self._death)
        for question in list(self._questions):
            _reject(question, EngineDeadError(f"the engine has stopped: {self._death}"))

    # ---- below: the engine thread ----

    def _run(self, engine: Engine) -> None:
        try:
            while True:
                self._wake.clear()  # before reading what it announces, or the last word could be missed
                if self._stopping:
                    return
                while self._inbox:
                    self._inbox.popleft()(engine)
                working = engine.has_work and not engine.stalled
                deltas = engine.step() if working else []
                self._to_loop(partial(self._deliver, deltas, engine.snapshot()))
                if not working:
                    self._wake.wait()
        except BaseException as error:
            self._to_loop(partial(self._fail, error))

    def _to_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(call)

    def _read_again(self, version: AdapterVersion) -> None:
        self._to_loop(lambda: self._start_reading(version))

    # ---- on the loop again ----

    def _start_reading(self, version: AdapterVersion) -> None:
        task = asyncio.ensure_future(self._reading(version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reading(self, version: AdapterVersion) -> None:
        message: Message
        try:
            weights: AdapterWeights = await anyio.to_thread.run_sync(self._parts.load, read_again(version))
            message = partial(_landed, version=version, weights=weights)
        except Exception as error:
            known = error if isinstance(error, AioloraError) else None
            failure = known or AdapterFormatError(version.name, f"could not be read again: {error!r}")
            message = partial(_failed, version=version, error=failure)
        self._post(message)


def _add(engine: Engine, *, request: Request) -> None:
    engine.add(request)


def _resolve(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _reject(answer: asyncio.Future[Any], error: AioloraError) -> None:
    if not answer.done():
        answer.set_exception(error)


def _landed(engine: Engine, *, version: AdapterVersion, weights: AdapterWeights) -> None:
    engine.adapter_landed(version, weights)


def _failed(engine: Engine, *, version: AdapterVersion, error: AioloraError) -> None:
    engine.adapter_failed(version, error)
