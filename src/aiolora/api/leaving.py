"""Work for a client who may leave before it is done."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio
from litestar import Response
from litestar.types import Receive

from aiolora.api.errors import HTTPRequest

T = TypeVar("T")

_CLIENT_CLOSED = 499  # nginx's word for it; nobody is left to read it


class ClientLeftError(Exception):
    """Nobody is left to answer."""


async def answered_before_leaving(request: HTTPRequest, work: Coroutine[Any, Any, Response[Any]]) -> Response[Any]:
    """What `work` answers to a request whose body has been read; a client that leaves ends it."""
    try:
        return await finished_before_leaving(request.receive, work)
    except ClientLeftError:
        return Response(None, status_code=_CLIENT_CLOSED)


async def finished_before_leaving(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Race `work` with the client: its end, or `ClientLeftError` when the client has gone and the work was cancelled.

    The work is a task of its own: what wakes it then runs through few coroutines, not through all that lead to a route.
    What it has in a worker thread is waited for: its place among the threads is taken until then.
    """
    scope = anyio.CancelScope()
    task, leaving = asyncio.ensure_future(_within(scope, work)), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            scope.cancel()
        return await task
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
        del scope, task, leaving  # an error leads to this frame: it must not lead on to the task that has the error


async def _within(scope: anyio.CancelScope, work: Coroutine[Any, Any, T]) -> T:
    try:
        with scope:
            return await work
    finally:
        del scope  # it knows the task
    raise ClientLeftError


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
