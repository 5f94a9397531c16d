"""LiteLLM, as a provider of OpenAI's kind and of vLLM's."""

import copy
import json
from typing import Any

import pytest

from tests.api.conftest import BASE
from tests.clients.conftest import HI, WEATHER, Flag

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = (f"hosted_vllm/{BASE}", "hosted_vllm/pirate", "openai/pirate")


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm", exc_type=ImportError)


@pytest.fixture
def said(url: str) -> dict[str, Any]:
    return {"api_base": url, "api_key": "none", "messages": HI, "max_tokens": 200, "temperature": 0}


@pytest.mark.parametrize("model", MODELS)
async def test_it_asks_and_streams(litellm: Any, said: dict[str, Any], model: str) -> None:
    said |= {"model": model, "max_tokens": 6}
    answer = litellm.completion(**said)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens == 6
    streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **said)]
    assert "".join(streamed) == text
    assert (await litellm.acompletion(**said)).choices[0].message.content == text


@pytest.mark.parametrize("model", MODELS)
def test_tools_and_formats_come_back_as_values(litellm: Any, said: dict[str, Any], model: str) -> None:
    tools = [copy.deepcopy(WEATHER)]  # it takes additionalProperties out of them, in place, before it sends them
    forced = litellm.completion(model=model, tools=tools, tool_choice="required", **said)
    assert {"city", "warm"} <= set(json.loads(forced.choices[0].message.tool_calls[0].function.arguments))
    shaped = litellm.completion(model=model, response_format=Flag, **said)
    Flag.model_validate_json(shaped.choices[0].message.content)


def test_an_unknown_model_is_its_own_error(litellm: Any, said: dict[str, Any]) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="hosted_vllm/nobody", **said)
