"""Every example runs as it is printed, from the repository's root, beside a small hub instead of the real one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from examples.local_hub import REPOSITORIES, LocalHub

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What an example sees: the hub beside it, an empty cache of the hub's, the `aiolora` of this Python."""
    with LocalHub(REPOSITORIES).running() as hub:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        home = str(tmp_path_factory.mktemp("hf"))
        offline = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        yield offline | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "PATH": path, "PYTHONPATH": str(ROOT / "src")}


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


@contextmanager
def serving(command: list[str], environment: dict[str, str], port: int) -> Iterator[str]:
    """The URL of what `command` serves, once it answers. Ends it by SIGTERM, and well."""
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(server, url)
            yield url
        finally:
            server.terminate()
            server.communicate(timeout=60)
            assert server.returncode == 0, "SIGTERM drains, stops the engine and ends well"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def served(environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The script named by the parameter, serving; AIOLORA_URL says where."""
    port = free_port()
    command = [f"examples/online_serving/{request.param}", "--port", str(port), "--max-model-len", "1024"]
    with serving(command, environment, port) as url:
        yield environment | {"AIOLORA_URL": url}


def _wait_until_ready(server: "subprocess.Popen[str]", url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise AssertionError(server.stderr.read() if server.stderr else "the server ended")
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the server did not get ready")


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


# ---- documents ----


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("make")), reason="the documents call curl and make")
@pytest.mark.parametrize("document", ["README.md", "docs/adapters.md"])
def test_every_block_of_a_document_runs_as_printed_or_is_marked_as_text(
    document: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """A server that a block starts serves the blocks behind it, until one starts another."""
    port = free_port()
    stand_ins = {
        "make ": "make --dry-run ",  # that would be this very test
        ".venv/bin/aiolora": "aiolora",
        "aiolora serve": f"exec aiolora serve --port {port} --max-model-len 1024",
        "localhost:8000": f"127.0.0.1:{port}",
        "curl ": "curl --silent --fail-with-body ",
        "/path/to/lora/directory": str(tmp_path),
    }
    blocks = re.findall(r"^```(\S*)\n(.*?)^```$", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert {"python", "sh", "bash"} & {language for language, _ in blocks}
    with ExitStack() as servers:
        for language, code in blocks:
            assert language in ("python", "sh", "bash", "text"), f"{document}: say what this is: {code}"
            if language == "python":
                run([sys.executable, "-c", code], environment)
            elif language != "text":
                for printed, instead in stand_ins.items():
                    code = code.replace(printed, instead)
                shell = ["bash", "-ec", code]
                if "aiolora serve" in code:
                    servers.close()
                    servers.enter_context(serving(shell, environment, port))
                else:
                    run(shell, environment)
