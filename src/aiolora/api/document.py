"""The OpenAPI document: what Litestar sees of a route, and what it cannot, since routes decode bodies and fail in words
of their own. A route says those in its `opt`:

    reads: the Struct of its body, or a tuple of several, where none is needed
    streams: the Struct of its events, where it may stream
    fails: statuses beside those that follow from its key and its body
"""

from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
)
from litestar.openapi.spec.enums import OpenAPIType
from litestar.routes import HTTPRoute
from msgspec import Struct

from aiolora.api.access import Keys
from aiolora.api.decode import SAMPLING
from aiolora.api.errors import ErrorBody
from aiolora.types import SamplingParams

NAMES = (404, 422, 502)  # how a route fails that takes the name of a model
GENERATES = (*NAMES, 429)  # and one that runs it

_PLACE = "#/components/schemas/{name}"
_KEY = "key"
_WHY = {
    400: "The request is wrong; `param` names the field.",
    401: "A key is needed, and none that is known came.",
    403: "The key is not enough for this.",
    404: "What is named does not exist, for this key.",
    413: "The body is over the limit.",
    422: "The adapter cannot be used.",
    429: "The adapter has had its tokens of this minute, or grammars wait to be compiled; see Retry-After.",
    500: "The server failed; its log has the details.",
    502: "A resolver failed to bring the adapter.",
    503: "The engine has stopped, or the server is about to.",
}


def complete(app: Litestar, keys: Keys) -> None:
    """Add to the app's document bodies, failures and keys of every route, and shapes as msgspec checks them."""
    api = app.openapi_schema
    assert api.paths is not None
    bodies: set[type[Struct]] = set()
    answers: set[type[Struct]] = {ErrorBody}
    for route in app.routes:
        item = api.paths.get(route.path_format or "/")
        if item is None or not isinstance(route, HTTPRoute):
            continue
        for method, (handler, _) in route.route_handler_map.items():
            operation: Operation | None = getattr(item, method.lower())
            if operation is None:  # Litestar's OPTIONS
                continue
            _complete(operation, handler, keys)
            bodies |= set(_bodies(handler))
            answers |= _answers(handler)
    scheme = SecurityScheme(type="http", scheme="bearer")
    api.components = Components(schemas=_schemas(bodies, answers), security_schemes={_KEY: scheme})


def _complete(operation: Operation, handler: HTTPRouteHandler, keys: Keys) -> None:
    opt, access = handler.opt, handler.opt.get("access", "key")
    fails = set(opt.get("fails", ()))
    if access != "open":
        fails |= {500, 503}
    if keys.needed(access):
        fails |= {401} if access == "key" else {401, 403}
        operation.security = [{_KEY: []}]
    bodies = _bodies(handler)
    if bodies:
        fails |= {400, 413}
        schema = _reference(bodies[0]) if len(bodies) == 1 else Schema(any_of=[_reference(body) for body in bodies])
        content = {"application/json": OpenAPIMediaType(schema=schema)}
        operation.request_body = RequestBody(content=content, required=len(bodies) == 1)
    assert operation.responses is not None
    operation.responses.pop("400", None)  # Litestar's, whose shape is not ours
    for status in sorted(fails):
        error = OpenAPIMediaType(schema=_reference(ErrorBody))
        operation.responses[str(status)] = OpenAPIResponse(_WHY[status], content={"application/json": error})
    if "streams" in opt:
        whole = operation.responses[str(HTTPStatus.OK.value)]
        assert isinstance(whole, OpenAPIResponse)
        assert whole.content is not None
        whole.content["text/event-stream"] = OpenAPIMediaType(schema=_event(opt["streams"]))


def _event(shape: type[Struct]) -> Schema:
    """One server-sent event; OpenAPI 3.1 has no word for a sequence of them."""
    text = Schema(type=OpenAPIType.STRING)
    told = f"{shape.__name__} as JSON; the last may be [DONE]"
    data = Schema(type=OpenAPIType.STRING, content_media_type="application/json", description=told)
    properties: dict[str, Reference | Schema] = {"event": text, "data": data}
    return Schema(
        type=OpenAPIType.OBJECT,
        properties=properties,
        required=["data"],
        description="with `stream`: one of its events",
    )


def _bodies(handler: HTTPRouteHandler) -> tuple[type[Struct], ...]:
    reads = handler.opt.get("reads", ())
    return reads if isinstance(reads, tuple) else (reads,)


def _answers(handler: HTTPRouteHandler) -> set[type[Struct]]:
    """What it answers with; nothing where that is text."""
    told = handler.parsed_fn_signature.return_type
    kinds = [told.annotation, *(inner.annotation for inner in told.inner_types), handler.opt.get("streams")]
    return {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Struct)}


def _schemas(bodies: set[type[Struct]], answers: set[type[Struct]]) -> dict[str, Any]:
    """JSON schemas by name, those of bodies with `SamplingParams`'s bounds and words for what they share with it."""
    shapes: list[type[Struct]] = sorted({*bodies, *answers, SamplingParams}, key=lambda shape: shape.__name__)
    _, schemas = msgspec.json.schema_components(shapes, schema_hook=_anything, ref_template=_PLACE)
    sampling = schemas.pop("SamplingParams")["properties"]
    for body in bodies:
        fields = schemas[body.__name__]["properties"]
        fields |= {name: _or_null(sampling[name]) for name in fields.keys() & SAMPLING - {"stop"}}
    return schemas


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or null, which says nothing."""
    if "anyOf" in schema:
        return schema
    told = {name: value for name, value in schema.items() if name in ("description", "default")}
    return told | {"anyOf": [{name: value for name, value in schema.items() if name not in told}, {"type": "null"}]}


def _reference(shape: type[Struct]) -> Reference:
    return Reference(ref=_PLACE.format(name=shape.__name__))


def _anything(kind: type) -> dict[str, Any]:
    if kind is object:
        return {"description": "any JSON"}
    raise NotImplementedError
