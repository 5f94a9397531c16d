"""The way of a request through the server, the same for completions and chat: name -> engine -> a body or a stream."""

import asyncio
import difflib
import string
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

from litestar import Response
from litestar.di import NamedDependency
from msgspec import Struct

from aiolora.api.errors import ErrorBody, HTTPRequest, describe, naming
from aiolora.api.sse import EventStream, Framing
from aiolora.api.wire import GenerationRequest
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError, UnknownModelError
from aiolora.tokenizer import Tokenizer
from aiolora.types import Messages, Mix, Prompt, SamplingParams, TokenOutput

_CLIENT_CLOSED = 499  # nginx's word for it; nobody is left to read it


class Reply(Protocol):
    """How a route words what its requests bring. `position` is that of the prompt among the request's prompts."""

    framing: Framing

    def opening(self) -> Iterable[Struct]:
        """Chunks before the first token."""
        ...

    def token(self, position: int, output: TokenOutput) -> Iterable[Struct]:
        """Chunks for one token."""
        ...

    def closing(self) -> Iterable[Struct]:
        """Chunks after the last token."""
        ...

    def failed(self, error: ErrorBody) -> Struct:
        """The last chunk of a stream that fails."""
        ...

    def whole(self) -> Struct:
        """The body where nothing is streamed."""
        ...


class Serving:
    """The engine behind the routes, and the name under which its base model is served. Owned by the loop."""

    def __init__(self, engine: AsyncLLMEngine, base: str) -> None:
        self.engine = engine
        self.base = base
        self.since = time.time()  # when it began to serve

    def adapter(self, model: str) -> str | None:
        """The adapter that `model` names; None: the base. Raises `UnknownModelError` with the nearest known name."""
        if model == self.base:
            return None
        registry = self.engine.intake.registry
        if registry.named(model) is not None:
            return model
        close = difflib.get_close_matches(model, [self.base, *registry.names()], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "GET /v1/models lists what is served"
        raise UnknownModelError(f"the model {model[:200]!r} does not exist; {hint}")

    async def find(self, model: str) -> str | None:
        """`adapter`, read or looked for by resolvers where it is not loaded. Raises `AdapterError` too."""
        if model != self.base:
            await self.engine.resolve_lora(model)
        return self.adapter(model)

    async def lora(self, said: GenerationRequest) -> str | dict[str, float] | None:
        """The adapters of a request, all of them loaded. Raises `RequestError`, and as `find`."""
        if said.lora is None:
            return await self.find(said.model)
        with naming(model="lora"):
            return await self._weighted(said.model, said.lora)

    def mix(self, lora: str | Iterable[str] | None) -> Mix | None:
        """What those adapters, which are loaded, stand for now. Their weights are left out."""
        names = () if lora is None else (lora,) if isinstance(lora, str) else lora
        registry = self.engine.intake.registry
        return self.engine.intake.mix((registry.find(name), 1.0) for name in names)

    def tokenizer(self, mix: Mix | None) -> Tokenizer:
        """What makes tokens of the prompts of requests with `mix`, and text of their answers."""
        return self.engine.intake.tokenizers.of(mix)

    async def prepare(
        self, answer_id: str, said: GenerationRequest, prompts: Iterable[Prompt | Messages], params: SamplingParams
    ) -> list[Assembler]:
        """A request a prompt, checked but not yet running: what a client can get wrong is raised here."""
        lora = await self.lora(said)
        assemblers = []
        for position, prompt in enumerate(prompts):
            request = await self.engine.prepare(
                prompt, params, lora=lora, priority=said.priority or 0, request_id=f"{answer_id}-{position}"
            )
            assemblers.append(Assembler(request, self.tokenizer(request.mix)))
        return assemblers

    async def _weighted(self, model: str, lora: dict[str, float]) -> dict[str, float]:
        """Every name in `lora` is that of an adapter, and `model` that of the base."""
        if model != self.base:
            raise RequestError(f"lora goes with the base model: set model to {self.base!r}", param="lora")
        self.engine.intake.parts(lora)  # before any of them is looked for
        for name in lora:
            if await self.find(name) is None:
                raise RequestError(f"lora: {name!r} is the base model, no adapter", param="lora")
        return lora

    async def respond(
        self, request: HTTPRequest, assemblers: Sequence[Assembler], reply: Reply, *, stream: bool
    ) -> Response[Any]:
        """Run what was prepared, and answer in `reply`'s words. A client that leaves ends the run."""
        headers = _adapter_header(assemblers)
        if stream:
            return EventStream(self._events(assemblers, reply), headers)
        if not await _finished_before_leaving(request, self._run(assemblers)):
            return Response(None, status_code=_CLIENT_CLOSED)
        return Response(reply.whole(), headers=headers)

    async def _run(self, assemblers: Sequence[Assembler]) -> None:
        async with aclosing(self.engine.run(assemblers)) as bursts:
            async for _ in bursts:
                pass

    async def _events(self, assemblers: Sequence[Assembler], reply: Reply) -> AsyncGenerator[bytes, None]:
        """Everything that is ready in one write; an error, now that the status is sent, as the last frame."""
        frames, last = reply.framing
        try:
            yield frames(reply.opening())
            async with aclosing(self.engine.run(assemblers)) as bursts:
                async for burst in bursts:
                    yield frames(chunk for position, output in burst for chunk in reply.token(position, output))
            yield frames(reply.closing()) + last
        except Exception as error:
            yield frames([reply.failed(describe(error)[1])])


Served: TypeAlias = NamedDependency[Serving]  # how a route asks for it


async def _finished_before_leaving(request: HTTPRequest, work: Coroutine[Any, Any, None]) -> bool:
    """Race `work` with the client: its end, or False when the client has gone and the work was cancelled."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _adapter_header(assemblers: Sequence[Assembler]) -> dict[str, str]:
    """NAME@DIGEST12 of the adapter that answers; a header takes ASCII only."""
    mix = assemblers[0].request.mix
    if mix is None:
        return {}
    label = "+".join(version.label for version in mix.versions)
    return {"x-aiolora-adapter": quote(label, safe=string.punctuation)}
