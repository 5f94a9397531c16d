"""Every example runs as it is printed, from the repository's root, beside a small hub instead of the real one."""

import json
import shutil
import sys
from collections.abc import Iterator

import httpx
import pytest

from examples.local_hub import REPOSITORIES, LocalHub
from tests import commands
from tests.commands import free_port, run, serving


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What an example sees: the hub beside it, an empty cache of the hub's, the `aiolora` of this Python."""
    with LocalHub(REPOSITORIES).running() as hub:
        yield commands.environment() | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}


def example(name: str, environment: dict[str, str]) -> str:
    return run([sys.executable, f"examples/{name}"], environment)


def test_the_quick_start_downloads_an_adapter_and_generates_with_it(environment: dict[str, str]) -> None:
    assert "Generated SQL: " in example("offline_inference/quickstart.py", environment)


def test_the_stepped_engine_finishes_base_and_adapter_requests(environment: dict[str, str]) -> None:
    printed = example("offline_inference/multilora_inference.py", environment)
    for number in range(4):
        assert f"Request {number}: " in printed


def test_the_complete_example_prints_an_answer_of_the_base_and_two_of_the_adapter(environment: dict[str, str]) -> None:
    printed = example("offline_inference/complete_example.py", environment)
    assert [line for line in printed.splitlines() if line.startswith("Adapter: ")] == [
        "Adapter: base",
        "Adapter: sql",
        "Adapter: sql",
    ]


def test_the_memory_example_starts_with_its_arguments(environment: dict[str, str]) -> None:
    assert "running=0" in example("offline_inference/memory.py", environment)


def test_the_async_example_streams_three_models_at_once(environment: dict[str, str]) -> None:
    printed = example("async_stream.py", environment)
    assert {line.split(":")[0] for line in printed.splitlines()} >= {"base", "sql", "pirate"}


@pytest.fixture
def served(environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The script named by the parameter, serving; AIOLORA_URL says where."""
    port = free_port()
    command = [f"examples/online_serving/{request.param}", "--port", str(port), "--max-model-len", "1024"]
    with serving(command, environment, port) as url:
        yield environment | {"AIOLORA_URL": url}


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="the scripts call curl and jq")
@pytest.mark.parametrize("served", ["serve.sh"], indirect=True)
def test_the_server_answers_curl_by_adapter_name_and_lists_its_models(served: dict[str, str]) -> None:
    completion = json.loads(run(["examples/online_serving/completions.sh"], served))
    assert completion["model"] == "sql-lora"
    assert completion["choices"][0]["text"]
    models = json.loads(run(["examples/online_serving/models.sh"], served))
    assert [(model["id"], model["owned_by"]) for model in models["data"]] == [
        ("smollm2-135m", "aiolora"),
        ("sql-lora", "aiolora"),
        ("adapter", "aiolora"),
    ]


@pytest.mark.parametrize("served", ["serve_json.sh"], indirect=True)
def test_the_json_form_of_lora_modules_keeps_the_lineage(served: dict[str, str]) -> None:
    models = httpx.get(f"{served['AIOLORA_URL']}/v1/models").json()["data"]
    assert models[1]["parent"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models[1]["root"] == "aiolora/smollm2-135m-sql"
