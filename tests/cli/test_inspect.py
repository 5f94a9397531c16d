"""`aiolora inspect`: what an adapter holds, and the verdict of a server that is not there."""

import json
from pathlib import Path

import pytest
import torch

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.cli import main
from tests import HUB
from tests.conftest import ModelOf
from tests.tiny import make_adapter, reconfigure, rewrite


@pytest.fixture
def base(model_of: ModelOf) -> Path:
    return model_of("llama")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter", rank_pattern={"v_proj": 4}, dtype=torch.float16)


def row(printed: str, module: str) -> list[str]:
    return next(line for line in printed.splitlines() if module in line and "│" in line).strip("│ ").split()[::2]


def test_it_says_what_an_adapter_holds(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr().out
    assert row(printed, "self_attn.q_proj") == ["self_attn.q_proj", "4", "8", "float16", "4,096"]
    assert row(printed, "self_attn.v_proj") == ["self_attn.v_proj", "4", "4", "float16", "1,536"]
    assert "lora_alpha: 16" in printed
    assert "--model" in printed


def test_it_says_what_wakes_an_alora(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--model", str(base)]) == 0
    assert "invocation" not in capsys.readouterr().out
    reconfigure(adapter, alora_invocation_tokens=[5, 6])
    assert main(["inspect", str(adapter), "--model", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "alora_invocation_tokens: [5, 6] (at work from their last place in a prompt on)" in printed
    assert "can be served on" in printed


def test_with_a_base_it_gives_the_digest_that_answers_will_carry(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter), "--model", str(base)]) == 0
    printed = capsys.readouterr().out
    assert "applied: 8 tensors\nignored: nothing\nmissing: nothing\n" in printed
    llm = LLM(str(base), enable_lora=True)
    outputs = llm.generate(
        [[5]], SamplingParams(max_tokens=1), lora_request=LoRARequest("a", 1, str(adapter)), use_tqdm=False
    )
    assert outputs[0].adapter
    assert f"digest {outputs[0].adapter.removeprefix('a@')}" in printed


def test_of_the_base_only_the_config_is_needed(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((base / "config.json").read_bytes())
    assert main(["inspect", str(adapter), "--model", str(tmp_path / "config")]) == 0
    HUB.repositories |= {"inspected/base": base, "inspected/adapter": adapter}
    HUB.requests.clear()
    assert main(["inspect", "inspected/adapter", "--model", "inspected/base"]) == 0
    assert "can be served on inspected/base" in capsys.readouterr().out
    assert not any("inspected/base" in path and path.endswith("safetensors") for path in HUB.requests)


def test_another_base_is_told_with_what_does_not_fit(
    adapter: Path, model_of: ModelOf, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter), "--model", str(model_of("qwen3"))]) == 1
    printed = capsys.readouterr().out
    assert "refused: adapter 'adapter': " in printed
    assert "the base model needs" in printed


def test_tensors_without_a_place_and_modules_without_tensors_are_named(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(
        adapter, lambda tensors: {n.replace("1.self_attn.q_proj", "7.self_attn.q_proj"): t for n, t in tensors.items()}
    )
    reconfigure(adapter, target_modules=["q_proj", "v_proj", "router"])
    assert main(["inspect", str(adapter), "--model", str(base)]) == 1
    printed = capsys.readouterr().out
    assert "would be applied: 6 tensors" in printed
    assert "ignored: 2: " in printed
    assert "missing: 2: model.layers.1.self_attn.q_proj, router" in printed


def test_a_rank_over_the_servers_limit_says_which_flag_to_start_with(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter), "--model", str(base), "--max-lora-rank", "4"]) == 1
    assert "--max-lora-rank 8" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": "eight"}', json.dumps({"peft_type": "IA3"})])
def test_a_config_that_cannot_be_served_is_refused_with_or_without_a_base(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (adapter / "adapter_config.json").write_text(text)
    for base_flags in ([], ["--model", str(base)]):
        assert main(["inspect", str(adapter), *base_flags]) == 1
        assert "refused: adapter 'adapter': " in capsys.readouterr().out


def test_broken_tensors_are_refused_and_what_can_be_said_is_said(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(adapter, lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()})
    assert main(["inspect", str(adapter), "--model", str(base)]) == 1
    assert "not finite" in capsys.readouterr().out
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    assert main(["inspect", str(adapter), "--model", str(base)]) == 1
    printed = capsys.readouterr().out
    assert "lora_alpha: 16" in printed
    assert "truncated" in printed


@pytest.mark.parametrize("flags", [["/nowhere"], ["{adapter}", "--model", "/nowhere"]])
def test_what_is_not_there_is_one_line_and_status_1(
    adapter: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["inspect", *(flag.format(adapter=adapter) for flag in flags)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
