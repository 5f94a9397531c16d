"""The OpenAPI document against a real server: schemathesis makes up what clients could send, valid by it or not."""

import copy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from hypothesis import HealthCheck, settings

from aiolora.api import create_app
from aiolora.config import EngineArgs, ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

ARGS = ServerArgs(api_key=("other",), admin_key=("k",), access_log=False)
APP = create_app(AsyncLLMEngine(EngineArgs(model="none")), served_model_name="base", args=ARGS)
DOCUMENT = msgspec.to_builtins(APP.openapi_schema.to_schema())
THOROUGH = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = {"type": "string", "minLength": 1, "maxLength": 2}
ID = {"type": "integer", "minimum": 3, "maximum": 258}
BIAS = {"type": "number", "minimum": -100, "maximum": 100}
COUNT = {"type": "integer", "minimum": 1, "maximum": 4}
NULL = {"type": "null"}
MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT},
    "required": ["role", "content"],
    "additionalProperties": False,
}
NAMES = {"enum": ["base", "alpha"]}
FITTING = {  # fields, as the document has them or narrower: no two of them contradict each other
    "model": NAMES,
    "prompt": {
        "anyOf": [
            TEXT,
            {"type": "array", "items": ID, "minItems": 1, "maxItems": 4},
            {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2},
        ]
    },
    "messages": {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 2},
    "input": {"anyOf": [TEXT, {"type": "array", "items": MESSAGE, "minItems": 1, "maxItems": 2}]},
    "instructions": {"anyOf": [TEXT, NULL]},
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "max_output_tokens": COUNT,
    "n": {"type": "integer", "minimum": 1, "maximum": 2},
    "priority": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "stop": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 2}, NULL]},
    "stop_token_ids": {"anyOf": [{"type": "array", "items": ID, "maxItems": 3}, NULL]},
    "prompt_logprobs": {"enum": [None, 0, 2]},
    "logit_bias": {
        "anyOf": [{"type": "object", "properties": {"5": BIAS, "77": BIAS}, "additionalProperties": False}, NULL]
    },
    "response_format": {"enum": [None, {"type": "text"}, {"type": "json_object"}]},
    "tools": {"enum": [None, []]},
    **dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"]),
    **dict.fromkeys(["frequency_penalty", "seed", "include_stop_str_in_output", "skip_special_tokens", "stream"]),
    **dict.fromkeys(["echo", "user", "metadata", "parallel_tool_calls", "add_generation_prompt"]),
}


def named() -> dict[str, Any]:
    """The document, with the models that there are: others are soon refused."""
    document = copy.deepcopy(DOCUMENT)
    for name, shape in document["components"]["schemas"].items():
        if name.endswith("Request"):
            shape["properties"]["model"] = NAMES if "model" in shape["required"] else {"anyOf": [NAMES, NULL]}
    return document


def fitting() -> dict[str, Any]:
    """The document of the routes that generate, with bodies of `FITTING` fields alone."""
    document = copy.deepcopy(DOCUMENT)
    document["paths"] = {
        path: item for path, item in document["paths"].items() if item.get("post", {}).get("tags") == ["generation"]
    }
    for name in ("CompletionRequest", "ChatRequest", "ResponsesRequest"):
        body = document["components"]["schemas"][name]
        known = {field: told for field, told in body["properties"].items() if told.get("description") != "not served"}
        body["properties"] = {field: FITTING[field] or known[field] for field in known if field in FITTING}
        body["required"] += [field for field in known if field.startswith("max_")]
        body["additionalProperties"] = False
    return document


def written(value: Any) -> Any:
    """`value` with its whole numbers as JSON's usual writers put them: to a JSON schema 2.0 is an integer, too."""
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [written(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Bearer:
    """Sends the key that may do everything."""

    def get(self, case: object, context: object) -> str:
        return "Bearer k"

    def set(self, case: Any, data: str, context: object) -> None:
        case.headers["authorization"] = data


whatever = schemathesis.openapi.from_dict(named())
within = schemathesis.openapi.from_dict(fitting())
within.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE])
for schema in (whatever, within):
    schema.auth()(Bearer)


@pytest.fixture(scope="module")
def url(talking_model: Path, three_adapters: list[LoRARequest]) -> Iterator[str]:
    """A server that lets its adapters be changed."""
    engine = AsyncLLMEngine.from_engine_args(
        EngineArgs(model=str(talking_model), dtype="float32", enable_lora=True, max_model_len=64)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "1")
        app = create_app(engine, lora_modules=three_adapters, served_model_name="base", args=ARGS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@whatever.parametrize()
@settings(THOROUGH, max_examples=10)
def test_whatever_is_sent_the_answer_is_one_that_the_document_knows_and_no_server_error(case: Any, url: str) -> None:
    # what is valid by itself may still contradict something else, or name nothing
    case.call_and_validate(base_url=url, excluded_checks=[checks.positive_data_acceptance])


@within.parametrize()
@settings(THOROUGH, max_examples=25)
def test_what_the_document_allows_and_no_field_contradicts_is_answered(case: Any, url: str) -> None:
    case.body = written(case.body)
    response = case.call_and_validate(base_url=url)
    assert response.status_code in (200, 401), response.text
