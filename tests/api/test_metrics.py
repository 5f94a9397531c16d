"""GET /metrics: what was asked and answered, by adapter, under a bounded number of names."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aiolora.api import create_app
from aiolora.api.metrics import Meter
from aiolora.api.tally import Tallies
from aiolora.config import ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest
from tests.api.conftest import GENERATING, inside

Samples = dict[tuple[str, ...], float]


@pytest.fixture
async def client(byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest]) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(
        byte_engine, lora_modules=three_adapters, served_model_name="base", args=ServerArgs(adapter_labels=2)
    )
    async with inside(app) as client:
        yield client


async def scrape(client: httpx.AsyncClient) -> Samples:
    """(name, label values in their names' order, le left out) -> value; of a histogram the count and the sum."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def ask(client: httpx.AsyncClient, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "temperature": 0, **more}
    return await client.post("/v1/completions", json=body)


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_and_tokens_are_counted_for_all_and_by_adapter(client: httpx.AsyncClient, stream: bool) -> None:
    await ask(client, "base", stream=stream)
    await ask(client, "alpha", stream=stream)
    await ask(client, "alpha", n=2, stream=stream)
    found = await scrape(client)
    assert found["aiolora:prompt_tokens_total", "base"] == 9
    assert found["aiolora:generation_tokens_total", "base"] == 16
    assert found["aiolora:request_success_total", "length", "base"] == 4
    assert found["aiolora:adapter_requests_total", "alpha"] == 2
    assert found["aiolora:adapter_prompt_tokens_total", "alpha"] == 6
    assert found["aiolora:adapter_generation_tokens_total", "alpha"] == 12
    assert found["aiolora:adapter_generation_tokens_total", "base"] == 4
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found[f"aiolora:{name}_count", "base"] == 3
        assert found[f"aiolora:{name}_sum", "base"] > 0
    assert found["aiolora:inter_token_latency_seconds_count", "base"] == 3 + 3 + 6
    whole = found["aiolora:e2e_request_latency_seconds_sum", "base"]
    parts = [found[f"aiolora:request_{part}_time_seconds_sum", "base"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(whole)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
async def test_whatever_generates_is_counted(client: httpx.AsyncClient, path: str, stream: bool) -> None:
    response = await client.post(path, json={"model": "alpha", "stream": stream} | GENERATING[path])
    assert response.status_code == 200
    found = await scrape(client)
    assert found["aiolora:adapter_requests_total", "alpha"] == 1
    assert found["aiolora:adapter_generation_tokens_total", "alpha"] == 3
    assert found["aiolora:request_success_total", "length", "base"] == 1
    assert found["aiolora:e2e_request_latency_seconds_count", "base"] == 1


async def test_the_engines_gauges_are_read_when_asked(client: httpx.AsyncClient) -> None:
    await ask(client, "alpha")
    found = await scrape(client)
    assert found["aiolora:num_requests_running", "base"] == found["aiolora:num_requests_waiting", "base"] == 0
    assert found["aiolora:engine_steps_total", "base"] >= 4
    assert 0 <= found["aiolora:kv_cache_usage_perc", "base"] < 1
    assert found["aiolora:adapters_known",] == 3
    assert found["aiolora:adapters_loaded",] == 1
    assert found["aiolora:adapters_resident",] == found["aiolora:adapter_resident", "alpha"] == 1


async def test_adapters_beyond_the_limit_count_as_other(client: httpx.AsyncClient) -> None:
    for model in ("alpha", "beta", "gamma", "gamma"):
        await ask(client, model)
    found = await scrape(client)
    assert found["aiolora:adapter_requests_total", "other"] == 2
    assert ("aiolora:adapter_requests_total", "gamma") not in found
    assert found["aiolora:adapter_resident", "other"] == 1


async def test_a_client_that_leaves_is_an_abort_and_is_running_no_more(
    client: httpx.AsyncClient, byte_engine: AsyncLLMEngine
) -> None:
    answer = asyncio.ensure_future(ask(client, "alpha", max_tokens=1000))
    async with asyncio.timeout(30):
        while ("aiolora:lora_requests_info", "8", "alpha", "") not in await scrape(client):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    answer.cancel()
    await asyncio.gather(answer, return_exceptions=True)
    found = await scrape(client)
    assert found["aiolora:request_success_total", "abort", "base"] == 1
    assert ("aiolora:lora_requests_info", "8", "", "") in found


async def test_head_is_answered(client: httpx.AsyncClient) -> None:
    response = await client.head("/metrics")
    assert (response.status_code, response.content) == (200, b"")


def test_an_engine_that_has_not_started_has_no_gauges(byte_engine: AsyncLLMEngine) -> None:
    told = generate_latest(Meter(byte_engine, "base", adapter_labels=1).registry).decode()
    assert "aiolora:generation_tokens_total" in told
    assert "aiolora:num_requests_running" not in told


def test_sums_over_all_names_never_fall_while_adapters_come_and_go() -> None:
    known = {"a", "b"}
    tallies = Tallies(2, known.__contains__)

    def ask_once(name: str) -> None:
        tallies.of(name).requests += 1

    for name in ("a", "b", "c"):
        ask_once(name)
    assert {name: tally.requests for name, tally in tallies} == {"a": 1, "b": 1, "other": 1}
    known.remove("a")
    ask_once("d")
    assert {name: tally.requests for name, tally in tallies} == {"b": 1, "d": 1, "other": 2}


def test_a_tally_with_requests_under_way_is_kept() -> None:
    tallies = Tallies(1, lambda _: False)
    tallies.of("a").running += 1
    tallies.of("b").requests += 1
    assert tallies.named("a")
    assert not tallies.named("b")


def test_an_adapter_called_other_is_one_of_the_others() -> None:
    tallies = Tallies(5, lambda _: True)
    tallies.of("other").requests += 1
    assert [name for name, _ in tallies] == ["other"]


async def test_every_metric_of_the_dashboard_is_told(client: httpx.AsyncClient) -> None:
    await ask(client, "alpha")
    told = {
        sample.name
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
    }
    board = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text()
    asked = set(re.findall(r"aiolora:\w+", board))
    assert len(asked) > 15
    assert asked <= told
