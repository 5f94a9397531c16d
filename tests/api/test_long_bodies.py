"""Nothing of a long body is worked on by the loop: others stream there."""

import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from aiolora.api import chat, completions, create_app, responses, tokenize
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.intake import Intake
from aiolora.engine.output import Assembler
from aiolora.media.reader import MediaReader
from tests.api.conftest import inside

CHAT, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/responses", "/v1/completions"
MESSAGE = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": [None] * 5000}}}
# what there is too much of -> route, body; none of them says anything that is long in characters
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": (CHAT, {"messages": [{"role": "user", "content": ""}] * 1000}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1000}]}),
    "calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL] * 400}]}),
    "tools": (CHAT, {"messages": [MESSAGE], "tools": [TOOL]}),
    "forced tools": (CHAT, {"messages": [MESSAGE], "tools": [TOOL], "tool_choice": "required"}),
    "what the template reads": (CHAT, {"messages": [MESSAGE], "chat_template_kwargs": {"a": [[]] * 6000}}),
    "items": (RESPONSES, {"input": [MESSAGE | {"content": ""}] * 1000}),
    "token ids": (COMPLETIONS, {"prompt": [5] * 9000}),
    "prompts": (COMPLETIONS, {"prompt": [[5] * 20] * 500}),
    "a schema": (COMPLETIONS, {"prompt": "hello", "structured_outputs": {"json": {"enum": [None] * 5000}}}),
    "a text": ("/tokenize", {"prompt": "x " * 9000}),
    "tokens": ("/detokenize", {"tokens": [5] * 9000}),
}
SHORT_PROMPTS = ("prompts", "parts", "a schema")
WORK = [  # what takes time by the length of a body
    (chat, ("decode", "messages_of", "conversation", "_params")),
    (completions, ("decode", "_prompts", "_params")),
    (responses, ("parse", "_as_chat")),
    (tokenize, ("parse",)),
    (Intake, ("request", "tokens")),
    (MediaReader, ("modalities_in", "split")),
]


@pytest.fixture
async def http(byte_engine: AsyncLLMEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with inside(create_app(byte_engine, served_model_name="base")) as client:
        yield client


@pytest.mark.parametrize("what", BODIES)
async def test_a_long_body_is_worked_on_beside_the_loop(
    http: httpx.AsyncClient, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_loop, beside = [], []

    def told(name: str, work: Any) -> Any:
        def telling(*args: Any, **kwargs: Any) -> Any:
            (by_loop if threading.current_thread() is loop else beside).append(name)
            return work(*args, **kwargs)

        return telling

    loop = threading.current_thread()
    for home, names in WORK:
        for name in names:
            monkeypatch.setattr(home, name, told(name, getattr(home, name)))
    route, body = BODIES[what]
    answer = await http.post(route, json={"model": "base", "max_tokens": 1} | body)
    assert answer.status_code in (200, 400), answer.text
    assert beside
    # a short prompt is tokenised on the loop however long its body was, and others get a turn between two of them
    assert not [name for name in by_loop if what not in SHORT_PROMPTS or name not in ("request", "tokens", "split")]
    by_loop.clear()
    answer = await http.post(route, json={"model": "base", "max_tokens": 1, **SHORT[route]})
    assert answer.status_code == 200, answer.text
    assert by_loop


@pytest.mark.parametrize("stream", [False, True])
async def test_the_scores_of_a_long_prompt_are_worded_beside_the_loop(
    http: httpx.AsyncClient, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, bool]] = []
    loop = threading.current_thread()

    def told(name: str, work: Any) -> Any:
        def telling(*args: Any) -> Any:
            done.append((name, threading.current_thread() is loop))
            return work(*args)

        return telling

    monkeypatch.setattr(Assembler, "take_prompt", told("read", Assembler.take_prompt))
    monkeypatch.setattr(completions._Reply, "_choice", told("worded", completions._Reply._choice))
    body = {"model": "base", "prompt": [5] * 200, "prompt_logprobs": 5, "echo": True, "max_tokens": 8, "stream": stream}
    answer = await http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    assert done[0] == ("read", False)
    worded = [by_loop for name, by_loop in done if name == "worded"]
    assert not worded[0]
    assert any(worded) == stream, "those that follow are of one token each, and need no thread"


SHORT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [MESSAGE]},
    RESPONSES: {"input": "hello"},
    COMPLETIONS: {"prompt": "hello"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5]},
}
