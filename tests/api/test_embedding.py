"""The app under a path of another one: one engine for both, which lives and ends with the host."""

import importlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn

from aiolora.engine.async_engine import AsyncLLMEngine
from tests.api.browser import browsing
from tests.api.conftest import TLS


@pytest.fixture(scope="module", params=["litestar_app", "starlette_app", "fastapi_app"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a host app of examples/, and then the end of its engine."""
    pytest.importorskip(request.param.removesuffix("_app"))
    module = importlib.import_module(f"examples.embedding.{request.param}")
    server = uvicorn.Server(uvicorn.Config(module.app, port=0, ws="none", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the host did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
    engine: AsyncLLMEngine = module.engine
    assert engine.death is not None, "the engine outlived its host"


@pytest.fixture
async def client(host: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=host, timeout=120, verify=TLS) as client:
        yield client


async def test_the_api_is_under_its_path_and_nowhere_else(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/ai/v1/models")).json()["data"]
    assert [card["id"] for card in listed] == ["smollm2-135m", "pirate"]
    assert (await client.get("/ai/v1/models/pirate")).json()["id"] == "pirate"
    assert (await client.get("/v1/models")).status_code == 404
    for path in ("/ai/health", "/ai/ready", "/ai/metrics", "/ai/docs", "/ai/"):
        response = await client.get(path, follow_redirects=True)
        assert response.status_code == 200, path
        assert response.headers["x-request-id"]


async def test_the_host_and_the_api_answer_from_one_engine(client: httpx.AsyncClient) -> None:
    question = "Tell me about a cat."
    own = await client.get("/pirate", params={"question": question})
    body = {"model": "pirate", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 32}
    through = await client.post("/ai/v1/chat/completions", json=body)
    answer = through.json()["choices"][0]["message"]["content"]
    assert own.text[:24] == answer[:24]  # in bfloat16 a prompt out of the cache may round a near tie the other way
    assert len(own.text) > 24


async def test_a_stream_through_the_mount_comes_piece_by_piece(client: httpx.AsyncClient) -> None:
    body = {"model": "pirate", "prompt": "Ahoy", "max_tokens": 8, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/ai/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = [line async for line in response.aiter_lines() if line]
    assert len(frames) == 9
    assert frames[-1] == "data: [DONE]"


async def test_an_unknown_route_and_model_are_refused_in_openais_shape(client: httpx.AsyncClient) -> None:
    for response in (
        await client.get("/ai/v1/nothing"),
        await client.post("/ai/v1/completions", json={"model": "pirat", "prompt": "x"}),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_the_page_works_under_the_path(host: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with browsing(tmp_path_factory.mktemp("profile")) as page:
        await page.open(f"{host}/ai")
        await page.until("document.querySelectorAll('.chip').length === 2")
        assert await page.evaluate("document.getElementById('docs').pathname") == "/ai/docs"
        assert page.errors == []
