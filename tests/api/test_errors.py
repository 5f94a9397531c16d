"""Bad input: the right status, OpenAI's body, the field's name, and nothing of the server's inside."""

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from _pytest.mark import ParameterSet
from litestar.testing import AsyncTestClient
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from aiolora.api import create_app
from aiolora.api.errors import describe, without_folders
from aiolora.errors import (
    AdapterChangedError,
    AdapterConflictError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterResolveError,
    ConfigError,
    EngineDeadError,
    GrammarBusyError,
    GrammarError,
    MediaBusyError,
    NonFiniteLogitsError,
    RequestError,
)
from tests.api.conftest import BASE, Server, Standing

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
DEEP = b"[" * 100_000 + b"]" * 100_000

TOOL = {"type": "function", "function": {"name": "f"}}
COMPLETION_CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no model": ({"model": ...}, "model"),
    "a model that is no string": ({"model": 3}, "model"),
    "no prompt": ({"prompt": ...}, "prompt"),
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "an empty list of prompts": ({"prompt": []}, "prompt"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, "prompt"),
    "a prompt of mixed kinds": ({"prompt": ["a", 3]}, "prompt"),
    "a prompt of objects": ({"prompt": [{}]}, "prompt[0]"),
    "a prompt of truth": ({"prompt": [True]}, "prompt[0]"),
    "a prompt over the context": ({"prompt": "a " * 1024}, "prompt"),
    "a prompt over any context": ({"prompt": "a " * 500_000}, "prompt"),
    "an id over the vocabulary": ({"prompt": [49152]}, "prompt"),
    "an id under it": ({"prompt": [[-1]]}, "prompt"),
    "too many prompts": ({"prompt": ["a"] * 2049}, "prompt"),
    "temperature as text": ({"temperature": "NaN"}, "temperature"),
    "temperature as a number in text": ({"temperature": "0.5"}, "temperature"),
    "a negative temperature": ({"temperature": -1}, "temperature"),
    "top_p over 1": ({"top_p": 1.5}, "top_p"),
    "top_p of 0": ({"top_p": 0}, "top_p"),
    "min_p under 0": ({"min_p": -0.1}, "min_p"),
    "n of 0": ({"n": 0}, "n"),
    "n as a float": ({"n": 1.0}, "n"),
    "n as text": ({"n": "3"}, "n"),
    "n without end": ({"n": 10**40}, "n"),
    "max_tokens under 0": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens of 0 without echo": ({"max_tokens": 0}, "max_tokens"),
    "min_tokens over max_tokens": ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    "an empty stop": ({"stop": ""}, "stop"),
    "an empty stop among others": ({"stop": ["a", ""]}, "stop"),
    "too many stops": ({"stop": ["a"] * 65}, "stop"),
    "a stop token over the vocabulary": ({"stop_token_ids": [49152]}, "stop_token_ids"),
    "logprobs under 0": ({"logprobs": -1}, "logprobs"),
    "logprobs as in chat": ({"logprobs": True}, "logprobs"),
    "too many logprobs": ({"logprobs": 101}, "logprobs"),
    "a bias of no token": ({"logit_bias": {"a": 1}}, "logit_bias"),
    "a bias over the vocabulary": ({"logit_bias": {"49152": 1}}, "logit_bias"),
    "a bias under it": ({"logit_bias": {"-1": 1}}, "logit_bias"),
    "a bias that is no number in float32": ({"logit_bias": {"5": 1e39}}, "logit_bias"),
    "a penalty that makes logits infinite": ({"repetition_penalty": 5e-324}, "repetition_penalty"),
    "a seed over 63 bits": ({"seed": 2**63}, "seed"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "include_usage as text": ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    "a suffix": ({"suffix": "end"}, "suffix"),
    "best_of over n": ({"best_of": 2}, "best_of"),
    "a format of no kind": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "a format as text": ({"response_format": "json_object"}, "response_format"),
}
CHAT_CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": ...}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "Hi"}, "messages"),
    "a message without role": ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    "a role of its own": ({"messages": [*HI, {"role": "king", "content": "Hi"}]}, "messages[1].role"),
    "no content": ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    "content as a number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "messages[0].content[0]",
    ),
    "a text part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0]",
    ),
    "a conversation over the context": ({"messages": [{"role": "user", "content": "a " * 1024}]}, "messages"),
    "max_completion_tokens of 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "max_tokens of 0": ({"max_tokens": 0}, "max_tokens"),
    "logprobs as in completions": ({"logprobs": 3}, "logprobs"),
    "top_logprobs without logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "top_logprobs over 20": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "tools as text": ({"tools": "f"}, "tools"),
    "a tool of another type": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "a tool with an empty name": (
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        "tools[0].function.name",
    ),
    "a required tool of none": ({"tool_choice": "required"}, "tool_choice"),
    "a tool that is not offered": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
    ),
    "a choice of no kind": ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
    "a tool whose schema is none": (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "obj"}}}],
            "tool_choice": "required",
        },
        "tools",
    ),
    "functions": ({"functions": [{"name": "f"}]}, "functions"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities"),
    "a search": ({"web_search_options": {"a": 1}}, "web_search_options"),
    "documents": ({"documents": [{"text": "a"}]}, "documents"),
    "an option of ours for the template": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    "a schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema"),
    "a template of the client's": ({"chat_template": "{{ messages }}"}, "chat_template"),
}
BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "invalid_json"),
    "no JSON": (b"{", "invalid_json"),
    "text after the JSON": (b'{"model": "smollm", "prompt": "a"} b', "invalid_json"),
    "invalid UTF-8": (b'{"model": "smollm", "prompt": "\xff\xfe"}', "invalid_json"),
    "a lone surrogate": (b'{"model": "smollm", "prompt": "\\ud800"}', "invalid_json"),
    "NaN": (b'{"model": "smollm", "prompt": "a", "temperature": NaN}', "invalid_json"),
    "infinity": (b'{"model": "smollm", "prompt": "a", "temperature": Infinity}', "invalid_json"),
    "infinity as a number": (b'{"model": "smollm", "prompt": "a", "temperature": 1e999}', "invalid_value"),
    "a list": (b"[]", "invalid_value"),
    "null": (b"null", "invalid_value"),
    "a number of 5000 digits": (b'{"model": "smollm", "prompt": "a", "n": ' + b"9" * 5000 + b"}", "invalid_value"),
    "lists without end": (b'{"model": "smollm", "prompt": [' + b"[]," * (1 << 18) + b"[]]}", "invalid_json"),
    "depth in an unknown field": (b'{"model": "smollm", "prompt": "a", "x": ' + DEEP + b"}", "invalid_json"),
    "depth in a known field": (b'{"model": "smollm", "prompt": "a", "suffix": ' + DEEP + b"}", "invalid_json"),
}


def cases() -> Iterator[ParameterSet]:
    for name, (said, param) in COMPLETION_CASES.items():
        yield pytest.param(COMPLETIONS, {"prompt": "Hi", **said}, param, id=f"completions, {name}")
    for name, (said, param) in CHAT_CASES.items():
        yield pytest.param(CHAT, {"messages": HI, **said}, param, id=f"chat, {name}")


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, whose shape is always the same."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) <= 2000
    assert error["type"] in ("invalid_request_error", "server_error")
    assert isinstance(error["code"], str)
    return error


@pytest.mark.parametrize(("path", "said", "param"), list(cases()))
async def test_a_bad_field_is_400_and_named(
    http: httpx.AsyncClient, server: Server, path: str, said: dict[str, Any], param: str
) -> None:
    body = {key: value for key, value in {"model": BASE, "max_tokens": 2, **said}.items() if value is not ...}
    error = error_of(await http.post(path, json=body), 400)
    assert error["param"] == param
    assert error["code"] == ("context_length_exceeded" if "max_model_len" in error["message"] else "invalid_value")
    assert server.engine.snapshot().running == 0


@pytest.mark.parametrize(("body", "code"), BODIES.values(), ids=BODIES)
async def test_a_bad_body_is_400(http: httpx.AsyncClient, body: bytes, code: str) -> None:
    assert error_of(await http.post(COMPLETIONS, content=body), 400)["code"] == code


@pytest.mark.parametrize(("name", "meant"), [("sqll", "sql"), ("Pirate", "pirate"), ("smolm", BASE)])
async def test_an_unknown_model_is_404_and_the_nearest_is_told(client: AsyncOpenAI, name: str, meant: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        await client.completions.create(model=name, prompt="Hi")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert f"did you mean '{meant}'?" in caught.value.message
    with pytest.raises(NotFoundError):
        await client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}], stream=True)


async def test_a_bad_stream_is_refused_before_it_begins(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        await client.completions.create(model=BASE, prompt="", stream=True)
    assert caught.value.param == "prompt"


async def test_routes_methods_and_sizes_are_refused_in_the_same_shape(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v1/nothing"), 404)["code"] == "unknown_url"
    wrong = await http.get(CHAT)
    assert error_of(wrong, 405)["code"] == "method_not_supported"
    assert "POST" in wrong.headers["allow"]
    assert error_of(await http.post(COMPLETIONS, content=b" " * (5 << 20)), 413)["code"] == "request_too_large"


async def test_a_body_needs_no_content_type(http: httpx.AsyncClient) -> None:
    body = msgspec.json.encode({"model": BASE, "prompt": "Hi", "max_tokens": 1})
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        assert (await http.post(COMPLETIONS, content=body, headers=headers)).status_code == 200


async def test_what_nobody_foresaw_is_500_without_details(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Standing(started=True)
    monkeypatch.setattr(engine, "settle", lambda *_, **__: 1 / 0)
    async with AsyncTestClient(create_app(engine), raise_server_exceptions=False) as client:
        response = await client.post(COMPLETIONS, json={"model": "none", "prompt": "Hi"})
    error = error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in response.text


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("no", param="n"), 400, "invalid_value"),
        (AdapterNotFoundError("a", "no"), 404, "adapter_not_found"),
        (AdapterResolveError("a", "no"), 502, "adapter_not_resolved"),
        (AdapterConflictError("a", "no"), 400, "adapter_conflict"),
        (AdapterFormatError("a", "no"), 422, "adapter_unusable"),
        (AdapterChangedError("a", "no"), 422, "adapter_unusable"),
        (AdapterError("a", "no"), 422, "adapter_unusable"),
        (GrammarError("no"), 400, "grammar_failed"),
        (GrammarBusyError("no"), 429, "rate_limit_exceeded"),
        (MediaBusyError("no"), 429, "rate_limit_exceeded"),
        (NonFiniteLogitsError("no"), 500, "non_finite_logits"),
        (EngineDeadError("at /srv/secret"), 503, "engine_dead"),
        (ConfigError("at /srv/secret"), 500, "internal_error"),
        (KeyError("/srv/secret"), 500, "internal_error"),
    ],
)
def test_every_error_class_has_one_answer(error: Exception, status: int, code: str) -> None:
    told, body = describe(error)
    assert (told, body.error.code) == (status, code)
    assert "secret" not in body.error.message


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no adapter found at '/srv/my models/sql': gone", "no adapter found at 'sql': gone"),
        ("/data/adapters/sql/ now holds 12, not 34", "sql now holds 12, not 34"),
        ("is at ~/models/x, not ./y/z or '../w'", "is at x, not z or 'w'"),
        ("made for 'org/name' and/or other", "made for 'org/name' and/or other"),
    ],
)
def test_folders_are_cut_from_what_is_told(message: str, told: str) -> None:
    assert without_folders(message) == told
    assert describe(AdapterFormatError("a", message))[1].error.message == f"adapter 'a': {told}"
