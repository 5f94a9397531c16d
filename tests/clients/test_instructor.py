"""Instructor: models of pydantic, by tools and by formats."""

from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api.conftest import BASE
from tests.clients.conftest import HI, Flag

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def instructor() -> Any:
    return pytest.importorskip("instructor", exc_type=ImportError)


@pytest.mark.parametrize("model", [BASE, "json"])
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_becomes_a_value(instructor: Any, url: str, model: str, mode: str) -> None:
    client = instructor.from_openai(OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode])
    said = {"model": model, "messages": HI, "response_model": Flag, "max_tokens": 100, "temperature": 0}
    whole = client.chat.completions.create(**said, max_retries=0)
    assert isinstance(whole, Flag)
    *_, last = client.chat.completions.create_partial(**said)
    assert (last.on, last.level) == (whole.on, whole.level)


async def test_the_other_client_too(instructor: Any, url: str) -> None:
    client = instructor.from_openai(AsyncOpenAI(base_url=url, api_key="none"))
    value = await client.chat.completions.create(
        model="json", messages=HI, response_model=Flag, max_tokens=100, temperature=0, max_retries=0
    )
    assert isinstance(value, Flag)
