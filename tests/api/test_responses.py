"""POST /v1/responses, through OpenAI's own client."""

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from tests.api.conftest import BASE

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 8}
CAT = "Tell me about a cat."
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"],
                   "additionalProperties": False},
}  # fmt: skip


class Flag(BaseModel):
    on: bool


@pytest.mark.parametrize("model", [BASE, "pirate"])
async def test_a_response_says_what_chat_says(client: AsyncOpenAI, model: str) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CAT}]
    chat = await client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
    for said in (
        {"instructions": "Be brief.", "input": CAT},
        {"input": messages},
        {"instructions": "Be brief.", "input": [{"role": "user", "content": [{"type": "input_text", "text": CAT}]}]},
    ):
        answer = await client.responses.create(model=model, **said, **GREEDY)  # type: ignore[call-overload]
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.status, answer.model) == ("incomplete", model)
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert chat.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.usage.prompt_tokens, 8)


async def test_events_tell_the_life_of_a_message_in_order(client: AsyncOpenAI) -> None:
    whole = await client.responses.create(model=BASE, input=CAT, **GREEDY)
    events = [event async for event in await client.responses.create(model=BASE, input=CAT, stream=True, **GREEDY)]
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert deltas == 8
    final: Any = events[-1]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == final.response.output_text
    assert final.response.usage == whole.usage
    assert len({event.item_id for event in events if event.type.startswith("response.output_text")}) == 1


async def test_openais_helper_follows_a_stream(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model="sql", input=CAT, **GREEDY) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    assert final.output_text


async def test_a_forced_call_is_an_item_whole_and_streamed(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {
        "model": BASE, "input": CAT, "tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 1.0, "max_output_tokens": 100, "extra_body": {"seed": 1},
    }  # fmt: skip
    [call] = (await client.responses.create(**said)).output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"warm"}
    events = [event async for event in await client.responses.create(stream=True, **said)]
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("function_call_arguments.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", *["function_call_arguments.delta"] * deltas,
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    turns = [{"role": "user", "content": CAT}, call.model_dump(),
             {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}]  # fmt: skip
    after = await client.responses.create(model=BASE, input=turns, tools=[TOOL], **GREEDY)  # type: ignore[arg-type]
    assert after.output_text


async def test_a_format_holds(client: AsyncOpenAI) -> None:
    answer = await client.responses.parse(model=BASE, input=CAT, text_format=Flag, temperature=0)
    assert isinstance(answer.output_parsed, Flag)
    assert answer.status == "completed"


async def test_log_probabilities_come_where_they_are_asked_for(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {"model": BASE, "input": CAT, "include": ["message.output_text.logprobs"], **GREEDY}
    answer = await client.responses.create(top_logprobs=2, **said)
    logprobs = answer.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert logprobs is not None
    assert "".join(one.token for one in logprobs) == answer.output_text
    assert {len(one.top_logprobs) for one in logprobs} == {2}
    streamed = [
        one
        async for event in await client.responses.create(top_logprobs=2, stream=True, **said)
        if event.type == "response.output_text.delta"
        for one in event.logprobs
    ]
    assert [one.token for one in streamed] == [one.token for one in logprobs]


async def test_what_clients_send_besides_is_tolerated(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(
        model=BASE, input=CAT, store=False, metadata={"a": "b"}, user="me", truncation="disabled",
        reasoning={"effort": "low"}, service_tier="auto", prompt_cache_key="k", extra_body={"unheard_of": 1}, **GREEDY,
    )  # fmt: skip
    assert answer.metadata == {"a": "b"}
    Response.model_validate(answer.model_dump(), strict=False)


@pytest.mark.parametrize(
    ("said", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"input": 1}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"role": "king", "content": "a"}]}, 400, "messages[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0]"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"max_output_tokens": "5"}, 400, "max_output_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "obj"}}}}, 400, "text.format"),
    ],
)
async def test_what_is_wrong_names_its_field(
    http: httpx.AsyncClient, said: dict[str, Any], status: int, param: str
) -> None:
    response = await http.post("/v1/responses", json={"model": BASE, "input": "a", "max_output_tokens": 2, **said})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error


async def test_a_stream_that_fails_ends_with_an_error(
    http: httpx.AsyncClient, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(assemblers: Any) -> Any:
        raise RuntimeError("a secret")
        yield

    monkeypatch.setattr(server.engine, "run", fails)
    text = (await http.post("/v1/responses", json={"model": BASE, "input": "a", "stream": True})).text
    *_, last = text.strip().split("\n\n")
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1])["code"] == "internal_error"
    assert "secret" not in text
