import asyncio
import threading
from typing import Any

import anyio.to_thread
import pytest

from aiolora.engine.beside import _AT_ONCE, _LONG, beside, takes_long
from aiolora.engine.workers import to_its_end
from aiolora.types import Conversation, StructuredOutputsParams

MESSAGE = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1] * 600}}}
LONG: dict[str, Any] = {
    "a text": "x" * (_LONG + 1),
    "token ids": [1] * 600,
    "token ids in a mapping": {"prompt_token_ids": [1] * 600},
    "empty messages": [{"role": "user", "content": ""}] * 200,
    "empty mappings": [{}] * 600,
    "calls": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": ""}] * 300}],
    "a long name": [MESSAGE | {"name": "x" * 5000}],
    "tools": Conversation(messages=[MESSAGE], tools=[{"function": {"parameters": {str(n): {} for n in range(400)}}}]),
    "what a template reads": Conversation(messages=[MESSAGE], template_kwargs={"a": {"b": [[]] * 600}}),
    "a schema": StructuredOutputsParams(json={"enum": [None] * 600}),
}


@pytest.mark.parametrize("what", LONG)
def test_whatever_there_is_much_of_takes_long(what: str) -> None:
    assert takes_long(LONG[what])


@pytest.mark.parametrize("prompt", ["hello", [1] * 300, [MESSAGE] * 20, Conversation(messages=[MESSAGE]), {}, [], None])
def test_what_is_short_does_not(prompt: Any) -> None:
    assert not takes_long(prompt)


def test_no_more_is_looked_at_than_takes_long() -> None:
    class Seen(list[object]):
        def __iter__(self) -> Any:
            raise AssertionError("its length says enough")

    assert takes_long(Seen([0] * 10_000))
    endless: list[object] = []
    endless.append(endless)
    assert takes_long(endless)


async def test_what_takes_long_is_done_in_another_thread_and_nothing_else() -> None:
    here = threading.current_thread()
    assert await beside(False, threading.current_thread) is here
    assert await beside(True, threading.current_thread) is not here


async def test_no_more_take_long_at_a_time_than_there_are_cores_and_other_threads_wait_for_none() -> None:
    gate, begun = threading.Event(), []

    def work() -> None:
        begun.append(None)
        assert gate.wait(60)

    tasks = [asyncio.ensure_future(beside(True, work)) for _ in range(_AT_ONCE + 40)]
    try:
        while len(begun) < _AT_ONCE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await anyio.to_thread.run_sync(lambda: "there") == "there"
        assert len(begun) == _AT_ONCE
    finally:
        gate.set()
        await asyncio.gather(*tasks)
    assert len(begun) == len(tasks)


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_cancelled_leaves_when_the_work_has_ended(fails: bool) -> None:
    begun, gate, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def work(value: str) -> str:
        loop.call_soon_threadsafe(begun.set)
        assert gate.wait(60)
        if fails:
            raise ValueError(value)
        return value

    task = asyncio.ensure_future(to_its_end(work, "done"))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done(), "what it works on is still in use"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    if fails:
        with pytest.raises(ValueError, match="done"):
            await to_its_end(work, "done")
    else:
        assert await to_its_end(work, "done") == "done"
