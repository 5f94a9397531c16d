"""The server as an ASGI app: run it with uvicorn, or mount it in an app of your own."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig

import aiolora
from aiolora.api.adapters import change_lora_adapter, load_lora_adapter, lora_adapters, unload_lora_adapter
from aiolora.api.chat import chat_completions
from aiolora.api.completions import completions
from aiolora.api.embeddings import embeddings
from aiolora.api.errors import answer_error, answer_http_error
from aiolora.api.models import model, models
from aiolora.api.responses import responses
from aiolora.api.serving import Serving
from aiolora.api.system import health, version
from aiolora.api.tokenize import detokenize, tokenize
from aiolora.config import Environment
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.errors import ConfigError
from aiolora.types import LoRARequest

_MAX_BODY = 4 << 20  # bytes: a context of 256k tokens, as ids


def create_app(
    engine: AsyncLLMEngine, *, lora_modules: Sequence[LoRARequest] = (), served_model_name: str | None = None
) -> Litestar:
    """The OpenAI API over `engine`, whose base model is served as `served_model_name` (default: the engine's `model`).

    An engine that is not started is started with the app and stopped with it; one that the host has started stays the
    host's. `lora_modules` are checked at the start and read when first asked for (`announce_lora`). Raises
    `ConfigError` where one has the base's name.

    AIOLORA_ALLOW_RUNTIME_LORA_UPDATING and AIOLORA_ALLOW_HUB_ADAPTERS are read here, once.
    """
    environment = Environment.read()
    serving = Serving(engine, served_model_name or engine.args.model)
    if any(module.lora_name == serving.base for module in lora_modules):
        raise ConfigError(f"lora_modules: {serving.base!r} is the name of the base model; choose another")

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        own = not engine.started
        try:
            await engine.start()
            engine.reserve(serving.base)
            for module in lora_modules:
                await engine.announce_lora(module)
            serving.since = time.time()
            yield
        finally:
            if own:
                await engine.stop()

    return Litestar(
        route_handlers=[
            chat_completions,
            completions,
            responses,
            embeddings,
            tokenize,
            detokenize,
            models,
            model,
            load_lora_adapter,
            unload_lora_adapter,
            lora_adapters,
            change_lora_adapter,
            health,
            version,
        ],
        dependencies={
            "serving": Provide(lambda: serving, use_cache=True, sync_to_thread=False),
            "environment": Provide(lambda: environment, use_cache=True, sync_to_thread=False),
        },
        exception_handlers={HTTPException: answer_http_error, Exception: answer_error},
        lifespan=[lifespan],
        openapi_config=OpenAPIConfig(title="aiolora", version=aiolora.__version__, path="/docs"),
        request_max_body_size=_MAX_BODY,
        logging_config=None,
    )
