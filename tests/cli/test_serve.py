"""`aiolora serve` as a process: it says where it listens, and SIGTERM lets what is under way end."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers may last for a second or more: a client on a busy machine is to come while one is under way."""
    return make_model(tmp_path_factory.mktemp("serve"), vocab_size=320, max_position_embeddings=1024)


@asynccontextmanager
async def serving(*argv: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The process and its URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aiolora",
        "serve",
        *argv,
        "--port",
        "0",
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    said = []
    try:
        async with asyncio.timeout(120):
            async for line in process.stderr:
                said.append(line.decode())
                if found := re.search(r"ready at (http://\S+)", said[-1]):
                    yield process, found[1]
                    break
            else:
                pytest.fail("it did not start:\n" + "".join(said))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_sigterm_lets_a_stream_end_and_sends_new_requests_elsewhere(model: Path) -> None:
    async with (
        serving(str(model), "--served-model-name", "base") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        length = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        body = {"model": "base", "prompt": "x", "max_tokens": length - 8, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            frames = answer.aiter_lines()
            await anext(frames)
            process.send_signal(signal.SIGTERM)
            while (refused := await client.post("/v1/completions", json=body | {"max_tokens": 1})).status_code == 200:
                pass
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            last = [line async for line in frames if line][-1]
        assert last == "data: [DONE]"
        assert await process.wait() == 0


async def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    async with (
        serving(str(model), "--served-model-name", "base") as (process, url),
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        body = {"model": "base", "prompt": "x", "max_tokens": 10_000_000, "stream": True, "ignore_eos": True}
        body["max_tokens"] = (await client.get("/v1/models")).json()["data"][0]["max_model_len"] - 8
        async with client.stream("POST", "/v1/completions", json=body | {"n": 16}) as answer:
            await anext(answer.aiter_lines())
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            async with asyncio.timeout(20):
                assert await process.wait() == 0
