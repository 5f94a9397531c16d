"""The command line: flags from EngineArgs, both forms of --lora-modules, pull, generate, demo, errors in one line."""

import argparse
import io
import shutil
from pathlib import Path

import pytest
from msgspec.structs import fields

from aiolora.cli import main
from aiolora.cli.flags import add_engine_flags, engine_args, lora_modules, lora_policies
from aiolora.config import EngineArgs
from aiolora.errors import ConfigError
from aiolora.types import AdapterPolicy, LoRARequest
from tests.conftest import ModelOf
from tests.tiny import make_adapter


def parsed(*argv: str) -> EngineArgs:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    return engine_args(parser.parse_args(argv))


def test_every_field_of_engine_args_has_its_flag() -> None:
    help_text = main_help("serve")
    for field in fields(EngineArgs):
        assert field.name == "model" or "--" + field.name.replace("_", "-") in help_text


def main_help(command: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.stdout", out)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        return out.getvalue()


def test_flags_give_the_same_engine_args_as_keywords() -> None:
    flags = "--enable-lora --max-loras 3 --max-lora-rank 32 --max-cpu-loras 9 --no-enable-prefix-caching --seed 7"
    given = parsed("m", *flags.split(), "--lora-target-modules", "q_proj", "v_proj", "--dtype", "float32")
    assert given == EngineArgs(
        model="m",
        enable_lora=True,
        max_loras=3,
        max_lora_rank=32,
        max_cpu_loras=9,
        enable_prefix_caching=False,
        seed=7,
        lora_target_modules=("q_proj", "v_proj"),
        dtype="float32",
    )
    assert parsed("m") == EngineArgs(model="m")


def test_a_default_adapter_a_modality_is_json() -> None:
    default = ("--enable-lora", "--default-mm-loras", '{"audio": "org/repo"}')
    args = parsed("m", *default, "--allowed-media-domains", "a.com", "b.com")
    assert args.default_mm_loras == {"audio": "org/repo"}
    assert args.allowed_media_domains == ("a.com", "b.com")
    assert parsed("m").allowed_media_domains == ()
    for said in ("audio=x", '["a"]', '{"audio": 3}'):
        with pytest.raises(SystemExit):
            parsed("m", "--default-mm-loras", said)


def test_lora_modules_take_both_forms_and_turn_lora_on() -> None:
    modules = ["sql=/a/b=c", '{"name": "x", "path": "org/repo", "base_model_name": "base"}']
    assert lora_modules(modules) == [LoRARequest("sql", 1, "/a/b=c"), LoRARequest("x", 2, "org/repo", "base")]
    assert parsed("m", "--lora-modules", *modules).enable_lora


def test_a_lora_module_may_say_what_it_may_take() -> None:
    modules = ["sql=/a", '{"name": "x", "path": "/b", "policy": {"weight": 2, "tokens_per_minute": 100}}']
    assert lora_policies(modules) == {"x": AdapterPolicy(weight=2.0, tokens_per_minute=100)}


@pytest.mark.parametrize(
    "item",
    [
        "name",
        "=path",
        "name=",
        "{",
        '{"name": "x"}',
        '{"name": "x", "path": "p", "rank": 8}',
        '{"name": "x", "path": "p", "policy": {"weight": -1}}',
        "[]",
    ],
)
def test_a_wrong_lora_module_is_named_with_the_way_out(item: str) -> None:
    with pytest.raises(ConfigError, match="write name=path or"):
        lora_modules([item])


def test_a_flag_of_several_values_may_come_again() -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    args = parser.parse_args(["m", "--lora-modules", "a=1", "--lora-modules", "b=2", "c=3"])
    assert [module.lora_name for module in lora_modules(args.lora_modules)] == ["a", "b", "c"]


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        lora_modules(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["generate", "/nowhere"], "/nowhere"),
        (["generate", "m", "--max-loras", "4", "--max-cpu-loras", "2"], "max_cpu_loras=2 is under max_loras=4"),
        (["generate", "m", "--max-loras", "0"], "max_loras=0"),
        (["generate", "m", "--temperature", "nan"], "temperature=nan"),
        (["generate", "m", "--lora", "sql", "--lora-modules", "json=x"], "--lora sql"),
        (["serve", "m", "--lora-modules", "broken"], "broken"),
        (["serve", "m", "--served-model-name", "sql", "--lora-modules", "sql=x"], "name of the base model"),
        (["demo", "--adapters", "/nowhere"], "/nowhere"),
        (["pull", "no such model"], "no such model"),
    ],
)
def test_a_users_error_is_one_line_and_status_1(
    argv: list[str], culprit: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert culprit in printed
    assert printed.count("\n") == 1


def test_generate_streams_the_adapters_answer(
    model_of: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(model_of("llama"))
    adapter = make_adapter(model_of("llama"), tmp_path / "adapter", strength=4.0)
    common = [base, "--prompt", "w50 w60 w70", "--max-tokens", "6", "--dtype", "float32"]
    assert main(["generate", *common]) == 0
    of_base = capsys.readouterr().out
    assert main(["generate", *common, "--lora-modules", f"a={adapter}", "--lora", "a"]) == 0
    of_adapter = capsys.readouterr().out
    assert of_base.strip()
    assert of_adapter.strip() != of_base.strip()


def test_pull_prints_the_folder_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm2-135m"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    names = {file.name for file in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}


def test_demo_answers_side_by_side_and_says_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, root = tmp_path / "adapters", Path(__file__).parent.parent
    shutil.copytree(root / "examples/adapters", adapters)
    shutil.copytree(adapters / "sql", adapters / "loha")
    config = adapters / "loha" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"LOHA"'))
    assert main(["demo", "--adapters", str(adapters), "--prompt", "Tell me about a cat.", "--max-tokens", "8"]) == 0
    printed = capsys.readouterr().out
    assert "5 streams over base and 4 adapters in one batch: " in printed
    assert "refused: adapter 'loha'" in printed
    assert "serve smollm2-135m --lora-modules" in printed
    assert "then open http://127.0.0.1:8000/" in printed
