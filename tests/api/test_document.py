"""The OpenAPI document: bodies, keys and failures of every route, by shapes that are there."""

import re
from typing import Any

import msgspec
import pytest

from aiolora.api import create_app
from aiolora.config import ServerArgs
from aiolora.types import SamplingParams
from tests.api.conftest import NAMING, Standing

ADMIN = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters/{name_and_verb}"}


def document(**args: Any) -> dict[str, Any]:
    app = create_app(Standing(started=True), args=ServerArgs(**args))
    told: dict[str, Any] = msgspec.to_builtins(app.openapi_schema.to_schema())
    return told


def test_every_route_that_reads_a_body_tells_its_shape_and_how_it_is_refused() -> None:
    told = document()
    posts = {path: item["post"] for path, item in told["paths"].items() if "post" in item}
    assert set(posts) == {*NAMING, *ADMIN, "/v1/embeddings"}
    for path in posts.keys() - {"/v1/embeddings"}:
        assert posts[path]["requestBody"]["content"]["application/json"]["schema"]
        assert {"400", "404", "413", "500", "503"} <= set(posts[path]["responses"])


def test_every_shape_that_is_referred_to_is_there() -> None:
    told = document()
    places = re.findall(r'"#/components/schemas/(\w+)"', msgspec.json.encode(told).decode())
    assert {"ChatRequest", "ChatCompletion", "ErrorBody"} <= set(places) <= set(told["components"]["schemas"])


def test_bodies_have_the_bounds_and_words_of_sampling_params() -> None:
    shapes = document()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "ResponsesRequest"):
        told = shapes[name]["properties"]["top_p"]
        assert told["anyOf"] == [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}]
        assert told["default"] == SamplingParams().top_p
        assert "smallest set" in told["description"]


@pytest.mark.parametrize(
    ("args", "with_key", "admin_alone"),
    [({}, False, False), ({"api_key": ("a",)}, True, True), ({"admin_key": ("a",)}, False, True)],
)
def test_a_route_tells_of_a_key_where_it_takes_one(args: dict[str, Any], with_key: bool, admin_alone: bool) -> None:
    paths = document(**args)["paths"]
    for path, item in paths.items():
        for operation in item.values():
            is_open = path in ("/health", "/ready", "/version")
            needed = not is_open and (admin_alone if path in ADMIN else with_key)
            assert ("security" in operation, "401" in operation["responses"]) == (needed, needed), path
