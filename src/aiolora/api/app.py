"""The server as an ASGI app: run it with uvicorn, or mount it in an app of your own."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio.to_thread
from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import HTTPException

from aiolora.api.access import Guard, Keys
from aiolora.api.adapters import change_lora_adapter, load_lora_adapter, lora_adapters, unload_lora_adapter
from aiolora.api.chat import chat_completions
from aiolora.api.completions import completions
from aiolora.api.document import complete
from aiolora.api.embeddings import embeddings
from aiolora.api.errors import answer_error, answer_http_error
from aiolora.api.metrics import Meter, metrics
from aiolora.api.models import model, models
from aiolora.api.page import openapi, page
from aiolora.api.readiness import Pulse
from aiolora.api.responses import responses
from aiolora.api.serving import Serving
from aiolora.api.system import health, ready, version
from aiolora.api.tokenize import detokenize, tokenize
from aiolora.api.visits import Door
from aiolora.config import Environment, ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.errors import ConfigError, MissingExtraError
from aiolora.types import LoRARequest

if TYPE_CHECKING:
    from aiolora.api.tracing import Tracing

_MAX_BODY = 4 << 20  # bytes: a context of 256k tokens, as ids


def create_app(
    engine: AsyncLLMEngine,
    *,
    lora_modules: Sequence[LoRARequest] = (),
    served_model_name: str | None = None,
    args: ServerArgs | None = None,
) -> Litestar:
    """The OpenAI API over `engine`, whose base model is served as `served_model_name` (default: the engine's `model`).

    An engine that is not started is started with the app and stopped with it; one that the host has started stays the
    host's. `lora_modules` are checked at the start and read when first asked for (`announce_lora`). Raises
    `ConfigError` where one has the base's name.

    Mounted in another app, its lifespan is the host's to enter: `async with app.lifespan():`.

    AIOLORA_ALLOW_RUNTIME_LORA_UPDATING and AIOLORA_ALLOW_HUB_ADAPTERS are read here, once.
    """
    environment, args = Environment.read(), args or ServerArgs()
    base = served_model_name or engine.args.model
    meter = Meter(engine, base, adapter_labels=args.adapter_labels)
    tracing = None if args.otlp_endpoint is None else _tracing(args.otlp_endpoint)
    serving = Serving(engine, base, meter, tracing)
    door, pulse, keys = Door(log=args.access_log), Pulse(engine, args.ready_timeout), Keys(args)
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
            watching = asyncio.ensure_future(pulse.watch())
            yield
            watching.cancel()
        finally:
            if own:
                await engine.stop()
            if tracing is not None:
                await anyio.to_thread.run_sync(tracing.close)

    app = Litestar(
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
            ready,
            metrics,
            page,
            version,
        ],
        dependencies={
            "serving": Provide(serving.to, sync_to_thread=False),
            "environment": Provide(lambda: environment, use_cache=True, sync_to_thread=False),
            "meter": Provide(lambda: meter, use_cache=True, sync_to_thread=False),
            "pulse": Provide(lambda: pulse, use_cache=True, sync_to_thread=False),
            "door": Provide(lambda: door, use_cache=True, sync_to_thread=False),
        },
        guards=[Guard(keys, door)],
        cors_config=CORSConfig(allow_origins=list(args.cors_origin), expose_headers=_EXPOSED)
        if args.cors_origin
        else None,
        exception_handlers={HTTPException: answer_http_error, Exception: answer_error},
        lifespan=[lifespan],
        openapi_config=openapi(),
        request_max_body_size=_MAX_BODY,
        logging_config=None,
    )
    app.asgi_handler = door.before(app.asgi_handler)  # outside everything, so that no answer lacks its id
    app.state[_DOOR] = door
    complete(app, keys)
    return app


def _tracing(endpoint: str) -> "Tracing":
    try:
        from aiolora.api.tracing import Tracing
    except ImportError as error:
        raise MissingExtraError("otlp_endpoint", "otel") from error
    return Tracing(endpoint)


async def drain(app: Litestar, deadline_s: float) -> bool:
    """From now on `app` takes nothing new (503 with Retry-After); True once all that is under way has ended.

    False: some had not when `deadline_s` seconds were over.
    """
    door: Door = app.state[_DOOR]
    door.closed = True
    try:
        async with asyncio.timeout(deadline_s):
            await door.emptied()
    except TimeoutError:
        return False
    return True


_DOOR = "aiolora_door"
_EXPOSED = ["x-request-id", "x-aiolora-adapter", "retry-after"]
