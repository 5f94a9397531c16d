"""Every family with adapters that PEFT trained, against PEFT, in mixed batches cut into steps: docs/models.md."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from torch import Tensor

from aiolora import LLM, LoRARequest
from aiolora.errors import AdapterError
from aiolora.models.families import FAMILIES as SERVED
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.lora.fidelity import peft_logits, train
from tests.sparse import SPARSE
from tests.tiny import DEVICE, FAMILIES, TELLS, TOLERANCE, everything, hf_logits, kernels, load_hf, prompt_ids, reported

NEW = 5  # tokens of an answer
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linears": {"target_modules": "all-linear", "r": 5, "lora_alpha": 5},
    "DoRA": {"target_modules": "all-linear", "r": 17, "use_dora": True},
    "biases": {"target_modules": "all-linear", "r": 3, "lora_alpha": 3, "lora_bias": True, "use_rslora": True},
    "the base's biases": {"target_modules": "all-linear", "r": 4, "lora_alpha": 4, "bias": "all"},
    "one of a layer": {"target_modules": r".*\.1\.self_attn\.(q|qkv)_proj", "r": 24},
    "MLP": {"target_modules": r".*mlp\.\w*(proj|fc|linear)", "r": 8},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"], "r": 9},
    "tokens": {"target_modules": "all-linear", "r": 2, "lora_alpha": 2, "trainable_token_indices": [3, 40]},
    "head": {"target_modules": "all-linear", "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]},
    "norms": {
        "target_modules": "all-linear",
        "r": 2,
        "lora_alpha": 2,
        "modules_to_save": ["model.norm", "input_layernorm"],
    },
    "every norm": {"target_modules": "all-linear", "r": 2, "lora_alpha": 2, "modules_to_save": ["norm"]},
}
_ATTENTION = r".*\.self_attn\.\w+_proj"
SPARSE_ADAPTERS = ADAPTERS | {  # in PEFT, all linears have the experts among them, which take low-rank factors only
    "DoRA": ADAPTERS["DoRA"] | {"target_modules": _ATTENTION},
    "biases": ADAPTERS["biases"] | {"target_modules": _ATTENTION},
    "MLP": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 4},
}
# Llama's ropes and heads tell adapters nothing: tests/models/test_against_transformers.py has those
SHAPES = [shape for shape in FAMILIES if not shape.startswith("llama ") or shape in ("llama tied", "llama biased")]
KNOWN_AS = {
    "exaone4": "EXAONE 4",
    "gemma": "Gemma, CodeGemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text: 270M, 1B)",
    "gpt_oss": "gpt-oss",
    "granite": "Granite 3, dense",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4, dense with attention in all layers (350M, 1B, Micro)",
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM 1 and 2, and all that share the architecture",
    "ministral": "Ministral (8B, 2410)",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3": "Qwen3, dense",
    "qwen3_moe": "Qwen3-MoE",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "starcoder2": "StarCoder2",
}
HEAD = f"""# Models

Written by `tests/models/test_families.py`. For every family some tiny random models are built by transformers, with
{len(ADAPTERS)} adapters each that PEFT trained a little and saved: {", ".join(ADAPTERS)}.
The base and all of them are served in one batch, in float32 on a CPU, their prompts cut into steps of 37 tokens, then
once more on top of the prefix cache. The error is the largest difference of a log-probability from that of the model in
memory, rounded up to a power of ten, 1e-5 at the least; the limit is 1e-4. The base's logits are held against those of
transformers in `tests/models/test_against_transformers.py`, in more shapes. How a family is added:
[adding-a-model.md](adding-a-model.md).

Images and recordings go through the models of [multimodal.md](multimodal.md), over these. Any other decoder that
transformers can build runs by its own code: [models-fallback.md](models-fallback.md). `aiolora doctor MODEL` says which
way a model goes, and why.

Adapters name modules as PEFT finds them in transformers' model: where a checkpoint has q, k and v, or gate and up, in
one projection, so have they. All experts of a layer are parameters, which "MLP" names; an expert may also be a module,
as before transformers 5 (`mlp.experts.3.up_proj`). Beside those of the table there are `embed_tokens` and `lm_head`.

Ropes: default, linear, dynamic, llama3, yarn and longrope. Dynamic scaling begins beyond `max_position_embeddings`, up
to which a model is served: there is none. Longrope turns by the long factors wherever the context that is served
(`--max-model-len`, by default the model's) is longer than the one it was trained on, else by the short ones;
transformers chooses for each text anew.

Weights are float32, bfloat16 or float16 in safetensors. Experts of gpt-oss may be packed in MXFP4: they are unpacked,
exactly, when they are loaded, and take the memory of the dtype that is served (gpt-oss-20b: 42 GB in bfloat16). Its
answers come in the channels of its chat format (harmony), as it writes them: nothing takes them apart.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of the adapters on one shape of a family."""

    shape: str
    modules: tuple[str, ...]
    error: float
    refused: dict[str, str]  # adapter -> why
    alike: list[str]  # adapters that changed next to nothing


@pytest.fixture(scope="module")
def outcome_of(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    return cache(lambda shape: measure(shape, model_of(shape), tmp_path_factory.mktemp("families")))


@pytest.fixture
def outcomes(outcome_of: Callable[[str], Outcome]) -> list[Outcome]:
    return [outcome_of(shape) for shape in SHAPES]


def measure(shape: str, model: Path, folder: Path) -> Outcome:
    base = load_hf(model)
    llm = LLM(
        str(model),
        dtype="float32",
        enable_lora=True,
        max_loras=len(ADAPTERS),
        max_num_batched_tokens=37,
        max_num_seqs=7,
    )
    trained: list[PeftModel | None] = [None]
    loras: list[LoRARequest | None] = [None]
    refused = {}
    for number, (name, config) in enumerate((SPARSE_ADAPTERS if shape in SPARSE else ADAPTERS).items(), 1):
        peft = train(base, config, folder / str(number), seed=number)
        lora = LoRARequest(name, number, str(folder / str(number)))
        try:
            llm.engine.add_lora(lora)
        except AdapterError as refusal:
            refused[name] = str(refusal)
            continue
        trained.append(peft)
        loras.append(lora)
    prompts: list[Prompt] = [prompt_ids(number, 19 + 5 * number) for number in range(len(loras))]
    errors, alike = [0.0], set[str]()

    @cache
    def expected(number: int, tokens: tuple[int, ...]) -> Tensor:
        """Log-probabilities by PEFT."""
        plain, peft = hf_logits(base, tokens), trained[number]
        logits = plain if peft is None else peft_logits(peft, tokens[:-NEW], tokens[-NEW:])
        if (lora := loras[number]) and (logits.log_softmax(-1) - plain.log_softmax(-1)).abs().max() < TELLS:
            alike.add(lora.lora_name)
        return logits.log_softmax(-1)[:-1]

    for _ in range(2):  # the second time the full pages of the prompts come from the cache
        for number, output in enumerate(llm.generate(prompts, everything(NEW), lora_request=loras, use_tqdm=False)):
            tokens, ours = reported(output)
            errors.append(float((ours - expected(number, tuple(tokens))).abs().max()))
    modules = sorted(
        {
            name.rpartition(".")[2]
            for name, _ in base.named_modules()
            if re.search(r"\.layers\..*(proj|c_fc|linear)$", name)
        }
    )
    modules += sorted(
        {
            "experts" + name.partition(".experts")[2]
            for name, parameter in base.named_parameters()
            if ".experts." in name and parameter.dim() == 3
        }
    )
    return Outcome(shape, tuple(modules), max(errors), refused, sorted(alike))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_and_every_adapter_have_their_own_numbers_in_one_batch(
    shape: str, outcome_of: Callable[[str], Outcome]
) -> None:
    outcome = outcome_of(shape)
    assert outcome.error < TOLERANCE
    assert outcome.alike == [], "adapters that change nothing"


@pytest.mark.parametrize("shape", ["gemma2", "phi3 partly rotated, tied", "olmo2", "starcoder2"])
def test_so_they_have_without_compiled_kernels(shape: str, model_of: ModelOf, tmp_path: Path) -> None:
    with kernels(compiled=False):
        assert measure(shape, model_of(shape), tmp_path).error < TOLERANCE


def test_refused_is_only_what_is_no_norm_of_the_residual_stream(outcomes: list[Outcome]) -> None:
    for one in outcomes:
        assert set(one.refused) <= {"norms", "every norm", "the base's biases"}, one
        for why in one.refused.values():
            assert re.search("no embedding, head or norm of the residual stream|take no adapters.*input_layernorm", why)


def test_every_family_is_measured_and_described(outcomes: list[Outcome]) -> None:
    measured = {FAMILIES[one.shape][0].model_type for one in outcomes}
    assert measured == set(SERVED) == set(KNOWN_AS)


def test_the_table_in_the_docs_is_what_was_measured(outcomes: list[Outcome]) -> None:
    """Writes the table; run twice to accept a change, and read its diff."""
    committed = rows(TABLE.read_text()) if TABLE.exists() else []
    measured = table(outcomes)
    if DEVICE == "cpu":  # of which it speaks
        TABLE.write_text(measured)
    assert rows(measured) == committed


def table(outcomes: list[Outcome]) -> str:
    lines = [
        HEAD,
        "| `model_type` | models | modules | shapes | largest error | not served |",
        "|---|---|---|---|---|---|",
    ]
    for family in sorted(SERVED):
        own = [one for one in outcomes if FAMILIES[one.shape][0].model_type == family]
        modules = ", ".join(f"`{name}`" for name in own[0].modules)
        refused = ", ".join(sorted({name for one in own for name in one.refused}))
        worst = 10.0 ** max(-5, math.ceil(math.log10(max(one.error for one in own))))
        lines.append(f"| `{family}` | {KNOWN_AS[family]} | {modules} | {len(own)} | {worst:.0e} | {refused} |")
    return "\n".join(lines) + "\n"


def rows(text: str) -> list[str]:
    """The table without the figures, which are a machine's."""
    return [re.sub(r"1e-\d+", "", line) for line in text.splitlines() if line.startswith("| `")]
