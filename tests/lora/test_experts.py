"""Adapters on mixtures of experts mean what PEFT says, however the experts were spelled when they were trained."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.errors import AdapterFormatError, AdapterMismatchError, AdapterUnsupportedError
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.tiny import (
    everything,
    hf_logits,
    load_hf,
    load_peft,
    make_adapter,
    prompt_ids,
    reconfigure,
    reported,
    rewrite,
)

# PEFT looks for patterns among modules only, and then holds parameters against them all the same
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
TOLERANCE = 1e-4
FAMILIES = ["mixtral", "qwen2-moe", "qwen2-moe normalised", "qwen3-moe", "olmoe", "granite-moe", "gpt-oss"]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FUSED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "experts": {"r": 4, "target_modules": [], "target_parameters": BOTH},
    "experts gate and up": {"r": 9, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "experts down": {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": ["down_proj"]},
    "experts and attention": {
        "r": 8,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {r".*\.gate_up_proj": 12, "q_proj": 3},
        "alpha_pattern": {r"layers\.1\..*down_proj": 3},
    },
    "gate": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}
SHARED: dict[str, dict[str, Any]] = {
    "shared": {"target_modules": r".*shared_expert\.(gate|up|down)_proj"},
    "shared and its gate": {"r": 2, "target_modules": r".*shared_expert(\.down_proj|_gate)"},
}
HF = Callable[[str], nn.Module]


def adapters(family: str) -> dict[str, dict[str, Any]]:
    routed = family in ("granite-moe", "gpt-oss")
    gate = {"gate": {"target_modules": [], "target_parameters": ["router.weight"]}} if routed else {}
    return FUSED | gate | (SHARED if family.startswith("qwen2") else {})


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


Factors = dict[tuple[int, int, str], tuple[Tensor, Tensor]]  # layer, expert, projection -> A and B
OWN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
OLD_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}, "block_sparse_moe"
PROMPT = prompt_ids(4, 30)
SCALE = 6 / 4  # of `written`


def factors(model: nn.Module, parts: Iterable[str], *, rank: int = 4, experts: Iterable[int] | None = None) -> Factors:
    """Random ones of every expert, or of some."""
    generator, found = torch.Generator().manual_seed(rank), Factors()
    for layer, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        count, hidden, inner = block.mlp.experts.down_proj.shape
        for expert, part in product(range(count) if experts is None else experts, parts):
            outputs, inputs = (hidden, inner) if part == "down_proj" else (inner, hidden)
            a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
            found[layer, expert, part] = a / inputs**0.5, b / (2 * rank**0.5)
    return found


@torch.no_grad()
def merged(base: Path, made: Factors, scale: float) -> nn.Module:
    """The base model of transformers with the factors in its weights."""
    model = load_hf(base)
    for (layer, expert, part), (a, b) in made.items():
        experts = model.model.layers[layer].mlp.experts
        inner = experts.down_proj.shape[2]
        if part == "down_proj":
            experts.down_proj[expert] += scale * b @ a
        else:
            experts.gate_up_proj[expert, slice(inner) if part == "gate_proj" else slice(inner, None)] += scale * b @ a
    return model


def written(folder: Path, made: Factors, names: dict[str, str], block: str = "mlp", **config: object) -> LoRARequest:
    """A folder as PEFT wrote it where each expert was a module."""
    tensors = {
        f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{names[part]}.lora_{letter}.weight": tensor
        for (layer, expert, part), pair in made.items()
        for letter, tensor in zip("AB", pair)
    }
    folder.mkdir()
    targets = sorted({names[part] for _, _, part in made})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return LoRARequest(folder.name, sum(folder.name.encode()), str(folder))


@pytest.mark.parametrize("family", FAMILIES[:-2])  # the last two's never were
def test_adapters_of_experts_that_were_modules_are_those_weights_added_up(
    family: str, model_of: ModelOf, hf_of: HF, tmp_path: Path
) -> None:
    base = model_of(family)
    names, block = OLD_MIXTRAL if family == "mixtral" else (OWN, "mlp")
    made = {
        "all": factors(hf_of(family), OWN),
        "up": factors(hf_of(family), ["up_proj"]),
        "two": factors(hf_of(family), ["gate_proj", "down_proj"], experts=[1, 3]),
    }
    loras: list[LoRARequest | None] = [
        written(tmp_path / "all", made["all"], names, block, target_modules=r".*\.experts\..*"),
        written(tmp_path / "up", made["up"], names, block, target_modules=rf".*experts.*\.{names['up_proj']}"),
        written(tmp_path / "two", made["two"], names, block, target_modules=r".*experts\.[13]\..*"),
        None,
    ]
    outputs = serve(base).generate([PROMPT] * 4, everything(3), lora_request=loras, use_tqdm=False)
    for output, own in zip(outputs, [*made.values(), Factors()]):
        assert_agrees(output, merged(base, own, SCALE))


@pytest.mark.parametrize(("family", "names", "block"), [("qwen3-moe", OWN, "mlp"), ("mixtral", *OLD_MIXTRAL)])
def test_peft_itself_makes_of_experts_that_were_modules_what_is_served(
    family: str, names: dict[str, str], block: str, model_of: ModelOf, hf_of: HF, tmp_path: Path
) -> None:
    lora = written(tmp_path / "all", factors(hf_of(family), OWN), names, block)
    (output,) = serve(model_of(family)).generate([PROMPT], everything(3), lora_request=[lora], use_tqdm=False)
    assert_agrees(output, load_peft(model_of(family), {"only": Path(lora.lora_path)}))


def test_experts_of_bfloat16_stay_near_float32(model_of: ModelOf, hf_of: HF, tmp_path: Path) -> None:
    lora = written(tmp_path / "all", made := factors(hf_of("qwen3-moe"), OWN), OWN)
    llm = serve(model_of("qwen3-moe"), dtype="bfloat16")
    (output,) = llm.generate([PROMPT], everything(3), lora_request=[lora], use_tqdm=False)
    tokens, ours = reported(output)
    theirs = hf_logits(merged(model_of("qwen3-moe"), made, SCALE), tokens).log_softmax(-1)[:-1]
    assert float((ours - theirs).abs().median()) < 0.05  # near a tie the gate may choose otherwise


def change(folder: Path, own: Mapping[str, Tensor | None]) -> None:
    """Set tensors of an adapter, or leave them out."""
    file = folder / "adapter_model.safetensors"
    tensors = {**load_file(file), **{f"base_model.model.model.layers.1.{name}": tensor for name, tensor in own.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


ONES = torch.ones(1)
REFUSED: dict[str, tuple[bool, dict[str, Tensor | None], type[Exception], str]] = {
    "an expert left out": (
        False,
        {"mlp.experts.3.up_proj.lora_A.weight": None, "mlp.experts.3.up_proj.lora_B.weight": None},
        AdapterFormatError,
        r"no tensor belongs to it in 1 of 16 modules: .*layers\.1\.mlp\.experts\.3\.up_proj",
    ),
    "an expert too many": (
        False,
        {
            "mlp.experts.8.up_proj.lora_A.weight": ONES.expand(4, 48).clone(),
            "mlp.experts.8.up_proj.lora_B.weight": ONES.expand(24, 4).clone(),
        },
        AdapterMismatchError,
        r"not in the base model .*layers\.1\.mlp\.experts\.8\.up_proj",
    ),
    "half a pair": (
        True,
        {"mlp.experts.lora_B.weight": None},
        AdapterFormatError,
        "experts.down_proj, which has no lora_B",
    ),
    "another width": (
        True,
        {"mlp.experts.lora_A.weight": ONES.expand(32, 25).clone()},
        AdapterMismatchError,
        r"experts\.down_proj has lora_A \[32, 25\].* rank 4 of 8 experts of the base model needs \[32, 24\]",
    ),
    "NaN": (True, {"mlp.experts.lora_B.weight": torch.full((48, 32), torch.nan)}, AdapterFormatError, "not finite"),
    "both ways": (
        True,
        {
            "mlp.experts.2.up_proj.lora_A.weight": ONES.expand(4, 48).clone(),
            "mlp.experts.2.up_proj.lora_B.weight": ONES.expand(24, 4).clone(),
        },
        AdapterFormatError,
        r"experts\.gate_up_proj and .*experts\.2\.up_proj are one module of the base model",
    ),
    "a bias": (
        True,
        {"mlp.experts.lora_B.bias": torch.ones(48)},
        AdapterUnsupportedError,
        r"mlp\.experts\.lora_B\.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_of_experts_is_refused_by_name(
    case: str, model_of: ModelOf, hf_of: HF, folders_of: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    fused, own, kind, said = REFUSED[case]
    if fused:
        folder = Path(shutil.copytree(folders_of("qwen3-moe")["experts"], tmp_path / "bad"))
    else:
        folder = Path(written(tmp_path / "bad", factors(hf_of("qwen3-moe"), OWN), OWN).lora_path)
    change(folder, own)
    with pytest.raises(kind, match=said):
        serve(model_of("qwen3-moe")).generate(PROMPT, lora_request=LoRARequest("bad", 1, str(folder)), use_tqdm=False)


def test_dora_on_an_expert_is_refused_by_name(model_of: ModelOf, hf_of: HF, tmp_path: Path) -> None:
    made = factors(hf_of("qwen3-moe"), ["down_proj"], experts=[3])
    lora = written(tmp_path / "dora", made, OWN, use_dora=True, target_modules=r".*experts\.3\.down_proj")
    change(Path(lora.lora_path), {"mlp.experts.3.down_proj.lora_magnitude_vector": torch.ones(48)})
    first = {"layers.0.mlp.experts.3.down_proj.lora_magnitude_vector": torch.ones(48)}
    file = Path(lora.lora_path) / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.model.{name}": tensor for name, tensor in first.items()}, file)
    with pytest.raises(AdapterUnsupportedError, match="down_proj, a routed expert, has lora_magnitude_vector"):
        serve(model_of("qwen3-moe")).generate(PROMPT, lora_request=lora, use_tqdm=False)


def test_experts_that_take_no_adapters_have_no_pages_and_are_refused_by_name(
    model_of: ModelOf, folders_of: Callable[[str], dict[str, Path]]
) -> None:
    llm = serve(model_of("qwen3-moe"), lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    attention, experts = (folders_of("qwen3-moe")[name] for name in ("attention", "experts"))
    (output,) = llm.generate(
        [PROMPT], everything(2), lora_request=[LoRARequest("a", 1, str(attention))], use_tqdm=False
    )
    assert_agrees(output, load_peft(model_of("qwen3-moe"), {"only": attention}))
    with pytest.raises(AdapterMismatchError, match="take no adapters"):
        llm.generate([PROMPT], everything(2), lora_request=[LoRARequest("b", 2, str(experts))], use_tqdm=False)
    half = serve(model_of("qwen3-moe"), lora_target_modules=("up_proj", "down_proj"))  # gate_up_proj is more than that
    with pytest.raises(AdapterMismatchError):
        half.generate([PROMPT], everything(2), lora_request=[LoRARequest("c", 3, str(experts))], use_tqdm=False)


TODAY, OLD = r"mlp\.experts", r"block_sparse_moe\.experts"


def patterns(where: str) -> dict[str, Any]:
    ranks, alphas = {rf".*{where}\.gate_up_proj": 12}, {rf".*layers\.1\.{where}\.down_proj": 3}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def test_patterns_for_all_experts_at_once_are_written_for_the_names_that_the_file_has(
    model_of: ModelOf, tmp_path: Path
) -> None:
    base = model_of("mixtral")
    config = {"r": 4, "lora_alpha": 9, "target_modules": [], "target_parameters": BOTH}
    today = make_adapter(base, tmp_path / "today", **config, **patterns(TODAY))
    old = shutil.copytree(today, tmp_path / "old")
    rewrite(old, lambda tensors: {name.replace(".mlp.", ".block_sparse_moe."): own for name, own in tensors.items()})
    reconfigure(old, **patterns(OLD))
    loras: list[LoRARequest | None] = [LoRARequest("today", 1, str(today)), LoRARequest("old", 2, str(old))]
    outputs = serve(base).generate([PROMPT] * 2, everything(3), lora_request=loras, use_tqdm=False)
    for output in outputs:
        assert_agrees(output, load_peft(base, {"only": today}))


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, "lora_A"),
        ({"target_modules": [], "target_parameters": ["experts.down_proj"]}, "lora_B"),
        ({"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, "lora_A"),
        ({"target_modules": [], "target_parameters": ["mlp.gate.weight"]}, "lora_B"),
    ],
)
def test_half_a_module_under_each_of_two_names_is_refused(
    model_of: ModelOf, tmp_path: Path, config: dict[str, Any], first: str
) -> None:
    """Whichever half has the older name: nobody knows whether they were trained together."""
    folder = make_adapter(model_of("mixtral"), tmp_path / "halves", **config)
    rewrite(
        folder,
        lambda tensors: {
            name.replace(".mlp.", ".block_sparse_moe.") if first in name else name: own for name, own in tensors.items()
        },
    )
    with pytest.raises(AdapterFormatError, match=r"block_sparse_moe.* one module of the base model"):
        serve(model_of("mixtral")).engine.add_lora(LoRARequest("halves", 1, str(folder)))
