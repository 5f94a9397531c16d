"""Work for a client who may leave before it is done."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from litestar.types import Receive


async def finished_before_leaving(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Race `work` with the client: its end, or False when the client has gone and the work was cancelled.

    The work is a task of its own: what wakes it then runs through few coroutines, not through all that lead to a route.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False
        task.result()
        return True
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)
        del task, leaving  # an error leads to this frame: it must not lead on to the task that has the error


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
