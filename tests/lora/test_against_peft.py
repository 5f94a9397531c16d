"""An adapter means what PEFT says: the same float32 log-probabilities, whoever else is in the batch."""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from aiolora import LLM, LoRARequest, RequestOutput, SamplingParams
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.tiny import ALL_LINEARS, VOCAB, everything, hf_logits, kernels, load_peft, make_adapter, prompt_ids, reported

TOLERANCE = 1e-4
NEW = 4  # tokens generated after each prompt

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 1 of q": {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]},
    "rank 5 of q and v": {"r": 5, "target_modules": ["q_proj", "v_proj"]},
    "rank 8 of all": {"r": 8, "target_modules": ALL_LINEARS},
    "rank 16 of o and down": {"r": 16, "target_modules": ["o_proj", "down_proj"]},
    "rank 40 of gate and up": {"r": 40, "target_modules": ["gate_proj", "up_proj"]},
    "rank 64 of all linears": {"r": 64, "lora_alpha": 64, "target_modules": "all-linear"},
    "rsLoRA": {"r": 16, "use_rslora": True, "target_modules": ALL_LINEARS},
    "rank pattern": {
        "r": 8,
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"k_proj": 3, "mlp.up_proj": 17, "layers.1.self_attn.q_proj": 9, r".*\.0\..*down_proj": 12},
    },
    "alpha pattern": {
        "r": 8,
        "target_modules": ALL_LINEARS,
        "alpha_pattern": {"q_proj": 32, r"model\.layers\.0\.mlp\.(gate|down)_proj": 3, "layers.1.self_attn.v_proj": 0},
    },
    "patterns and rsLoRA": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ALL_LINEARS,
        "rank_pattern": {"q_proj": 10, r"layers\.\d+\.mlp\.up_proj": 2},
        "alpha_pattern": {"q_proj": 5, "gate_proj": 40},
    },
    "one layer": {"r": 6, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "regex": {"r": 8, "target_modules": r".*layers\.[01]\.(self_attn\.(q|o)_proj|mlp\.down_proj)"},
    "regex of one": {"r": 8, "target_modules": r"model\.layers\.1\.self_attn\.k_proj"},
    "all but some": {"r": 8, "target_modules": "all-linear", "exclude_modules": r".*\.0\..*|.*gate_proj"},
    "gaussian": {"r": 8, "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "float16 file": {"dtype": torch.float16, "target_modules": ALL_LINEARS},
    "bfloat16 file": {"dtype": torch.bfloat16, "target_modules": ALL_LINEARS},
    "float64 file": {"dtype": torch.float64, "target_modules": ALL_LINEARS},
}
FAMILIES = ["llama biased", "qwen3"]
Folders = dict[str, Path]
PeftOf = Callable[[str], PeftModel]


@pytest.fixture(scope="module")
def folders_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    @cache
    def make(family: str) -> Folders:
        root = tmp_path_factory.mktemp("adapters")
        return {
            name: make_adapter(model_of(family), root / name.replace(" ", "-"), seed=number, **config)
            for number, (name, config) in enumerate(ADAPTERS.items())
        }

    return make


@pytest.fixture(scope="module")
def peft_of(model_of: ModelOf, folders_of: Callable[[str], Folders]) -> PeftOf:
    """Family -> that model with all its adapters in PEFT."""

    @cache
    def load(family: str) -> PeftModel:
        return load_peft(model_of(family), {_key(name): folder for name, folder in folders_of(family).items()})

    return load


@pytest.fixture(params=[False, True], ids=["references", "compiled"])
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    with kernels(compiled=request.param):
        yield request.param


def _key(name: str) -> str:
    return name.replace(" ", "_")  # PEFT makes attributes of names


def requests(folders: Folders) -> list[LoRARequest]:
    return [LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(folders.items(), 1)]


def serve(folder: Path, **args: Any) -> LLM:
    return LLM(str(folder), **({"dtype": "float32", "enable_lora": True, "max_loras": len(ADAPTERS)} | args))


def largest_error(output: RequestOutput, model: PeftModel, adapter: str | None) -> float:
    """Between every log-probability that we report and PEFT's; `adapter` None: the base model's."""
    tokens, ours = reported(output)
    if adapter is None:
        with model.disable_adapter():
            theirs = hf_logits(model, tokens)
    else:
        model.set_adapter(_key(adapter))
        theirs = hf_logits(model, tokens)
    return float((ours - theirs.log_softmax(-1)[:-1]).abs().max())


def distinct(outputs: list[RequestOutput]) -> int:
    """How many different models seem to have answered, judged by the first position after one prompt."""
    kinds: list[Tensor] = []
    for output in outputs:
        row = reported(output)[1][len(output.prompt_token_ids) - 1]
        if all((row - kind).abs().max() > 10 * TOLERANCE for kind in kinds):
            kinds.append(row)
    return len(kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_adapter_and_the_base_agree_with_peft_in_one_batch(
    family: str, compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf
) -> None:
    llm = serve(model_of(family))
    loras: list[LoRARequest | None] = [None, *requests(folders_of(family)), None]
    prompt: list[Prompt] = [prompt_ids(0, 21)] * len(loras)
    outputs = llm.generate(prompt, everything(NEW), lora_request=loras, use_tqdm=False)
    errors = {}
    for output, lora in zip(outputs, loras):
        assert output.lora_request == lora
        name = None if lora is None else lora.lora_name
        assert (output.adapter or "").partition("@")[0] == (name or "")
        errors[name] = largest_error(output, peft_of(family), name)
    assert max(errors.values()) < TOLERANCE, errors
    assert distinct(outputs) == len(loras) - 1, "two adapters, or an adapter and the base, answer the same"


def test_prompts_of_all_lengths_in_small_chunks_agree_with_peft(
    compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf
) -> None:
    family = FAMILIES[0]
    llm = serve(model_of(family), max_num_batched_tokens=29, max_num_seqs=5, max_loras=4)
    loras = [lora for lora in requests(folders_of(family))[:9] for _ in range(2)]
    prompts: list[Prompt] = [prompt_ids(number, 1 + 13 * number % 70) for number in range(len(loras))]
    outputs = llm.generate(prompts, everything(NEW), lora_request=loras, use_tqdm=False)
    for output, lora in zip(outputs, loras):
        assert largest_error(output, peft_of(family), lora.lora_name) < TOLERANCE, lora.lora_name


def answer_error(output: RequestOutput, model: PeftModel) -> float:
    """The largest error of the answer's log-probabilities alone: asking for the prompt's would pass by the cache."""
    (answer,) = output.outputs
    logits = hf_logits(model, [*output.prompt_token_ids, *answer.token_ids])
    theirs = logits.log_softmax(-1)[len(output.prompt_token_ids) - 1 : -1]
    rows = [[top[token].logprob for token in range(VOCAB)] for top in answer.logprobs or []]
    return float((torch.tensor(rows) - theirs).abs().max())


def test_a_warm_prefix_is_read_by_its_own_adapter_and_weights_only(
    model_of: ModelOf, folders_of: Callable[[str], Folders], tmp_path: Path
) -> None:
    family = FAMILIES[0]
    names = ["rank 5 of q and v", "rank 8 of all", "rsLoRA"]
    used = {name: folders_of(family)[name] for name in names}
    peft = load_peft(model_of(family), {_key(name): folder for name, folder in used.items()})
    llm = serve(model_of(family))
    for lora in requests(used):
        llm.engine.add_lora(lora)
    mixes = [{names[0]: 1.0}, {names[0]: 0.5}, {names[1]: 1.0}, {names[0]: 0.5, names[1]: 0.5}]
    # a plain adapter first: PEFT 0.21 scales the whole by sqrt(r) where the first one is an rsLoRA
    mixes += [{names[0]: 0.25, names[1]: 0.75}, {names[0]: 0.1, names[2]: -1.0}]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB)
    for number, weights in enumerate(mixes):
        adapters = [_key(name) for name in weights]
        peft.add_weighted_adapter(adapters, list(weights.values()), f"warm{number}", combination_type="cat")
    for _ in range(2):  # the second time each finds its own pages
        for number, weights in enumerate(mixes):
            (output,) = llm.generate(prompt_ids(2, 50), params, lora_request=weights, use_tqdm=False)
            peft.set_adapter(f"warm{number}")
            assert answer_error(output, peft) < TOLERANCE, weights
        (output,) = llm.generate(prompt_ids(2, 50), params, use_tqdm=False)
        with peft.disable_adapter():
            assert answer_error(output, peft) < TOLERANCE, "the base"


def test_a_reload_under_the_same_name_reads_no_page_of_the_old_version(
    model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf, tmp_path: Path
) -> None:
    family, folder = FAMILIES[0], tmp_path / "changing"
    llm = serve(model_of(family))
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=VOCAB)
    for name in ("rank 8 of all", "rsLoRA", "rank 8 of all"):
        shutil.copytree(folders_of(family)[name], folder, dirs_exist_ok=True)
        llm.engine.add_lora(LoRARequest("changing", 1, str(folder), load_inplace=True))
        peft_of(family).set_adapter(_key(name))
        for _ in range(2):
            (output,) = llm.generate(prompt_ids(2, 50), params, lora_request="changing", use_tqdm=False)
            assert answer_error(output, peft_of(family)) < TOLERANCE, name


def test_one_adapter_at_a_time_gives_the_same_answers(
    model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf
) -> None:
    family = FAMILIES[0]
    llm = serve(model_of(family), max_loras=1, max_cpu_loras=2, device="cpu")
    loras: list[LoRARequest | None] = [None, *requests(folders_of(family))[:6]] * 2
    prompts: list[Prompt] = [prompt_ids(number, 12) for number in range(len(loras))]
    outputs = llm.generate(prompts, everything(NEW), lora_request=loras, use_tqdm=False)
    for output, lora in zip(outputs, loras):
        name = None if lora is None else lora.lora_name
        assert largest_error(output, peft_of(family), name) < TOLERANCE
    assert len(llm.engine.snapshot().resident_adapters) == 1


WEIGHTS: list[dict[str, float]] = [
    {"rank 5 of q and v": 0.7, "rank 16 of o and down": 0.3},
    {"rank 8 of all": 0.7, "rsLoRA": 0.3},
    {"rank 8 of all": 1.5, "rank 64 of all linears": -0.25, "rank 1 of q": 2.0},
    {"rank 40 of gate and up": 0.5},
    {"rank 5 of q and v": 0.0, "rank 8 of all": 1.0},
]


@pytest.mark.parametrize("compiled", [False, True])
def test_weighted_adapters_are_pefts_concatenation(
    compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders]
) -> None:
    family = FAMILIES[0]
    used = {name: folders_of(family)[name] for weights in WEIGHTS for name in weights}
    peft = load_peft(model_of(family), {_key(name): folder for name, folder in used.items()})
    with kernels(compiled=compiled):
        llm = serve(model_of(family))
        for lora in requests(used):
            llm.engine.add_lora(lora)
        prompt: list[Prompt] = [prompt_ids(8, 40)] * (len(WEIGHTS) + 2)
        loras = [*WEIGHTS, "rank 8 of all", None]
        outputs = llm.generate(prompt, everything(NEW), lora_request=loras, use_tqdm=False)
    for number, (output, weights) in enumerate(zip(outputs, WEIGHTS)):
        names = [_key(name) for name in weights]
        peft.add_weighted_adapter(names, list(weights.values()), f"mix{number}", combination_type="cat")
        assert largest_error(output, peft, f"mix{number}") < TOLERANCE, weights
        assert (output.adapter or "").count("@") == len(weights)
    assert largest_error(outputs[-2], peft, "rank 8 of all") < TOLERANCE
    assert largest_error(outputs[-1], peft, None) < TOLERANCE
    assert distinct(outputs) == len(outputs) - 1  # a weight of zero adds nothing: the last mix is rank 8 alone


def test_adapters_may_be_kept_in_bfloat16_under_a_float32_model(
    compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf
) -> None:
    family = FAMILIES[0]
    exact, rounded = serve(model_of(family)), serve(model_of(family), lora_dtype="bfloat16")
    for lora in requests(folders_of(family))[:8]:
        (output,) = rounded.generate(prompt_ids(4, 30), everything(NEW), lora_request=lora, use_tqdm=False)
        assert largest_error(output, peft_of(family), lora.lora_name) < 0.1
        assert rounded.engine.add_lora(lora).nbytes * 2 == exact.engine.add_lora(lora).nbytes
    (base,) = rounded.generate(prompt_ids(4, 30), everything(NEW), use_tqdm=False)
    assert largest_error(base, peft_of(family), None) < TOLERANCE


def test_a_bfloat16_model_stays_near_peft(
    compiled: bool, model_of: ModelOf, folders_of: Callable[[str], Folders], peft_of: PeftOf
) -> None:
    family = FAMILIES[1]
    llm = serve(model_of(family), dtype="bfloat16")
    loras = requests(folders_of(family))
    prompts: list[Prompt] = [prompt_ids(number, 20) for number in range(len(loras))]
    outputs = llm.generate(prompts, everything(1), lora_request=loras, use_tqdm=False)
    for output, lora in zip(outputs, loras):
        assert largest_error(output, peft_of(family), lora.lora_name) < 0.4
