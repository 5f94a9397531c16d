"""What answers must match, over HTTP: response_format, structured_outputs and the names that vLLM had before."""

import json
import re
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.api.conftest import BASE

ANNA: list[Any] = [{"role": "user", "content": "Anna is 31 years old and lives in Rome. Answer as JSON."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 200}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAID: dict[str, Any] = {"max_tokens": 120, "temperature": 1.0, "seed": 1}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


class Person(BaseModel):
    name: str
    age: int


@pytest.mark.parametrize("model", [BASE, "json"])
async def test_a_schema_holds_for_every_answer_whole_and_streamed(client: AsyncOpenAI, model: str) -> None:
    said: dict[str, Any] = {"model": model, "messages": ANNA, "response_format": FORMAT, "n": 3, **SAID}
    whole = await client.chat.completions.create(**said)
    texts = ["", "", ""]
    async for chunk in await client.chat.completions.create(stream=True, **said):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    for choice, text in zip(whole.choices, texts):
        assert choice.finish_reason == "stop"
        assert set(Person.model_validate_json(text).model_dump()) == set(json.loads(text))


async def test_openais_client_parses_into_a_model(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model="json", messages=ANNA, response_format=Person, max_tokens=120, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


async def test_json_object_is_any_object(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="json", messages=ANNA, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        ({"structured_outputs": {"regex": r"\d{3}-[a-f]{1,4}X"}}, r"\d{3}-[a-f]{1,4}X"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"grammar": 'start: "x" | "y" start'}}, "y*x"),
        ({"structured_outputs": {"json_object": True}}, r"(?s)\{.*\}"),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_choice": ["one", "two"]}, "one|two"),
        ({"guided_grammar": 'root ::= "u" "v"?'}, "uv?"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "b", "schema": {"enum": [7]}}}}, "7"),
    ],
)
async def test_every_kind_is_served_by_completions_too(
    http: httpx.AsyncClient, said: dict[str, Any], pattern: str
) -> None:
    body = {"model": BASE, "prompt": "The answer is", "max_tokens": 100, "temperature": 0, **said}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert re.fullmatch(pattern, answer["choices"][0]["text"])


@pytest.mark.parametrize(
    ("said", "param", "says"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "obj"}}}},
         "response_format", "obj"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "str"),
        ({"structured_outputs": {}}, "structured_outputs", "give one of"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_choice": []}, "guided_choice", "give one of"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "both"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "where the answer ends"),
    ],
)  # fmt: skip
async def test_what_cannot_be_had_names_its_field(
    http: httpx.AsyncClient, said: dict[str, Any], param: str, says: str
) -> None:
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": ANNA})):
        response = await http.post(f"/v1/{path}", json={"model": BASE, "max_tokens": 5, **prompt, **said})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
        assert says in error["message"]
