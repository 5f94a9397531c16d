"""GET /: a page to try adapters side by side; and /docs. Both whole in one file, with nothing from elsewhere."""

from pathlib import Path
from typing import Any

from litestar import MediaType, Request, Response, Router, get
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin

import aiolora
from aiolora.api.access import OPEN

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
_HEADERS = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}


def _read(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()


@get("/", media_type=MediaType.HTML, include_in_schema=False, opt=OPEN)
async def page() -> Response[bytes]:
    """The playground. What it shows it asks for like any client, so it sees what the visitor's key may see."""
    return Response(_read("page.html"), headers=_HEADERS, media_type=MediaType.HTML)


class _Reference(OpenAPIRenderPlugin):
    """Lists every route from the schema beside it."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return _read("reference.html")


def openapi() -> OpenAPIConfig:
    """`/docs` for people, `/docs/openapi.json` for programs; open to all, for they say nothing of what is served."""
    return OpenAPIConfig(
        title="aiolora",
        version=aiolora.__version__,
        description="One base language model, many LoRA adapters at once; OpenAI's API.",
        use_handler_docstrings=True,
        render_plugins=[_Reference(path="/")],
        openapi_router=Router(path="/docs", route_handlers=[], include_in_schema=False, opt=OPEN),
    )
