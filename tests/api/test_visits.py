"""Request ids and the log of requests: every answer has an id, and no line tells what was said."""

import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from aiolora.api import create_app
from aiolora.config import ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest
from tests.api.conftest import GENERATING, Standing, inside

SECRET = "a secret thing"


@pytest.fixture
async def client(byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest]) -> AsyncIterator[httpx.AsyncClient]:
    args = ServerArgs(api_key=('{"key": "k", "name": "team-a"}',))
    app = create_app(byte_engine, lora_modules=three_adapters, served_model_name="base", args=args)
    async with inside(app) as client:
        client.headers["authorization"] = "Bearer k"
        yield client


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "aiolora.access"]


async def test_the_clients_request_id_comes_back_and_others_are_made() -> None:
    async with inside(create_app(Standing(started=True))) as client:
        for path in ("/version", "/no/such/route", "/v1/models/x"):
            response = await client.get(path, headers={"x-request-id": "mine-1"})
            assert response.headers["x-request-id"] == "mine-1"
        made = [(await client.get("/version")).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]


@pytest.mark.parametrize("said", ["", "two words", "x" * 129, "caf\u00e9"])
async def test_an_id_that_is_no_short_word_is_replaced(said: str) -> None:
    async with inside(create_app(Standing(started=True))) as client:
        response = await client.get("/version", headers={"x-request-id": said.encode("latin-1")})
        assert response.headers["x-request-id"] != said
        assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", GENERATING)
async def test_the_log_names_who_asked_what_for_how_much_and_not_what_was_said(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"model": "alpha", "stream": stream} | json.loads(json.dumps(GENERATING[path]).replace("hello", SECRET))
    response = await client.post(path, json=body, headers={"x-request-id": "id-7"})
    assert response.status_code == 200
    [record] = lines(caplog)
    fields = record.__dict__["fields"]
    wanted = {"method": "POST", "path": path, "status": 200, "request_id": "id-7", "key": "team-a"}
    assert wanted.items() <= fields.items()
    length = len(byte_engine.intake.tokenizer.encode(SECRET if "prompt" in body else f"user: {SECRET}\n"))
    assert {"model": "alpha", "prompt_tokens": length, "generated_tokens": 3}.items() <= fields.items()
    assert fields["duration_ms"] > 0
    assert "secret" not in caplog.text
    assert record.getMessage().startswith(f"POST {path} 200 ")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"prompt": SECRET}, 200),
        ("/tokenize", {"messages": [{"role": SECRET, "content": SECRET}]}, 400),
        ("/detokenize", {"tokens": list(SECRET.encode())}, 200),
        ("/v1/embeddings", {"input": SECRET}, 404),
        ("/v1/completions", {"prompt": SECRET, "structured_outputs": {"regex": f"({SECRET}"}}, 400),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 9, "structured_outputs": {"choice": [SECRET]}}, 200),
        ("/v1/responses", {"input": SECRET, "tools": [{"type": "function", "name": SECRET}]}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": SECRET}]}]}, 400),
    ],
)
async def test_what_is_tokenised_refused_or_prescribed_is_not_logged_either(
    client: httpx.AsyncClient,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    path: str,
    body: dict[str, object],
    status: int,
) -> None:
    caplog.set_level(logging.DEBUG)
    response = await client.post(path, json={"model": "alpha"} | body)
    assert response.status_code == status, response.text
    [record] = lines(caplog)
    assert record.__dict__["fields"]["status"] == status
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


async def test_a_refused_request_is_logged_in_one_line_whatever_its_path(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiolora.access")
    await client.get("/nothing%0Ahere", headers={"authorization": ""})
    [record] = lines(caplog)
    assert "\n" not in record.getMessage()
    assert record.__dict__["fields"]["status"] == 404


async def test_probes_that_find_all_well_are_not_logged(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiolora.access")
    for path in ("/health", "/ready", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert not lines(caplog)


async def test_the_log_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiolora.access")
    async with inside(create_app(Standing(started=True), args=ServerArgs(access_log=False))) as client:
        assert (await client.get("/version")).status_code == 200
    assert not lines(caplog)
