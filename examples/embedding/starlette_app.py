"""The OpenAI API under /ai of a Starlette app, and a route of its own on the same engine.

uvicorn examples.embedding.starlette_app:app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Mount, Route

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams
from aiolora.api import create_app

engine = AsyncLLMEngine.from_engine_args(EngineArgs(model="smollm2-135m", enable_lora=True))
api = create_app(engine, lora_modules=[LoRARequest("pirate", 1, "examples/adapters/pirate")])


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with engine, api.lifespan():  # a mounted app has no life of its own
        yield


async def pirate(request: Request) -> StreamingResponse:
    async def text() -> AsyncIterator[str]:
        messages = [{"role": "user", "content": request.query_params["question"]}]
        async for token in engine.stream(messages, SamplingParams(temperature=0, max_tokens=32), lora="pirate"):
            yield token.text

    return StreamingResponse(text(), media_type="text/plain")


app = Starlette(routes=[Route("/pirate", pirate), Mount("/ai", app=api)], lifespan=lifespan)
