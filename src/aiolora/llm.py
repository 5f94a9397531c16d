"""The blocking faces: LLM for batches, LLMEngine for those who step it themselves."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from anyio.from_thread import start_blocking_portal
from torch import Tensor

from aiolora.config import EngineArgs, Environment
from aiolora.engine.adapters import AdapterStanding
from aiolora.engine.build import READERS, Built, build
from aiolora.engine.core import Snapshot
from aiolora.engine.intake import LoRA, Settled
from aiolora.engine.interpreter import INTERPRETER
from aiolora.engine.names import Names, not_held
from aiolora.engine.output import Assembler
from aiolora.errors import AdapterFormatError, AioloraError, RequestError
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.memory import AnyConfig, in_memory
from aiolora.lora.resolvers import choose_resolvers
from aiolora.lora.resolving import Resolving
from aiolora.types import (
    AdapterPolicy,
    AdapterVersion,
    Conversation,
    LoRARequest,
    Messages,
    Prompt,
    RequestOutput,
    SamplingParams,
    read_again,
)


class LLMEngine:
    """Requests in by `add_request`, outputs out by `step`. For one thread.

    An adapter is read in the call that names it first, unless `read_ahead` did; an evicted one while steps go on.
    """

    def __init__(self, args: EngineArgs) -> None:
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="aiolora-read")
        self._ahead: dict[LoRARequest, Future[AdapterWeights]] = {}
        self._again: dict[AdapterVersion, Future[AdapterWeights]] = {}
        self._resolved: list[LoRARequest] = []  # what a resolver gave and is still to be loaded
        self._resolving = self._resolvers(args)
        self._built: Built = build(args, self._read_again)
        self._engine = self._built.engine
        self._intake = self._built.intake
        self._names = Names(self._intake, lambda message: message(self._engine))
        self._assemblers: dict[str, Assembler] = {}
        self._failures: dict[str, AioloraError] = {}  # request id -> what is still to be raised

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """Load the model; blocks."""
        return cls(engine_args)

    def add_request(
        self,
        request_id: str,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        lora_request: LoRA = None,
        *,
        priority: int = 0,
    ) -> None:
        """Queue a request; `priority` as in `AsyncLLMEngine.stream`.

        Raises `RequestError` or `AdapterError`; nothing is queued then.
        """
        if request_id in self._assemblers:
            raise RequestError(f"request_id {request_id!r} is in use; give each request its own", param="request_id")
        media = self._intake.media
        settled = self._settled(self._intake.default(lora_request, media.modalities_in(prompt)))
        self._intake.policies.check(settled.mix)
        split = media.split(prompt, settled.tokenizer)
        grammar = self._built.grammars.wait(params)
        with contextlib.ExitStack() as fetched:
            if split.urls:
                portal = fetched.enter_context(start_blocking_portal())
                split = fetched.enter_context(portal.wrap_async_context_manager(media.fetched(split, "")))
            request = self._intake.request(
                split, params, settled, grammar=grammar, request_id=request_id, priority=priority
            )
        self._assemblers[request_id] = Assembler(request, settled.tokenizer)
        self._engine.add(request)
        self._intake.policies.charge(settled.mix, len(request.prompt_token_ids))

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has still something to bring."""
        return bool(self._assemblers or self._failures)

    def step(self) -> list[RequestOutput]:
        """One step of the engine: the requests that it brought further, finished ones included.

        A request that fails (an adapter that changed on disk, logits that are not finite) is ended and its error
        raised, by a call that brings nothing else; calling `step` again goes on with the others.
        """
        return [assembler.output() for assembler in self.advance()]

    def advance(self) -> list[Assembler]:
        """`step` without the outputs, which copy a request's tokens: `output()` of an assembler makes one.

        Raises as `step` does.
        """
        if self._failures:
            raise self._failures.pop(next(iter(self._failures)))
        self._take_again()
        touched: dict[str, Assembler] = {}
        for delta in self._engine.step():
            assembler = self._assemblers.get(delta.request_id)
            if assembler is None:
                continue
            try:
                output = assembler.feed(delta)
            except AioloraError as error:
                self._drop(delta.request_id)
                self._failures[delta.request_id] = error
                touched.pop(delta.request_id, None)
                continue
            touched[delta.request_id] = assembler
            if output is not None:
                self._intake.policies.charge(assembler.request.mix, 1)
            if output is not None and output.finish_reason is not None and delta.finish_reason is None:
                self._engine.abort(delta.request_id, delta.index)  # a stop string, which only text can show
        for request_id, assembler in touched.items():
            if assembler.finished:
                self._assemblers.pop(request_id, None)
        if self._failures and not touched:
            raise self._failures.pop(next(iter(self._failures)))
        return list(touched.values())

    def abort_request(self, request_id: str) -> None:
        """End a request; unknown ones are fine."""
        self._drop(request_id)

    def add_lora(
        self,
        lora: LoRARequest | str,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        config: AnyConfig | None = None,
        load_inplace: bool = False,
        policy: AdapterPolicy | None = None,
    ) -> AdapterVersion:
        """Load an adapter, or find it loaded: as `AsyncLLMEngine.add_lora`, also from memory. Raises `AdapterError`."""
        if isinstance(lora, LoRARequest):
            version = self._version(lora)
        else:
            source = in_memory(lora, tensors, config)
            self._intake.parts(lora)
            number = self._intake.registry.number(lora)
            self._intake.registry.check(lora, number)
            version = self._names.publish(self._built.load(source), number, replace=load_inplace)
        if policy is not None:
            self.set_lora_policy(version.name, policy)
        return version

    def resolve_lora(self, lora_name: str) -> bool:
        """Read what was announced, or what a resolver finds, for a name: as `AsyncLLMEngine.resolve_lora`. Blocks.

        Resolvers run on a loop of their own, which lives as long as the call.
        """
        announced = self._intake.registry.announced(lora_name)
        if announced is not None:
            self._version(announced.request)
        if self._intake.registry.knows(lora_name):
            return True
        if self._resolving is None:
            return False
        with start_blocking_portal() as portal:
            found = portal.call(self._resolving.resolve, lora_name)
        while self._resolved:
            self._version(self._resolved.pop())
        return found

    def announce_lora(self, lora: LoRARequest, *, policy: AdapterPolicy | None = None) -> None:
        """Make a name known, to be read when it is first asked for: as `AsyncLLMEngine.announce_lora`."""
        self._intake.parts(lora)
        if self._intake.registry.match(lora) is None:
            self._intake.registry.announce(self._built.check(lora))
        if policy is not None:
            self.set_lora_policy(lora.lora_name, policy)

    def remove_lora(self, lora: str | int, *, force: bool = False) -> bool:
        """Forget an adapter, by name or `lora_int_id`, or an alias: as `AsyncLLMEngine.remove_lora`."""
        return self._names.remove(lora, force=force)

    def rollback_lora(self, lora: str | int, digest: str | None = None) -> AdapterVersion:
        """Let a name stand again for what it stood for before: as `AsyncLLMEngine.rollback_lora`."""
        version = self._names.earlier(lora, digest)
        if self._engine.adapters.revive(version):
            return self._names.bring_back(version, None)
        if version.source is None:
            raise not_held(version)
        return self._names.bring_back(version, self._built.load(read_again(version)))

    def alias_lora(self, alias: str, lora: str | int) -> None:
        """`alias` is another name of an adapter from now on: as `AsyncLLMEngine.alias_lora`."""
        self._intake.registry.alias(alias, lora)

    def set_lora_policy(self, lora: str | int, policy: AdapterPolicy) -> None:
        """What an adapter may take from now on: as `AsyncLLMEngine.set_lora_policy`.

        `add_request` raises `AdapterBusyError` where it has used its tokens of the minute.
        """
        self._names.allow(lora, policy)

    def pin_lora(self, lora: str | int) -> None:
        """Never evict it: as `AsyncLLMEngine.pin_lora`. Raises `UnknownModelError` and `AdapterMemoryError`."""
        self._engine.adapters.pin(self._version(self._intake.registry.name(lora)))

    def unpin_lora(self, lora: str | int) -> None:
        """It may be evicted again. Not pinned: nothing. Raises `UnknownModelError`."""
        version = self._intake.registry.look_up(self._intake.registry.name(lora))
        if isinstance(version, AdapterVersion):  # what was never read is not pinned
            self._engine.adapters.unpin(version)

    def lora_standing(self) -> list[AdapterStanding]:
        """Where every loaded adapter is and who needs it; at the end those removed that requests still run with."""
        registry = self._intake.registry
        return self._engine.adapters.standing(registry.versions(), registry.earlier_versions())

    @contextlib.contextmanager
    def read_ahead(self, loras: Iterable[LoRA]) -> Iterator[None]:
        """Read adapters that requests of this block will name, several at a time; what is wrong, those will raise."""
        for lora in loras:
            with contextlib.suppress(AioloraError):
                for part, _ in self._intake.parts(lora):
                    if isinstance(part, str) or part in self._ahead:
                        continue
                    if self._intake.registry.match(part) is None:
                        self._ahead[part] = self._readers.submit(self._built.load, part)
        try:
            yield
        finally:
            for read in self._ahead.values():
                read.cancel()
            self._ahead.clear()

    def busy_without(self, lora: LoRA) -> bool:
        """Whether an adapter that `lora` names is still read ahead, and requests under way have all slots meanwhile."""
        with contextlib.suppress(AioloraError):  # adding the request will raise it
            ahead = [self._ahead.get(part) for part, _ in self._intake.parts(lora) if isinstance(part, LoRARequest)]
            if any(read is not None and not read.done() for read in ahead):
                return len(set(self._engine.mixes())) >= self._engine.scheduler.limits.max_loras
        return False

    def list_loras(self) -> list[AdapterVersion]:
        """Loaded adapters in the order they came."""
        return self._intake.registry.versions()

    def snapshot(self) -> Snapshot:
        """Counts for those who watch."""
        return self._engine.snapshot()

    def _resolvers(self, args: EngineArgs) -> Resolving | None:
        """None: unknown names stay unknown."""
        environment = Environment.read()
        if not (environment.runtime_lora_updating and args.enable_lora):
            return None

        async def keep(found: LoRARequest) -> None:
            self._resolved.append(found)

        return Resolving(args.model, choose_resolvers(environment), keep, timeout_s=environment.resolver_timeout_s)

    def _drop(self, request_id: str) -> None:
        self._engine.abort(request_id)
        self._assemblers.pop(request_id, None)
        self._failures.pop(request_id, None)

    def _settled(self, lora: LoRA) -> Settled:
        parts = self._intake.parts(lora)
        return self._intake.settled([(self._version(part), weight) for part, weight in parts], lora)

    def _version(self, lora: str | LoRARequest) -> AdapterVersion:
        registry = self._intake.registry
        if isinstance(lora, str):
            self.resolve_lora(lora)
            return registry.find(lora)
        known = registry.match(lora)
        if known is not None:
            return known
        self._intake.parts(lora)  # refuses where LoRA is off
        ahead = self._ahead.pop(lora, None)
        weights = self._built.load(lora) if ahead is None else ahead.result()
        return self._names.publish(weights, lora.lora_int_id, replace=lora.load_inplace)

    def _read_again(self, version: AdapterVersion) -> None:
        self._again[version] = self._readers.submit(self._built.load, read_again(version))

    def _take_again(self) -> None:
        """Hand over what was read again; wait for it where there is nothing else to do."""
        if not self._again:
            return
        wait(self._again.values(), timeout=None if self._engine.stalled else 0, return_when=FIRST_COMPLETED)
        for version in [version for version, read in self._again.items() if read.done()]:
            try:
                weights = self._again.pop(version).result()
            except Exception as error:
                known = error if isinstance(error, AioloraError) else None
                failure = known or AdapterFormatError(version.name, f"could not be read again: {error!r}")
                self._engine.adapters.failed(version, failure)
            else:
                self._engine.adapters.landed(version, weights)


class LLM:
    """Prompts in, answers out; all of a call run together in one batch."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        """`engine_args`: the other fields of `EngineArgs`. Loads the model; blocks."""
        self._engine = LLMEngine(EngineArgs(model=model, **engine_args))
        self._number = 0

    @property
    def engine(self) -> LLMEngine:
        """The engine inside."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRA | Sequence[LoRA] = None,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """An output a prompt, in order.

        `sampling_params`, `lora_request` and `priority`: one for all, or a list of equal length. In a list of adapters
        None means the base model. `use_tqdm` shows a progress bar on a terminal.
        """
        several: list[Prompt | Messages] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item,arg-type]
        return self._run(several, sampling_params, lora_request, priority, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: LoRA | Sequence[LoRA] = None,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The same for one conversation or a list of them, through the model's chat template."""
        several = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return self._run(several, sampling_params, lora_request, priority, use_tqdm)  # type: ignore[arg-type]

    def _run(
        self,
        prompts: list[Prompt | Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: LoRA | Sequence[LoRA],
        priority: int | Sequence[int],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _spread("sampling_params", sampling_params, len(prompts))
        loras = _spread("lora_request", lora_request, len(prompts))
        priorities = _spread("priority", priority, len(prompts))
        from rich.progress import Progress  # fifty modules, which no start needs

        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        with INTERPRETER.call(), Progress(transient=True, disable=not use_tqdm) as progress:
            task = progress.add_task("prompts", total=len(prompts))

            def step() -> None:
                for assembler in self._engine.advance():
                    if assembler.finished:
                        done[assembler.request.id] = assembler.output()
                        progress.advance(task)

            try:
                with self._engine.read_ahead(loras):
                    for prompt, one_params, lora, rank in zip(prompts, params, loras, priorities):
                        while self._engine.busy_without(lora):
                            step()
                        request_id = str(self._number)
                        self._number += 1
                        self._engine.add_request(request_id, prompt, one_params, lora_request=lora, priority=rank)
                        ids.append(request_id)
                while self._engine.has_unfinished_requests():
                    step()
            except BaseException:
                for request_id in ids:
                    self._engine.abort_request(request_id)
                raise
        return [done[request_id] for request_id in ids]


def _is_one(prompts: object) -> bool:
    """A string, a mapping, a conversation or a list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping, Conversation)):
        return True
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for all, or a list with one each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} items for {count} prompts; give one, or one each", param=name)
    return list(value)
