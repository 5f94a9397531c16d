"""What operators and probes ask: is it alive, which version is it."""

from litestar import HttpMethod, MediaType, Response, get, route
from msgspec import Struct

import aiolora
from aiolora.api.serving import Served


class Version(Struct, frozen=True):
    """The version of aiolora."""

    version: str


@route("/health", http_method=[HttpMethod.GET, HttpMethod.HEAD], tags=["system"])
async def health(serving: Served) -> Response[str]:
    """200 while the engine steps, 503 before it has started and once it has stopped."""
    alive = serving.engine.started and serving.engine.death is None
    return Response("", media_type=MediaType.TEXT, status_code=200 if alive else 503)


@get("/version", operation_id="version", tags=["system"])
async def version() -> Version:
    """The version that serves."""
    return Version(aiolora.__version__)
