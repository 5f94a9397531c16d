"""`aiolora doctor`, `completion`, `key`, and --help: what somebody sees first."""

import re
from hashlib import sha256
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from aiolora.cli import main
from aiolora.cli.doctor import of_machine, of_model
from aiolora.ops.machine import GPU, Machine

LAPTOP = {
    "torch": "2.13.0+cpu",
    "cuda": None,
    "gpus": (),
    "triton": False,
    "gpu_kernels": False,
    "cores": 4,
    "memory_nbytes": 16 << 30,
    "bfloat16": False,
    "compiler": "/usr/bin/cc",
    "native": True,
}
CARD = {"cuda": "13.0", "gpus": (GPU("H100", (9, 0), 80 << 30),)}


@pytest.mark.parametrize(
    ("changes", "about", "state", "says"),
    [
        ({}, "GPU", "off", "built for the CPU only"),
        ({"cuda": "13.0"}, "GPU", "off", "finds no GPU"),
        (CARD | {"triton": True, "gpu_kernels": True}, "GPU", "ok", r"H100 \(80 GiB\), CUDA 13.0"),
        (CARD, "GPU", "slow", "Triton is missing"),
        ({}, "CPU", "ok", "dtype auto is float32"),
        ({"bfloat16": True}, "CPU", "ok", "dtype auto is bfloat16"),
        ({}, "CPU kernels", "ok", "/usr/bin/cc"),
        ({"native": False}, "CPU kernels", "slow", "could not compile"),
        ({"native": False, "compiler": None}, "CPU kernels", "slow", "no C compiler"),
    ],
)
def test_a_machine_is_judged(changes: dict[str, object], about: str, state: str, says: str) -> None:
    [found] = [found for found in of_machine(Machine(**LAPTOP | changes)) if found.about == about]  # type: ignore[arg-type]
    assert found.state == state
    assert re.search(says, found.says)
    assert found.way_out or state == "ok"


def test_doctor_runs_here_and_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("aiolora.cli.doctor._is_there", lambda package: package != "matplotlib")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "aiolora bench --plot: without matplotlib" in printed
    assert "pip install 'aiolora[plots]'" in printed


WAYS = {
    "llama": ("ok", "llama by our decoder"),
    "qwen2_audio": ("ok", "qwen2_audio by our decoder, audio by transformers' tower"),
    "gpt2": ("slow", "gpt2 by transformers' code .*: our decoder has the families .*llama"),
    "bloom": ("slow", "bloom by transformers' code .*one sequence of a step after the other"),
    "mamba": ("bad", "'mamba' is not served: our decoder has .*; transformers' code .* linear_attention keep a state"),
}


@pytest.mark.parametrize("kind", WAYS)
def test_the_way_of_a_model_is_told_with_its_reasons(kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    found = of_model(str(tmp_path))
    state, says = WAYS[kind]
    assert found.state == state
    assert re.fullmatch(f".*{says}.*", found.says)


def test_doctor_says_of_a_model_that_is_not_there_that_it_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["doctor", str(tmp_path)]) == 1
    assert "holds no config.json" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_bad(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIOLORA_CACHE", str(tmp_path / "x"))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["doctor"]) == 1
    assert "AIOLORA_CACHE" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--max-loras" in script
    assert "throughput" in script


def test_a_key_is_new_each_time_and_comes_with_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        assert main(["key"]) == 0
        [_, key, _, hashed] = capsys.readouterr().out.split()
        assert hashed == "sha256:" + sha256(key.encode()).hexdigest()
        found.append(key)
    assert found[0] != found[1]


def test_serves_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    printed = capsys.readouterr().out
    assert [printed.index(f"\n{title}:\n") for title in ("model", "adapters", "machine", "server")] == sorted(
        printed.index(f"\n{title}:\n") for title in ("model", "adapters", "machine", "server")
    )
