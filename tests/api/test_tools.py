"""Tools through OpenAI's own client: offered, chosen, forced; whole, and streamed in the shapes that clients expect."""

import json
from typing import Any

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI

from aiolora.api.messages import conversation
from aiolora.api.tool_calls import LLAMA, MISTRAL
from aiolora.api.tools import ToolUse
from aiolora.api.wire import ChatRequest, Function, FunctionName, NamedTool, Tool
from aiolora.types import Messages, SamplingParams
from tests.api.conftest import BASE, Server

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 15},
        "unit": {"$ref": "#/$defs/unit"},
        "days": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it", "parameters": PARAMETERS},
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
HI: list[Any] = [{"role": "user", "content": "What is the weather in Paris and what time is it?"}]
SAID: dict[str, Any] = {"messages": HI, "tools": [WEATHER, NOW], "max_tokens": 150, "temperature": 1.0, "seed": 4}
REQUIRED = {"tool_choice": "required"}
NAMED = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}


def check(name: str, arguments: str) -> None:
    said = json.loads(arguments)
    assert name in ("weather", "now")
    if name == "weather":
        jsonschema.validate(said, PARAMETERS)


@pytest.mark.parametrize(
    ("model", "choice"), [(BASE, REQUIRED), ("sql", NAMED), ("sql", {**REQUIRED, "parallel_tool_calls": False})]
)
async def test_a_forced_call_parses_and_validates_whole_and_streamed(
    client: AsyncOpenAI, model: str, choice: dict[str, Any]
) -> None:
    for seed in range(2):
        said = {"model": model, **SAID, **choice, "seed": seed}
        whole = (await client.chat.completions.create(**said)).choices[0]
        calls = whole.message.tool_calls or []
        finished = whole.finish_reason == "tool_calls"
        assert finished or whole.finish_reason == "length"
        for call in calls[: None if finished else -1]:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)
        assert calls
        if choice is not REQUIRED:
            assert len(calls) == 1
            assert finished
        if choice is NAMED:
            assert calls[0].function.name == "weather"
        names: dict[int, str] = {}
        texts: dict[int, str] = {}
        ids = set()
        reasons = []
        async for chunk in await client.chat.completions.create(stream=True, **said):
            [one] = chunk.choices
            reasons.append(one.finish_reason)
            assert not one.delta.content
            for delta in one.delta.tool_calls or []:
                assert delta.function is not None
                if delta.index not in names:
                    assert delta.type == "function"
                    assert delta.function.arguments == ""
                    ids.add(delta.id)
                    names[delta.index], texts[delta.index] = delta.function.name or "", ""
                else:
                    assert (delta.id, delta.type, delta.function.name) == (None, None, None)
                    texts[delta.index] += delta.function.arguments or ""
        assert reasons[-1] == whole.finish_reason
        assert set(reasons[:-1]) == {None}
        assert [(names[index], texts[index]) for index in names] == [
            (call.function.name, call.function.arguments) for call in calls
        ]
        assert len(ids) == len(calls)


async def test_openais_helper_puts_a_stream_of_calls_together(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=BASE, **SAID, **NAMED) as stream:
        kinds = {event.type async for event in stream}
        final = (await stream.get_final_completion()).choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.tool_calls is not None
    check(final.tool_calls[0].function.name, final.tool_calls[0].function.arguments)


async def test_n_answers_are_parsed_each_for_itself(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=BASE, **SAID, **NAMED, n=3)
    for choice in answer.choices:
        [call] = choice.message.tool_calls or []
        check(call.function.name, call.function.arguments)
        assert choice.message.content is None


async def test_offered_tools_may_be_left_alone_and_none_offers_none(
    client: AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    said = {**SAID, "model": BASE, "temperature": 0, "max_tokens": 8}
    plain = await client.chat.completions.create(**{**said, "tools": []})
    none = await client.chat.completions.create(**said, tool_choice="none")
    auto = await client.chat.completions.create(**said)
    assert none.usage == plain.usage
    assert none.choices[0].message == plain.choices[0].message
    assert auto.usage is not None
    assert plain.usage is not None
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens, "the model is told of them"
    assert auto.choices[0].finish_reason == "length"
    body = (await http.post("/v1/chat/completions", json=said)).json()
    assert "tool_calls" not in body["choices"][0]["message"]


async def test_calls_and_answers_of_earlier_turns_are_told_to_the_model(client: AsyncOpenAI) -> None:
    call = {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    turns: list[Any] = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abc123def", "content": "21 degrees"},
    ]
    answer = await client.chat.completions.create(model=BASE, messages=turns, tools=[WEATHER], max_tokens=5)
    shorter = await client.chat.completions.create(model=BASE, messages=turns[:2], tools=[WEATHER], max_tokens=5)
    assert answer.usage is not None
    assert shorter.usage is not None
    assert answer.usage.prompt_tokens > shorter.usage.prompt_tokens


def request(**said: Any) -> ChatRequest:
    return ChatRequest(model="m", messages=[], tools=[Tool("function", Function("weather"))], **said)


MESSAGES: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "21"},
]


def test_a_template_that_knows_tools_gets_them_as_they_came() -> None:
    said = request(chat_template_kwargs={"enable_thinking": False}, continue_final_message=True)
    template = "{% if tools %}<tool_call>"
    talk = conversation(said, MESSAGES, said.tools, template)
    assert talk.messages is MESSAGES
    assert talk.tools == [{"type": "function", "function": {"name": "weather"}}]
    assert talk.template_kwargs == {"enable_thinking": False}
    assert talk.continue_final_message


def test_a_template_that_knows_none_is_told_in_words() -> None:
    said = request()
    talk = conversation(said, MESSAGES, said.tools, "")
    assert talk.tools is None
    system, call, answer = talk.messages
    assert str(system["content"]).startswith("Be brief.\n\nYou can call")
    assert '{"name": "weather"}' in str(system["content"])
    assert call == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call>',
    }
    assert answer == {"role": "user", "content": "<tool_response>\n21\n</tool_response>"}
    first = conversation(said, MESSAGES[1:], said.tools, "").messages[0]
    assert first["role"] == "system"


@pytest.mark.parametrize("template", ["[TOOL_CALLS]", "<|python_tag|>", "<tool_call>"])
@pytest.mark.parametrize("choice", ["required", NamedTool("function", FunctionName("weather"))])
def test_every_family_is_forced_in_its_own_words(template: str, choice: Any, server: Server) -> None:
    use = ToolUse.of(request(tool_choice=choice), template)
    assert use is not None
    wanted = use.grammar()
    assert wanted is not None
    compiled = server.engine._parts.grammars.wait(SamplingParams(structured_outputs=wanted))
    assert compiled is not None
    matcher = compiled.begin()
    tokenizer = server.engine.intake.tokenizer
    wording = use.wording
    one = f'{wording.begin}{{"name": "weather", "{wording.arguments}": {{"a": 1}}}}{wording.end}'
    calls = [one] if choice != "required" else [one, one, one]
    for token in tokenizer.encode(wording.opening + wording.between.join(calls) + wording.closing):
        matcher.advance(token)
        assert matcher.error is None
    allowed = int.from_bytes(matcher.bits, "little")
    assert any(allowed >> end & 1 for end in tokenizer.eos_token_ids), "it may end there"
    assert (wording in (LLAMA, MISTRAL)) == ("tool_call>" not in template)
