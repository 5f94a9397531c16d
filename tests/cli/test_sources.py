"""Flags from a file and from the environment: what is typed wins over variables, and those over the file."""

import argparse
from pathlib import Path

import pytest

from aiolora.cli import main
from aiolora.cli.flags import engine_args, lora_modules, server_args
from aiolora.cli.serve import register
from aiolora.cli.sources import with_sources
from aiolora.config import EngineArgs
from aiolora.errors import ConfigError
from aiolora.types import LoRARequest


def serve_parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser().add_subparsers()
    register(commands)
    return commands.choices["serve"]


def parsed(*argv: str) -> argparse.Namespace:
    parser = serve_parser()
    return parser.parse_args(with_sources(parser, list(argv)))


def written(folder: Path, text: str) -> str:
    file = folder / "config.yaml"
    file.write_text(text)
    return str(file)


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
        model: some-model
        max-loras: 16
        enable_prefix_caching: false
        enable-lora: true
        dtype: float32
        port: 9000
        access-log: no
        lora-modules:
          - sql=/a
          - {name: json, path: /b}
        api-key:
          - {key: k, adapters: [sql]}
        max-model-len: null
        """,
    )
    args = parsed("--config", file)
    assert engine_args(args) == EngineArgs(
        model="some-model", max_loras=16, enable_prefix_caching=False, enable_lora=True, dtype="float32"
    )
    assert args.port == 9000
    assert lora_modules(args.lora_modules) == [LoRARequest("sql", 1, "/a"), LoRARequest("json", 2, "/b")]
    assert not server_args(args).access_log
    assert server_args(args).api_key == ('{"key":"k","adapters":["sql"]}',)


def test_lora_modules_may_be_a_mapping_of_names_to_paths(tmp_path: Path) -> None:
    args = parsed("m", "--config", written(tmp_path, "lora-modules: {a: /x, b: /y}"))
    assert [(one.lora_name, one.lora_path) for one in lora_modules(args.lora_modules)] == [("a", "/x"), ("b", "/y")]


def test_typed_wins_over_variables_and_those_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "{model: of-file, port: 1, host: of-file, max-loras: 3, api-key: [of-file]}")
    monkeypatch.setenv("AIOLORA_PORT", "2")
    monkeypatch.setenv("AIOLORA_HOST", "of-variable")
    monkeypatch.setenv("AIOLORA_API_KEY", "one, two")
    args = parsed("--port=3", "of-line", "--config", file)
    assert (args.model, args.port, args.host, args.max_loras) == ("of-line", 3, "of-variable", 3)
    assert args.api_key == ["one", "two"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "3", "m"],
        ["m", "--port", "3"],
        ["--no-access-log", "m"],
        ["--lora-modules", "a=b", "--port", "3", "m"],
    ],
)
def test_a_typed_model_is_found_wherever_it_stands(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOLORA_MODEL", "other")
    assert parsed(*argv).model == "m"


def test_a_variable_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOLORA_CONFIG", written(tmp_path, "port: 7"))
    assert parsed("m").port == 7


def test_a_switch_takes_yes_or_no_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOLORA_ENABLE_LORA", "true")
    assert parsed("m").enable_lora
    monkeypatch.setenv("AIOLORA_ENABLE_LORA", "maybe")
    with pytest.raises(ConfigError, match="AIOLORA_ENABLE_LORA='maybe'"):
        parsed("m")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("max-lorass: 3", "'max-lorass' is no flag of this command; did you mean 'max-loras'?"),
        ("[1, 2]", "give the names of flags as keys"),
        ("a: [", "while parsing"),
        ("help: true", "'help' is no flag"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_culprit(
    text: str, culprit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", "--config", written(tmp_path, text)]) == 1
    printed = capsys.readouterr().err
    assert culprit in printed
    assert printed.count("\n") == 1


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--config", "/nowhere.yaml"]) == 1
    assert "/nowhere.yaml" in capsys.readouterr().err


def test_a_value_of_the_file_is_checked_as_a_typed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "m", "--config", written(tmp_path, "dtype: int3")])
    assert "--dtype: invalid choice: 'int3'" in capsys.readouterr().err
