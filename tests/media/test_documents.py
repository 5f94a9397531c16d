"""Every block of docs/multimodal.md runs as printed, over small models under the names of large ones."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from examples.local_hub import LocalHub
from tests.media.tiny import make_granite_speech, make_llava, make_mm_adapter, picture

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/multimodal.md").read_text()
BLOCKS = re.findall(r"^<!-- not run: .*? -->\n```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [code for language, code in BLOCKS if language == "bash"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is: an image and an adapter are there."""
    folder = tmp_path_factory.mktemp("reader")
    llava = make_llava(folder / "llava")
    make_mm_adapter(llava, folder / "labels-lora")
    Image.fromarray(picture(1)).save(folder / "label.png")
    granite = make_granite_speech(folder / "granite", "llama")
    make_mm_adapter(granite, granite, target_modules=r".*language_model.*(q_proj|v_proj)")
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> Iterator[dict[str, str]]:
    repositories = {
        "llava-hf/llava-1.5-7b-hf": folder / "llava",
        "ibm-granite/granite-speech-3.3-2b": folder / "granite",
    }
    with LocalHub(repositories).running() as hub:
        online = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        yield online | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "PYTHONPATH": paths}


def test_the_page_has_two_scripts_and_two_servers() -> None:
    assert [language for language, _ in BLOCKS] == ["python", "bash", "bash", "python", "bash"]


@pytest.mark.parametrize("code", SCRIPTS, ids=["image", "recording"])
def test_a_script_runs(code: str, folder: Path, environment: dict[str, str]) -> None:
    run([sys.executable, "-c", code], folder, environment)


def test_a_server_answers_about_an_image_and_another_starts_with_its_default_adapter(
    folder: Path, environment: dict[str, str]
) -> None:
    images, ask, recordings = COMMANDS
    with serving(images, folder, environment) as (address, models):
        assert models[1:] == ["labels"]
        command = ask.replace("localhost:8000", address).replace("curl", "curl -sS --fail-with-body")
        assert '"finish_reason"' in run(["bash", "-ec", command], folder, environment)
    with serving(recordings, folder, environment) as (_, models):
        assert models[1:] == ["audio"]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def serving(printed: str, folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Its address and its models, once it lists them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = f"exec {sys.executable} -m aiolora serve --port {address.partition(':')[2]} --max-model-len 256"
    command = ["bash", "-ec", printed.replace("aiolora serve", started)]
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield address, _models(server, address)
        finally:
            server.terminate()
            server.communicate(timeout=60)


def _models(server: "subprocess.Popen[str]", address: str) -> list[str]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stderr and server.stderr.read()
        try:
            return [card["id"] for card in httpx.get(f"http://{address}/v1/models").json()["data"]]
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError("the server did not get ready")
