"""The OpenAI API under /ai of a Litestar app, and a route of its own on the same engine.

uvicorn examples.embedding.litestar_app:app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, asgi, get
from litestar.params import FromQuery
from litestar.response import Stream
from litestar.types import Receive, Scope, Send

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams
from aiolora.api import create_app

engine = AsyncLLMEngine.from_engine_args(EngineArgs(model="smollm2-135m", enable_lora=True))
api = create_app(engine, lora_modules=[LoRARequest("pirate", 1, "examples/adapters/pirate")])


@asynccontextmanager
async def lifespan(_: Litestar) -> AsyncIterator[None]:
    async with engine, api.lifespan():  # a mounted app has no life of its own
        yield


@get("/pirate")
async def pirate(question: FromQuery[str]) -> Stream:
    async def text() -> AsyncIterator[str]:
        messages: list[dict[str, object]] = [{"role": "user", "content": question}]
        async for token in engine.stream(messages, SamplingParams(temperature=0, max_tokens=32), lora="pirate"):
            yield token.text

    return Stream(text(), media_type="text/plain")


@asgi("/ai", is_mount=True, copy_scope=True)
async def ai(scope: Scope, receive: Receive, send: Send) -> None:
    await api(scope, receive, send)


app = Litestar([pirate, ai], lifespan=[lifespan])
