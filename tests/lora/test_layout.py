"""`lora_target_modules` may name some layers, some experts or no plain linear at all; the others stay the base's."""

from pathlib import Path
from typing import Any

import pytest

from aiolora import LLM, LoRARequest
from aiolora.errors import AdapterMismatchError, ConfigError
from tests.conftest import ModelOf
from tests.tiny import (
    ALL_LINEARS,
    TOLERANCE,
    everything,
    hf_logits,
    load_hf,
    load_peft,
    make_adapter,
    prompt_ids,
    reported,
)

PROMPT = prompt_ids(2, 24)
FIRST = r".*layers\.0\.self_attn\."
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def started(base: Path, *only: str, **args: Any) -> LLM:
    return LLM(str(base), dtype="float32", enable_lora=True, max_loras=4, lora_target_modules=only, **args)


def assert_served_beside_the_base(llm: LLM, base: Path, folder: Path) -> None:
    """As PEFT has it, and the base in the same batch as transformers has it."""
    lora = LoRARequest(folder.name, 1, str(folder))
    outputs = llm.generate([PROMPT, PROMPT], everything(3), lora_request=[lora, None], use_tqdm=False)
    found = [reported(output) for output in outputs]
    for (tokens, ours), model in zip(found, (load_peft(base, {"only": folder}), load_hf(base))):
        assert (ours - hf_logits(model, tokens).log_softmax(-1)[:-1]).abs().max() < TOLERANCE
    assert (found[0][1][:20] - found[1][1][:20]).abs().max() > 100 * TOLERANCE


def assert_refused(llm: LLM, folder: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="--lora-target-modules"):
        llm.engine.add_lora(LoRARequest(folder.name, 2, str(folder)))


@pytest.mark.parametrize(
    ("only", "taken"),
    [
        ("layers.0", r".*layers\.0\..*_proj"),
        ("layers.1", r".*layers\.1\..*_proj"),
        ("model.layers.0.self_attn.q_proj", r".*layers\.0\.self_attn\.q_proj"),
        ("layers.1.mlp.down_proj", r".*layers\.1\.mlp\.down_proj"),
    ],
)
def test_of_named_layers_alone_adapters_are_served(model_of: ModelOf, tmp_path: Path, only: str, taken: str) -> None:
    base = model_of("llama")
    llm = started(base, only)
    assert_served_beside_the_base(llm, base, make_adapter(base, tmp_path / "own", target_modules=taken))
    assert_refused(llm, make_adapter(base, tmp_path / "all", target_modules=ALL_LINEARS))


@pytest.mark.parametrize("layer", [0, 1])
def test_of_experts_of_named_layers_alone_adapters_are_served(model_of: ModelOf, tmp_path: Path, layer: int) -> None:
    base = model_of("mixtral")
    llm = started(base, f"layers.{layer}", max_lora_rank=8)
    own = [f"layers.{layer}.mlp.{name}" for name in EXPERTS]
    folder = make_adapter(base, tmp_path / "own", r=4, target_modules=[], target_parameters=own)
    assert_served_beside_the_base(llm, base, folder)
    assert_refused(llm, make_adapter(base, tmp_path / "all", r=4, target_modules=[], target_parameters=EXPERTS))


@pytest.mark.parametrize("memory", [None, 1 << 20])
def test_experts_alone_may_take_adapters(model_of: ModelOf, tmp_path: Path, memory: int | None) -> None:
    base = model_of("mixtral")
    llm = started(base, "experts", max_lora_rank=8, lora_memory=memory)
    folder = make_adapter(base, tmp_path / "own", r=4, target_modules=[], target_parameters=EXPERTS)
    assert_served_beside_the_base(llm, base, folder)
    llm.engine.pin_lora("own")
    assert_refused(llm, make_adapter(base, tmp_path / "attention"))


@pytest.mark.parametrize("memory", [None, 1])
def test_the_embedding_and_the_head_alone_may_take_adapters(
    model_of: ModelOf, tmp_path: Path, memory: int | None
) -> None:
    base = model_of("llama")
    llm = started(base, "embed_tokens", "lm_head", lora_memory=memory)
    folder = make_adapter(base, tmp_path / "own", target_modules=["embed_tokens", "lm_head"])
    assert_served_beside_the_base(llm, base, folder)
    llm.engine.pin_lora("own")
    assert_refused(llm, make_adapter(base, tmp_path / "attention"))


@pytest.mark.parametrize("only", ["q_prj", "layers.2", "norm"])
def test_names_that_leave_nothing_to_factors_are_told_with_what_there_is(model_of: ModelOf, only: str) -> None:
    with pytest.raises(ConfigError, match=rf"{only}'.*--lora-target-modules.* q_proj, .*down_proj.* lm_head"):
        started(model_of("llama"), only)
