"""The way of a request through the server, the same for completions and chat: name -> engine -> a body or a stream."""

import asyncio
import copy
import string
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import quote

from litestar import Response
from litestar.di import NamedDependency
from msgspec import Struct

from aiolora.api.errors import ErrorBody, HTTPRequest, describe, naming
from aiolora.api.metrics import Count, Meter
from aiolora.api.sse import EventStream, Write
from aiolora.api.visits import Visit, visit_of
from aiolora.api.wire import GenerationRequest
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.beside import beside
from aiolora.engine.intake import Settled
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError, UnknownModelError
from aiolora.lora.registry import nearest
from aiolora.types import Messages, Prompt, SamplingParams, TokenOutput

if TYPE_CHECKING:
    from aiolora.api.tracing import Tracing  # of an extra


class Reply(Protocol):
    """How a route words what its requests bring: frames of a stream, or a body.

    `position` is that of the prompt among the request's prompts.
    """

    def opening(self) -> bytes:
        """Frames before the first token."""
        ...

    def token(self, position: int, output: TokenOutput) -> bytes:
        """Frames for one token."""
        ...

    def closing(self) -> bytes:
        """Frames after the last token."""
        ...

    def failed(self, error: ErrorBody) -> bytes:
        """The last frame of a stream that fails."""
        ...

    def whole(self) -> Struct:
        """The body where nothing is streamed."""
        ...


class Serving:
    """The engine behind the routes, as one visitor may see it. Owned by the loop."""

    def __init__(self, engine: AsyncLLMEngine, base: str, meter: Meter, tracing: "Tracing | None" = None) -> None:
        self.engine = engine
        self.base = base  # the name under which the base model is served
        self.meter = meter
        self._tracing = tracing
        self.since = time.time()  # when it began to serve
        self._visit: Visit | None = None  # None: of nobody in particular, who sees nothing

    def to(self, request: HTTPRequest) -> "Serving":
        """What the sender of `request` may see of it."""
        view = copy.copy(self)
        view._visit = visit_of(request.scope)
        return view

    @property
    def owner(self) -> str | None:
        """Who the visitor is, by their key; None: nobody needs one."""
        caller = None if self._visit is None else self._visit.caller
        return caller.key or None if caller is not None else None

    def permits(self, adapter: str) -> bool:
        """Whether the visitor may use what has this name; what they may not use does not exist for them."""
        caller = None if self._visit is None else self._visit.caller
        return caller is not None and caller.may_use(adapter)

    def _may_ask_for(self, model: str) -> bool:
        """As `permits`, where `model` may be an alias: who may use an adapter may use it by every name."""
        name = self.engine.intake.registry.named(model)
        return self.permits(model) or (name is not None and self.permits(name))

    def _sees(self, model: str) -> bool:
        return model == self.base or self._may_ask_for(model)

    def names(self) -> list[str]:
        """What the visitor may name beside the base: adapters in the order they came, then aliases."""
        return [name for name in self.engine.intake.registry.names() if self._may_ask_for(name)]

    def adapter(self, model: str) -> str | None:
        """The adapter that `model` names; None: the base. Raises `UnknownModelError` with the nearest known name.

        An alias is taken for its adapter at once: it could be another's, and forbidden, before the request is made. One
        that is itself what the visitor may use stays what it is.
        """
        if model == self.base:
            return None
        name = self.engine.intake.registry.named(model)
        if name is not None and self.permits(name):
            return name
        if name is not None and self.permits(model):
            return model
        raise self._unknown([model])

    async def find(self, model: str) -> str | None:
        """`adapter`, read or looked for by resolvers where it is not loaded. Raises `AdapterError` too."""
        if model != self.base and self._may_ask_for(model):
            await self.engine.resolve_lora(model)
        return self.adapter(model)

    async def lora(self, said: GenerationRequest) -> str | dict[str, float] | None:
        """The adapters of a request, all of them loaded. Raises `RequestError`, and as `find`."""
        if said.lora is None:
            return await self.find(said.model)
        with naming(model="lora"):
            return await self._weighted(said.model, said.lora)

    async def settle(self, said: GenerationRequest, modalities: Collection[str] = ()) -> Settled:
        """Which adapters answer a request whose prompts bring `modalities`. Raises as `lora`."""
        lora = await self.lora(said)
        with naming(model="model" if said.lora is None else "lora"):
            return await self._settled(lora, [said.model] if said.lora is None else said.lora, modalities)

    async def settle_model(self, model: str | None) -> Settled:
        """The same for a text to `model`; None: the base. Raises as `find`."""
        return await self._settled(None if model is None else await self.find(model), [model or self.base])

    async def _settled(
        self, lora: str | dict[str, float] | None, asked: Iterable[str], modalities: Collection[str] = ()
    ) -> Settled:
        try:
            return await self.engine.settle(lora, modalities=modalities, permits=self.permits)
        except UnknownModelError:  # removed just now; the engine's words may tell of what does not exist here
            raise self._unknown(asked) from None

    async def prepare(
        self,
        answer_id: str,
        said: GenerationRequest,
        settled: Settled,
        prompts: Iterable[Prompt | Messages],
        params: SamplingParams,
    ) -> list[Assembler]:
        """A request a prompt, checked but not yet running: what a client can get wrong is raised here."""
        assemblers = []
        for position, prompt in enumerate(prompts):
            if position:
                await asyncio.sleep(0)  # others' tokens in between, however many prompts there are
            request = await self.engine.prepare(
                prompt,
                params,
                lora=settled,
                priority=said.priority or 0,
                request_id=f"{answer_id}-{position}",
                owner=self.owner,
            )
            assemblers.append(Assembler(request, settled.tokenizer))
        return assemblers

    async def _weighted(self, model: str, lora: dict[str, float]) -> dict[str, float]:
        """`lora` by the names of its adapters: every name in it is that of one, and `model` that of the base."""
        if model != self.base:
            raise RequestError(f"lora goes with the base model: set model to {self.base!r}", param="lora")
        self.engine.intake.parts(lora)  # before any of them is looked for
        weights: dict[str, float] = {}
        for name, weight in lora.items():
            adapter = await self.find(name)
            if adapter is None:
                raise RequestError(f"lora: {name!r} is the base model, no adapter", param="lora")
            weights[adapter] = weights.get(adapter, 0.0) + weight
        return weights

    def _unknown(self, models: Iterable[str]) -> UnknownModelError:
        """Of the first that names nothing, in words that tell nothing of what the visitor may not use."""
        asked, names = list(models), self.engine.intake.registry.names()
        served = {self.base, *names}
        model = next((one for one in asked if one not in served or not self._sees(one)), asked[0])
        close = nearest(model, [self.base, *names], self._sees)
        hint = "GET /v1/models lists what is served" if close is None else f"did you mean {close!r}?"
        return UnknownModelError(f"the model {model[:200]!r} does not exist; {hint}")

    @contextmanager
    def _counted(self, assemblers: Sequence[Assembler]) -> Iterator[Count]:
        """What counts the tokens of a run, and tells log and traces of it at its end."""
        mix = assemblers[0].request.mix
        model = "+".join(version.name for version in mix.versions) if mix else self.base
        count, failed = self.meter.begin(model, assemblers), False
        try:
            yield count
        except Exception:
            failed = True
            raise
        finally:
            count.end(failed=failed)
            if self._visit is not None:
                self._visit.answered_by(model, count.prompt_tokens, count.generated_tokens)
                if self._tracing is not None:
                    self._tracing.record(self._visit, model, assemblers, failed=failed)

    async def respond(self, assemblers: Sequence[Assembler], reply: Reply, *, stream: bool) -> Response[Any]:
        """Run what was prepared, and answer in `reply`'s words. Cancelling ends the run."""
        headers = _adapter_header(assemblers)
        if stream:
            return EventStream(partial(self._stream, assemblers, reply), headers)
        await self._run(assemblers)
        scored = any(one.request.params.logprobs is not None or _scores_prompt(one) for one in assemblers)
        return Response(await beside(scored, reply.whole), headers=headers)

    async def _run(self, assemblers: Sequence[Assembler]) -> None:
        with self._counted(assemblers) as count:
            async with aclosing(self.engine.run(assemblers)) as bursts:
                async for burst in bursts:
                    count.take(burst)

    async def _stream(self, assemblers: Sequence[Assembler], reply: Reply, write: Write) -> None:
        """Everything that is ready in one write; an error, now that the status is sent, as the last frame."""

        def worded(burst: list[tuple[int, TokenOutput]]) -> bytes:
            return b"".join([reply.token(position, output) for position, output in burst])

        scored = _scores_prompt(assemblers[0])
        begun: set[tuple[int, int]] = set()  # choices whose prompt's scores have been worded

        def begins(burst: list[tuple[int, TokenOutput]]) -> bool:
            choices = {(position, output.index) for position, output in burst} - begun
            begun.update(choices)
            return bool(choices)

        try:
            await write(reply.opening())
            with self._counted(assemblers) as count:
                async with aclosing(self.engine.run(assemblers)) as bursts:
                    async for burst in bursts:
                        count.take(burst)
                        await write(await beside(scored and begins(burst), worded, burst))
            await write(reply.closing())
        except Exception as error:
            await write(reply.failed(describe(error)[1]))


Served: TypeAlias = NamedDependency[Serving]  # how a route asks for it


def _scores_prompt(assembler: Assembler) -> bool:
    """Whether the answer brings scores of all of its prompt: a quarter of a million of them takes long to word."""
    return assembler.request.params.prompt_logprobs is not None


def _adapter_header(assemblers: Sequence[Assembler]) -> dict[str, str]:
    """NAME@DIGEST12 of the adapter that answers; a header takes ASCII only."""
    mix = assemblers[0].request.mix
    if mix is None:
        return {}
    label = "+".join(version.label for version in mix.versions)
    return {"x-aiolora-adapter": quote(label, safe=string.punctuation)}
