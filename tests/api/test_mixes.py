"""Several weighted adapters in one request, the scale of one, and priorities: what OpenAI's API does not have."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import BASE

BODY: dict[str, Any] = {"model": BASE, "prompt": "SELECT", "max_tokens": 6, "temperature": 0}


async def completed(http: httpx.AsyncClient, **said: Any) -> tuple[str, str | None]:
    """The text, and the adapters that the response names, without their digests."""
    answer = await http.post("/v1/completions", json=BODY | said)
    assert answer.status_code == 200, answer.text
    header = answer.headers.get("x-aiolora-adapter")
    names = None if header is None else "+".join(part.partition("@")[0] for part in header.split("+"))
    return answer.json()["choices"][0]["text"], names


async def refused(http: httpx.AsyncClient, **said: Any) -> tuple[int, str | None, str]:
    answer = await http.post("/v1/completions", json=BODY | said)
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


async def test_one_adapter_of_weight_one_is_that_adapter(http: httpx.AsyncClient) -> None:
    by_model = await completed(http, model="sql")
    assert by_model[1] == "sql"
    assert await completed(http, lora={"sql": 1}) == by_model
    assert (await completed(http, lora={"sql": 0.0}))[0] == (await completed(http))[0], "a weight of 0 is the base"


async def test_a_mix_weights_its_adapters_and_the_response_names_them_all(http: httpx.AsyncClient) -> None:
    mixed = await completed(http, lora={"sql": 1, "pirate": 0.0})
    assert mixed == ((await completed(http, model="sql"))[0], "sql+pirate")
    messages = [{"role": "user", "content": "Hello"}]
    chat = await http.post(
        "/v1/chat/completions",
        json={"model": BASE, "messages": messages, "max_tokens": 4, "lora": {"sql": 0.3, "json": 0.7}},
    )
    assert chat.status_code == 200
    assert "+json@" in chat.headers["x-aiolora-adapter"]
    said = {"model": BASE, "input": "Hello", "max_output_tokens": 4, "lora": {"sql": 0.3, "json": 0.7}, "priority": 1}
    other = await http.post("/v1/responses", json=said)
    assert other.status_code == 200
    assert other.headers["x-aiolora-adapter"] == chat.headers["x-aiolora-adapter"]


@pytest.mark.parametrize(
    ("lora", "status", "message"),
    [
        ({}, 400, "name: weight"),
        ({"sql": 101}, 400, "weight 101.0 of 'sql'"),
        ({"sql": "much"}, 400, "Expected `float`"),
        ({"slq": 1}, 404, "did you mean 'sql'"),
        ({"sql": 1, BASE: 1}, 400, "is the base model"),
        (["sql"], 400, "Expected `object | null`"),
        ({f"a{number}": 1 for number in range(17)}, 400, "names 17 adapters; a request takes up to 16"),
    ],
)
async def test_what_is_wrong_with_a_mix_is_said_of_lora(
    http: httpx.AsyncClient, lora: object, status: int, message: str
) -> None:
    seen, param, said = await refused(http, lora=lora)
    assert (seen, (param or "").partition(".")[0].partition("[")[0]) == (status, "lora"), said
    assert message in said


async def test_a_mix_goes_with_the_base_model_only(http: httpx.AsyncClient) -> None:
    status, param, message = await refused(http, model="sql", lora={"json": 1})
    assert (status, param) == (400, "lora")
    assert f"set model to '{BASE}'" in message


async def test_a_priority_out_of_bounds_is_refused_and_one_within_changes_no_token(http: httpx.AsyncClient) -> None:
    assert await completed(http, priority=-3) == await completed(http)
    status, param, message = await refused(http, priority=1001)
    assert (status, param) == (400, "priority")
    assert "-1000 to 1000" in message
