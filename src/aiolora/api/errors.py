"""What a client is told when something goes wrong: one table, one body, in OpenAI's shape.

{"error": {"message", "type", "param", "code"}}
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TypeAlias

from litestar import Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from aiolora.errors import (
    AdapterBusyError,
    AdapterConflictError,
    AdapterError,
    AdapterNotFoundError,
    AdapterResolveError,
    AioloraError,
    EngineDeadError,
    GrammarBusyError,
    GrammarError,
    MediaBusyError,
    NonFiniteLogitsError,
    PromptTooLongError,
    RequestError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

HTTPRequest: TypeAlias = Request[object, object, State]

_MAX_MESSAGE = 2000
_PATH = re.compile(
    r"""(?P<quote>['"])(?:~|\.{0,2})/(?:(?!(?P=quote)).)*(?P=quote)"""  # in quotes, blanks and all
    r"""|(?<![\w.~/])(?:~|\.{0,2})/[^\s'",;:()]+"""
)


class MalformedBodyError(RequestError):
    """The body is no JSON object."""


class SwitchedOffError(RequestError):
    """The route is there, and the operator has not switched it on."""


class NoKeyError(AioloraError):
    """The route takes a key, and none that is known came."""


class NotAllowedError(AioloraError):
    """The key is known, and not enough for this route."""


class DrainingError(AioloraError):
    """The server finishes what it has begun, and stops."""


class UnservedError(RequestError):
    """OpenAI has the route, and no model here can answer it."""


class ErrorDetail(Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True):
    """The body of every answer that is not good, and the last frame of a stream that fails."""

    error: ErrorDetail


class _Row(Struct, frozen=True):
    status: int
    type: str
    code: str
    says: str | None = None  # instead of the error's own text, where that is not for clients
    headers: tuple[tuple[str, str], ...] = ()


_INTERNAL = _Row(500, "server_error", "internal_error", "the server failed on this request; its log has the details")
_TABLE: dict[type[BaseException], _Row] = {
    UnknownModelError: _Row(404, "invalid_request_error", "model_not_found"),
    PromptTooLongError: _Row(400, "invalid_request_error", "context_length_exceeded"),
    MalformedBodyError: _Row(400, "invalid_request_error", "invalid_json"),
    SwitchedOffError: _Row(404, "invalid_request_error", "switched_off"),
    UnservedError: _Row(404, "invalid_request_error", "not_supported"),
    GrammarBusyError: _Row(429, "requests", "rate_limit_exceeded", headers=(("retry-after", "1"),)),
    MediaBusyError: _Row(429, "requests", "rate_limit_exceeded", headers=(("retry-after", "1"),)),
    RequestError: _Row(400, "invalid_request_error", "invalid_value"),
    AdapterNotFoundError: _Row(404, "invalid_request_error", "adapter_not_found"),
    AdapterResolveError: _Row(502, "server_error", "adapter_not_resolved"),
    AdapterBusyError: _Row(429, "tokens", "rate_limit_exceeded"),
    AdapterConflictError: _Row(400, "invalid_request_error", "adapter_conflict"),
    AdapterError: _Row(422, "invalid_request_error", "adapter_unusable"),
    GrammarError: _Row(400, "invalid_request_error", "grammar_failed"),
    NonFiniteLogitsError: _Row(500, "server_error", "non_finite_logits"),
    EngineDeadError: _Row(503, "server_error", "engine_dead", "the engine has stopped; the server must be restarted"),
    NoKeyError: _Row(
        401, "invalid_request_error", "invalid_api_key", headers=(("www-authenticate", 'Bearer realm="aiolora"'),)
    ),
    NotAllowedError: _Row(403, "invalid_request_error", "not_allowed"),
    DrainingError: _Row(503, "server_error", "shutting_down", headers=(("retry-after", "5"),)),
    Exception: _INTERNAL,
}
_CODES = {404: "unknown_url", 405: "method_not_supported", 413: "request_too_large"}


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """The status and body for an error. What nobody foresaw is logged here and told without details."""
    row = _row(error)
    if row is _INTERNAL:
        logger.error("a request failed", exc_info=error)
    message = str(error) if row.says is None else row.says
    if isinstance(error, AdapterError):
        message = without_folders(message)
    param = error.param if isinstance(error, RequestError) else None
    return row.status, ErrorBody(ErrorDetail(message[:_MAX_MESSAGE], row.type, param, row.code))


def _row(error: Exception) -> _Row:
    return next(_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE)


@contextmanager
def naming(**names: str) -> Iterator[None]:
    """Errors about the engine's fields (keys) name the fields that the client sent (values)."""
    try:
        yield
    except RequestError as error:
        if error.param in names:
            error.param = names[error.param]
        raise


def without_folders(message: str) -> str:
    """Every path in a message cut to its last component: where files lie is not the client's business."""

    def last(match: re.Match[str]) -> str:
        quote = match["quote"] or ""
        return quote + match[0].strip(quote or None).rstrip("/").rsplit("/", 1)[-1] + quote

    return _PATH.sub(last, message)


def answer_error(_: HTTPRequest, error: Exception) -> Response[ErrorBody]:
    """Litestar's exception handler for everything raised before a response has begun."""
    status, body = describe(error)
    headers = dict(_row(error).headers)
    if isinstance(error, AdapterBusyError):
        headers["retry-after"] = str(error.retry_after_s)
    return Response(body, status_code=status, headers=headers)


def answer_http_error(request: HTTPRequest, error: HTTPException) -> Response[ErrorBody]:
    """Litestar's own refusals: unknown routes, wrong methods, bodies over the limit."""
    status = error.status_code
    if status >= 500:
        return answer_error(request, error)
    message = f"{request.method} {request.url.path}: {HTTPStatus(status).phrase}"
    if isinstance(error, RequestEntityTooLarge) and isinstance(request.route_handler, HTTPRouteHandler):
        message += f"; the limit is {request.route_handler.resolve_request_max_body_size()} bytes"
    elif error.detail != HTTPStatus(status).phrase:
        message += f"; {error.detail}"
    detail = ErrorDetail(message[:_MAX_MESSAGE], "invalid_request_error", None, _CODES.get(status, "invalid_request"))
    return Response(ErrorBody(detail), status_code=status, headers=error.headers)
