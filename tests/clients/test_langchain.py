"""LangChain's ChatOpenAI."""

from typing import Any

import pytest

from tests.api.conftest import BASE
from tests.clients.conftest import WEATHER, Flag

pytestmark = pytest.mark.filterwarnings("ignore")
HI = "Anna is 31 years old and lives in Rome."


@pytest.fixture(params=[BASE, "sql"])
def chat(url: str, request: pytest.FixtureRequest) -> Any:
    made: Any = pytest.importorskip("langchain_openai", exc_type=ImportError).ChatOpenAI
    return made(model=request.param, base_url=url, api_key="none", temperature=0, max_tokens=60, max_retries=0)


async def test_it_asks_and_streams(chat: Any) -> None:
    answer = chat.invoke(HI)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(HI)) == answer.content
    assert "".join([chunk.content async for chunk in chat.astream(HI)]) == answer.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_becomes_a_value(chat: Any, method: str) -> None:
    assert isinstance(chat.with_structured_output(Flag, method=method).invoke(HI), Flag)


def test_a_bound_tool_is_called(chat: Any) -> None:
    bound = chat.bind_tools([WEATHER], tool_choice="any")
    [call, *_] = bound.invoke(HI).tool_calls
    assert (call["name"], set(call["args"])) == ("weather", {"city", "warm"})
    whole = None
    for chunk in bound.stream(HI):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.tool_calls[0]["args"] == call["args"]


def test_it_speaks_responses_too(url: str) -> None:
    made: Any = pytest.importorskip("langchain_openai", exc_type=ImportError).ChatOpenAI
    chat = made(model="sql", base_url=url, api_key="none", temperature=0, max_tokens=6, use_responses_api=True)
    assert chat.invoke(HI).text
    assert "".join(chunk.text for chunk in chat.stream(HI)) == chat.invoke(HI).text
