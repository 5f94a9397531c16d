"""The OpenAI API under /ai of a FastAPI app, and a route of its own on the same engine.

uvicorn examples.embedding.fastapi_app:app
curl http://localhost:8000/ai/v1/models
curl "http://localhost:8000/pirate?question=Tell%20me%20about%20a%20cat."
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams
from aiolora.api import create_app

engine = AsyncLLMEngine.from_engine_args(EngineArgs(model="smollm2-135m", enable_lora=True))
api = create_app(engine, lora_modules=[LoRARequest("pirate", 1, "examples/adapters/pirate")])


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine, api.lifespan():  # a mounted app has no life of its own
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/pirate")
async def pirate(question: str) -> StreamingResponse:
    async def text() -> AsyncIterator[str]:
        messages = [{"role": "user", "content": question}]
        async for token in engine.stream(messages, SamplingParams(temperature=0, max_tokens=32), lora="pirate"):
            yield token.text

    return StreamingResponse(text(), media_type="text/plain")


app.mount("/ai", api)
