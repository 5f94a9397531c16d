"""What operators and probes ask: is it alive, which version is it."""

from typing import TypeAlias

from litestar import HttpMethod, MediaType, Response, get, route
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from msgspec import Struct

import aiolora
from aiolora.api.access import OPEN
from aiolora.api.readiness import Pulse
from aiolora.api.serving import Served
from aiolora.api.visits import Door

_NOT_NOW = {503: ResponseSpec(str, description="No, or why not.", media_type=MediaType.TEXT, generate_examples=False)}

Felt: TypeAlias = NamedDependency[Pulse]
Doorway: TypeAlias = NamedDependency[Door]


class Version(Struct, frozen=True):
    """The version of aiolora."""

    version: str


@route(
    "/health",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    tags=["system"],
    media_type=MediaType.TEXT,
    opt=OPEN,
    responses=_NOT_NOW,
)
async def health(serving: Served) -> Response[str]:
    """Should it be left alone? 503 before the engine has started and once it has stopped: only a restart helps."""
    alive = serving.engine.started and serving.engine.death is None
    return Response("", media_type=MediaType.TEXT, status_code=200 if alive else 503)


@route(
    "/ready",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    tags=["system"],
    media_type=MediaType.TEXT,
    opt=OPEN,
    responses=_NOT_NOW,
)
async def ready(pulse: Felt, door: Doorway) -> Response[str]:
    """Should it get requests? 200 while tokens move; 503 with the reason where they do not, or are about to stop."""
    trouble = "the server is about to stop" if door.closed else pulse.trouble()
    return Response(trouble or "", media_type=MediaType.TEXT, status_code=503 if trouble else 200)


@get("/version", operation_id="version", tags=["system"], opt=OPEN)
async def version() -> Version:
    """The version that serves."""
    return Version(aiolora.__version__)
