"""AsyncLLMEngine: the engine for those on an asyncio loop."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType

import anyio
import anyio.to_thread
from torch import Tensor

from aiolora.config import EngineArgs, Environment
from aiolora.engine.adapters import AdapterStanding
from aiolora.engine.beside import beside, takes_long
from aiolora.engine.bridge import Bridge
from aiolora.engine.build import Built, build
from aiolora.engine.core import Engine, Snapshot
from aiolora.engine.intake import Intake, LoRA, Settled
from aiolora.engine.loading import Loading
from aiolora.engine.names import Names
from aiolora.engine.output import Assembler
from aiolora.engine.plan import Plan
from aiolora.engine.streams import Streams
from aiolora.engine.workers import to_its_end
from aiolora.errors import EngineDeadError
from aiolora.lora.memory import AnyConfig, in_memory
from aiolora.lora.resolvers import choose_resolvers
from aiolora.types import (
    AdapterPolicy,
    AdapterVersion,
    LoRARequest,
    Messages,
    Mix,
    Prompt,
    Report,
    Request,
    RequestOutput,
    SamplingParams,
    TokenDelta,
    TokenOutput,
    unreported,
)

MEDIA_READERS = 4  # prompts whose images or recordings are decoded at a time


class AsyncLLMEngine:
    """One base model and its adapters, for many concurrent streams of one asyncio loop.

        sql = LoRARequest("sql", 1, "examples/adapters/sql")
        async with AsyncLLMEngine.from_engine_args(EngineArgs(model="smollm2-135m", enable_lora=True)) as engine:
            async for token in engine.stream("Hello", SamplingParams(max_tokens=16), lora=sql):
                print(token.text, end="")

    Everything public is called on the loop that started it. The model is loaded, and adapters are read, in worker
    threads; the engine steps in a thread of its own.
    """

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self._built: Built | None = None
        self._bridge: Bridge | None = None
        self._loading: Loading | None = None
        self._names: Names | None = None
        self._streams: Streams | None = None
        self._starting = asyncio.Lock()
        self._media_readers = anyio.CapacityLimiter(MEDIA_READERS)  # images hold up no text
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

    async def start(self, report: Report = unreported) -> None:
        """Load the model in a worker thread and begin to step; started already: nothing.

        `report` is called in that thread as weights and graphs come.
        Raises `ConfigError`, a `ModelError`, or `EngineDeadError` where it has stopped before.
        """
        async with self._starting:
            if self._built is not None:
                self._alive()
                return
            environment, resolvers = Environment.read(), None
            if environment.runtime_lora_updating and self.args.enable_lora:
                resolvers = await anyio.to_thread.run_sync(choose_resolvers, environment)
            self._bridge = bridge = Bridge(self._deliver, self._fail)
            built = await anyio.to_thread.run_sync(build, self.args, self._read_again, report)
            self._names = Names(built.intake, bridge.post)
            self._streams = Streams(bridge.post, built.intake.policies.charge)
            self._loading = Loading(
                built, bridge, self._names, resolvers, resolver_timeout_s=environment.resolver_timeout_s
            )
            self._snapshot = built.engine.snapshot()
            self._built = built
            bridge.start(built.engine)

    async def stop(self) -> None:
        """End every stream with `EngineDeadError` and the thread with its step. Idempotent."""
        if self._built is None or self._bridge is None:
            return
        self._adapters.stop()
        await self._bridge.stop()

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
        return self._built is not None

    @property
    def death(self) -> BaseException | None:
        """Why the engine has stopped; None while it lives."""
        return None if self._bridge is None else self._bridge.death

    def snapshot(self) -> Snapshot:
        """The engine as of its last step, or of its falling idle."""
        assert self._parts is not None
        assert self._snapshot is not None
        return self._snapshot

    async def probe(self) -> Snapshot:
        """The engine as it is now, from its own thread: it answers between two steps, or not at all if it hangs.

        Raises `EngineDeadError`.
        """
        return await self._across.ask(Engine.snapshot)

    async def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: LoRA = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[TokenOutput]:
        """Every token as it comes. Leaving the iteration (break, cancellation, aclose) aborts the request.

        `lora`: the name of an adapter that is loaded or that a resolver finds, a LoRARequest (loaded on first use), or
        {name: weight}. `priority`: lower is earlier, among the requests of the same adapters: a unit is worth 10 s of
        waiting. Raises `RequestError`, `AdapterError`, or `EngineDeadError` where the engine stops on the way.
        """
        request = await self.prepare(prompt, sampling_params, lora=lora, request_id=request_id, priority=priority)
        async with contextlib.aclosing(self.run([self._assembler(request)])) as bursts:
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
        priority: int = 0,
    ) -> RequestOutput:
        """The whole answer. Cancelling aborts the request."""
        request = await self.prepare(prompt, sampling_params, lora=lora, request_id=request_id, priority=priority)
        assembler = self._assembler(request)
        async for _ in self.run([assembler]):
            pass
        return assembler.output()

    async def settle(
        self, lora: LoRA = None, *, modalities: Collection[str] = (), permits: Callable[[str], bool] | None = None
    ) -> Settled:
        """The adapters that `lora` means now, loaded. What is worded for them and prepared is answered by them.

        `modalities`: what the prompt brings besides text, for which an adapter may answer by default where `lora` names
        none. `permits`: which may; None: all of `default_mm_loras`. Raises `RequestError` and `AdapterError`.
        """
        self._alive()
        lora = self.intake.default(lora, modalities, permits)
        parts = self.intake.parts(lora)
        with contextlib.ExitStack() as held:  # removed or replaced, they still serve who has this, run soon or late
            found = [(self._hold(await self._adapters.version(part), held), weight) for part, weight in parts]
            settled = self.intake.settled(found, lora)
            if found:
                weakref.finalize(settled, held.pop_all().close).atexit = False
        return settled

    async def prepare(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: LoRA | Settled = None,
        request_id: str | None = None,
        priority: int = 0,
        owner: str | None = None,
    ) -> Request:
        """The checked request, its adapters loaded, not yet running: what can be wrong is raised here.

        `lora`: as for `stream`, or what `settle` made of it. `owner`: whose grammars are compiled one after another and
        whose files behind URLs are fetched in their order; None: those of the requests with the same adapter.
        """
        self._alive()
        media, long = self.intake.media, takes_long(prompt)
        if not isinstance(lora, Settled):
            lora = await self.settle(lora, modalities=await beside(long, media.modalities_in, prompt))
        self.intake.policies.check(lora.mix)
        split = await beside(long, media.split, prompt, lora.tokenizer)
        owner = owner or _line_of(lora.mix)
        work = partial(
            self.intake.request,
            params=sampling_params,
            settled=lora,
            grammar=await self._parts.grammars.take(sampling_params, owner),
            request_id=request_id,
            priority=priority,
        )
        if not split.given:
            return await beside(long, work, split)
        async with media.fetched(split, owner) as fetched, self._media_readers:
            return await to_its_end(work, fetched)

    def run(self, assemblers: Sequence[Assembler]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
        """Run prepared requests side by side; each time, every token that has come, with its request's position.

        Leaving the iteration aborts what is unfinished. One request that fails ends them all with its error.
        """
        self._alive()
        return self._streaming.run(assemblers)

    def abort(self, request_id: str) -> None:
        """End a request: its stream simply ends, its answers with "abort". Unknown ids are fine."""
        if self._streams is not None:
            self._streams.abort(request_id)

    async def add_lora(
        self,
        lora: LoRARequest | str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: AnyConfig | None = None,
        load_inplace: bool = False,
        policy: AdapterPolicy | None = None,
    ) -> AdapterVersion:
        """Load an adapter, or find it loaded. Raises `AdapterError`; a failed load changes nothing.

        With a name for `lora`, from memory: `tensors` under the names that PEFT saves, on any device, and `config` as
        in adapter_config.json, or a `peft.LoraConfig`. They are copied. `load_inplace` replaces what the name stands
        for; requests under way finish on the old version. `policy`: as `set_lora_policy`, once it is loaded.
        """
        self._alive()
        if isinstance(lora, LoRARequest):
            self.intake.parts(lora)
            version = await self._adapters.version(lora)
        else:
            source = in_memory(lora, tensors, config)
            self.intake.parts(lora)
            version = await self._adapters.add(source, replace=load_inplace)
        if policy is not None:
            self._naming.allow(version.name, policy)
        return version

    async def announce_lora(self, lora: LoRARequest, *, policy: AdapterPolicy | None = None) -> None:
        """Make the name of an adapter known, to be read when it is first asked for: thousands cost a start little.

        Its config and the header of its tensors are checked now; its digest, and values that are not finite, come to
        light at the first read. Raises `AdapterError`; what is known from the same place already stays as it is.
        `policy`: as `set_lora_policy`, once it is known.
        """
        self._alive()
        await self._adapters.announce(lora)
        if policy is not None:
            self._naming.allow(lora.lora_name, policy)

    async def resolve_lora(self, lora_name: str) -> bool:
        """Read the adapter that was announced, or that a resolver finds, for a name.

        True: it is loaded, or was before. False: nobody knows it. Resolvers are asked only with
        `AIOLORA_ALLOW_RUNTIME_LORA_UPDATING`. Raises `AdapterError`.
        """
        self._alive()
        return await self._adapters.resolve(lora_name)

    async def remove_lora(self, lora: str | int, *, force: bool = False) -> bool:
        """Forget an adapter, by name or `lora_int_id`, or an alias. False: it was not known.

        Requests under way finish, and what it takes is free after the last; `force`: they end with "abort". Raises
        `AdapterConflictError` where it has aliases; `force` removes those, too.
        """
        self._alive()
        return self._naming.remove(lora, force=force)

    async def rollback_lora(self, lora: str | int, digest: str | None = None) -> AdapterVersion:
        """Let a name stand again for what it stood for before it was replaced last, which becomes what it was before.

        One version a name is kept, in host memory while nobody else needs the room, and is read again where its source
        still holds it. `digest`, or its beginning: roll back to that version or not at all. Requests under way finish
        on what they began with. Raises `UnknownModelError`, `AdapterNotFoundError` where there is no such version, and
        `AdapterChangedError` where its source holds something else by now; nothing has changed then.
        """
        self._alive()
        return await self._adapters.roll_back(lora, digest)

    async def alias_lora(self, alias: str, lora: str | int) -> None:
        """`alias` is another name of an adapter from now on, also of what replaces it; it may have been another's.

        `remove_lora(alias)` ends it. Raises `UnknownModelError`, and `AdapterConflictError` where `alias` is the name
        of a model or adapter.
        """
        self._alive()
        self.intake.registry.alias(alias, lora)

    async def set_lora_policy(self, lora: str | int, policy: AdapterPolicy) -> None:
        """What an adapter may take from now on: a weight in the turns, answers at a time, tokens a minute.

        It belongs to the name: a reload keeps it, `remove_lora` ends it. Raises `UnknownModelError`.
        """
        self._alive()
        self._naming.allow(lora, policy)

    async def pin_lora(self, lora: str | int) -> None:
        """Keep an adapter, by name, alias or `lora_int_id`, in host memory and, once it is there, on the device.

        One that was announced is read for it. Until `unpin_lora` or `remove_lora`; a version that replaces it takes the
        pin over. Raises `UnknownModelError`, and `AdapterMemoryError` where what is left beside all pinned ones would
        hold no adapter of `max_lora_rank`.
        """
        version = await self._adapters.version(self.intake.registry.name(lora))
        await self._across.ask(lambda engine: engine.adapters.pin(version))

    async def unpin_lora(self, lora: str | int) -> None:
        """It may be evicted again. Not pinned: nothing. Raises `UnknownModelError`."""
        version = self.intake.registry.look_up(self.intake.registry.name(lora))
        if isinstance(version, AdapterVersion):  # what was never read is not pinned
            await self._across.ask(lambda engine: engine.adapters.unpin(version))

    async def lora_standing(self) -> list[AdapterStanding]:
        """Where every loaded adapter is and who needs it; at the end those removed that requests still run with."""
        registry = self.intake.registry
        versions, earlier = registry.versions(), registry.earlier_versions()
        return await self._across.ask(lambda engine: engine.adapters.standing(versions, earlier))

    async def list_loras(self) -> list[AdapterVersion]:
        """Loaded adapters in the order they came."""
        return self.intake.registry.versions()

    def reserve(self, name: str) -> None:
        """`name` means the base model too: no adapter may have it. Raises `AdapterConflictError` where one has."""
        self.intake.registry.reserve(name)

    def _hold(self, version: AdapterVersion, held: contextlib.ExitStack) -> AdapterVersion:
        """`version`, kept from now on until `held` is closed, by whatever thread."""
        self._across.post(lambda engine: engine.adapters.hold(version))
        held.callback(self._across.post, lambda engine: engine.adapters.let_go(version))
        return version

    def _assembler(self, request: Request) -> Assembler:
        return Assembler(request, self.intake.tokenizers.of(request.mix))

    @property
    def _parts(self) -> Built:
        if self._built is None:
            raise EngineDeadError("the engine is not started; use `async with engine:` or `await engine.start()`")
        return self._built

    @property
    def _across(self) -> Bridge:
        assert self._bridge is not None, "started engines have it"
        return self._bridge

    @property
    def _naming(self) -> Names:
        assert self._names is not None, "started engines have it"
        return self._names

    @property
    def _streaming(self) -> Streams:
        assert self._streams is not None, "started engines have it"
        return self._streams

    @property
    def _adapters(self) -> Loading:
        assert self._loading is not None, "started engines have it"
        return self._loading

    def _alive(self) -> None:
        assert self._parts is not None
        self._across.check()

    def _deliver(self, deltas: list[TokenDelta], snapshot: Snapshot) -> None:
        """On the loop, once a step."""
        self._snapshot = snapshot
        self._streaming.deliver(deltas)

    def _fail(self, error: BaseException) -> None:
        """On the loop: the engine has stopped."""
        self._streaming.fail(error)

    def _read_again(self, version: AdapterVersion) -> None:
        """On the engine thread."""
        self._across.to_loop(lambda: self._adapters.read_again(version))


def _line_of(mix: Mix | None) -> str:
    """Whose grammars and files those are that nobody else is known to own."""
    return "base" if mix is None else f"adapter {mix.versions[0].name}"
