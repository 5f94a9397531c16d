"""OpenAI's own client, blocking and not."""

import json

import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI

from tests.api.conftest import BASE
from tests.clients.conftest import HI, WEATHER, Flag

MODELS = (BASE, "json")


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("model", MODELS)
def test_the_blocking_client_asks_and_streams(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=HI, max_tokens=6, temperature=0)
    with client.chat.completions.create(model=model, messages=HI, max_tokens=6, temperature=0, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content
    assert client.completions.create(model=model, prompt="The sea", max_tokens=4).choices[0].text
    assert model in [card.id for card in client.models.list()]


async def test_the_other_client_asks_and_streams(url: str) -> None:
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        async with client.responses.stream(model="json", input="Hi", max_output_tokens=6, temperature=0) as stream:
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        answer = await client.responses.create(model="json", input="Hi", max_output_tokens=6, temperature=0)
        assert answer.output_text == text


@pytest.mark.parametrize("model", MODELS)
def test_tools_and_formats_come_back_as_values(client: OpenAI, model: str) -> None:
    forced = client.chat.completions.create(
        model=model, messages=HI, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=100
    )
    [call] = forced.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"city", "warm"}
    parsed = client.chat.completions.parse(model=model, messages=HI, response_format=Flag, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Flag)
    assert isinstance(client.responses.parse(model=model, input="Hi", text_format=Flag).output_parsed, Flag)


def test_an_unknown_model_is_its_own_error(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="json"):
        client.chat.completions.create(model="jsn", messages=HI)
