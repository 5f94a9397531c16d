"""Adapters on mixtures of experts mean what PEFT says, however the experts were spelled when they were trained."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.tiny import everything, hf_logits, load_peft, make_adapter, prompt_ids, reported

# PEFT looks for patterns among modules only, and then holds parameters against them all the same
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
TOLERANCE = 1e-4
FAMILIES = ["mixtral", "qwen2-moe", "qwen2-moe normalised", "qwen3-moe"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FUSED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "experts": {"r": 4, "target_modules": [], "target_parameters": BOTH},
    "experts gate and up": {"r": 9, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "experts down": {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": ["down_proj"]},
    "experts and attention": {
        "r": 8,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {r".*\.gate_up_proj": 12, "q_proj": 3},
        "alpha_pattern": {"layers.1.mlp.experts.down_proj": 3},
    },
    "gate": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}
SHARED: dict[str, dict[str, Any]] = {
    "shared": {"target_modules": r".*shared_expert\.(gate|up|down)_proj"},
    "shared and its gate": {"r": 2, "target_modules": r".*shared_expert(\.down_proj|_gate)"},
}
HF = Callable[[str], nn.Module]


def adapters(family: str) -> dict[str, dict[str, Any]]:
    return FUSED | (SHARED if family.startswith("qwen2") else {})


@pytest.fixture(scope="module")
def folders_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    @cache
    def make(family: str) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("adapters")
        return {
            name: make_adapter(model_of(family), root / name.replace(" ", "-"), seed=number, **config)
            for number, (name, config) in enumerate(adapters(family).items())
        }

    return make


def serve(folder: Path, **args: Any) -> LLM:
    return LLM(str(folder), **({"dtype": "float32", "enable_lora": True, "max_loras": 8} | args))


def requests(folders: dict[str, Path]) -> list[LoRARequest]:
    return [LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(folders.items(), 1)]


def assert_agrees(output: RequestOutput, model: nn.Module) -> None:
    tokens, ours = reported(output)
    torch.testing.assert_close(ours, hf_logits(model, tokens).log_softmax(-1)[:-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_and_the_base_agree_with_peft_in_one_batch(
    family: str, model_of: ModelOf, hf_of: HF, folders_of: Callable[[str], dict[str, Path]]
) -> None:
    llm = serve(model_of(family), max_num_batched_tokens=40)  # prompts are cut, and mixed with decoding
    loras: list[LoRARequest | None] = [None, *requests(folders_of(family)), None]
    prompts: list[Prompt] = [prompt_ids(3, 29 + number % 3) for number in range(len(loras))]
    cold = llm.generate(prompts, everything(4), lora_request=loras, use_tqdm=False)
    warm = llm.generate(prompts, everything(4), lora_request=loras, use_tqdm=False)
    firsts = []
    for output, again, lora in zip(cold, warm, loras):
        model = hf_of(family) if lora is None else load_peft(model_of(family), {"only": Path(lora.lora_path)})
        assert_agrees(output, model)
        assert output.outputs[0].token_ids == again.outputs[0].token_ids
        firsts.append(reported(output)[1][20])
    for number, row in enumerate(firsts[:-1]):
        assert all((row - other).abs().max() > 10 * TOLERANCE for other in firsts[:number])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_found_in_the_prefix_cache_were_those_of_the_adapter(
    family: str, model_of: ModelOf, folders_of: Callable[[str], dict[str, Path]]
) -> None:
    llm = serve(model_of(family))
    prompt = prompt_ids(8, 40)
    (lora,) = [one for one in requests(folders_of(family)) if one.lora_name == "experts and attention"]
    llm.generate([prompt], everything(1), lora_request=[None], use_tqdm=False)
    llm.generate([prompt], everything(1), lora_request=[lora], use_tqdm=False)
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    longer: list[Prompt] = [[*prompt, 7, 8, 9]]
    (output,) = llm.generate(longer, greedy, lora_request=[lora], use_tqdm=False)
    model = load_peft(model_of(family), {"only": Path(lora.lora_path)})
    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    assert output.outputs[0].token_ids == hf_logits(model, tokens)[-6:-1].argmax(-1).tolist()
