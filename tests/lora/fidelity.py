"""What PEFT can save, generated: every option of `LoraConfig` alone, and seeded combinations, each trained a little.

The measure of a case is the trained model itself, as it stands in memory when PEFT saves it.
"""

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn

from tests.tiny import ALL_LINEARS, hf_logits, prompt_ids, reconfigure

ATTENTION, MLP = ALL_LINEARS[:4], ALL_LINEARS[4:]
INVOCATION = (5, 6)  # tokens that a prompt must hold for an aLoRA to wake
ASLEEP = (5, 5, 5)  # tokens that the prompt does not hold
CONVERTED = "converted"  # not an option: saved with path_initial_model_for_weight_conversion
EMBEDDINGS = "save_embedding_layers"  # not an option either, but save_pretrained's

# Values of each option, each a case of its own on every family.
OPTIONS: dict[str, list[Any]] = {
    "target_modules": [
        None,
        *([name] for name in ALL_LINEARS),
        ATTENTION,
        MLP,
        ["q_proj", "v_proj", "query_key_value", "c_attn"],
        ["self_attn.q_proj", "mlp.down_proj"],
        ["model.layers.0.mlp.up_proj", "layers.1.self_attn.o_proj"],
        "all-linear",
        r".*_proj",
        r"model\.layers\.1\.(self_attn|mlp)\.(q|k|up)_proj",
        r".*\.(?:q_proj|down_proj)$",
        ["q_proj", "lm_head"],
        ["v_proj", "embed_tokens"],
        r".*(q_proj|lm_head)",
    ],
    "r": [1, 2, 3, 5, 7, 8, 9, 16, 17, 31, 33, 48, 63, 64],
    "lora_alpha": [0, 1, 3, 128, 0.5, -4],
    "use_rslora": [True],
    "lora_dropout": [0.3],
    "fan_in_fan_out": [True],
    "inference_mode": [True],
    "rank_pattern": [
        {"k_proj": 3},
        {r"layers\.0\..*": 2, "mlp.up_proj": 17},  # in the order that PEFT saves: the first that matches counts
        {"^model.layers.1.self_attn.q_proj": 11},
        {r"(model\.)?layers\.(0|1)\.mlp\.\w+_proj": 5},
        {r".*\.0\..*": 1, r".*\.1\..*": 40},
        {"proj": 30, "q_proj": 4},
    ],
    "alpha_pattern": [
        {"q_proj": 64},
        {r"model\.layers\.0\.mlp\.(gate|down)_proj": 3, "layers.1.self_attn.v_proj": 0},
        {"^model.layers.1.mlp.up_proj": 2.5},
        {r"(.*\.)?self_attn\..*": 5},
    ],
    "layers_to_transform": [0, 1, [1], [0, 1], [0, 7], []],
    "layers_pattern": ["layers", ["layers"], ["h", "layers"], r"lay\w+"],
    "exclude_modules": [
        ["k_proj"],
        ["layers.0.self_attn.q_proj", "up_proj"],
        ["nothing"],
        r".*\.0\..*",
        r"(model\.)?layers\.1\..*|.*gate_proj",
        r".*\.0\..*q_proj|.*\.1\..*k_proj|.*gate.*",
        ["lm_head"],
    ],
    "init_lora_weights": [
        True,
        False,
        "gaussian",
        "orthogonal",
        "eva",
        "mica",
        "pissa",
        "pissa_niter_4",
        "olora",
        "lora_ga",
        "corda",
        "loftq",
    ],
    "bias": ["lora_only", "all"],
    "lora_bias": [True],
    "use_dora": [True],
    "modules_to_save": [["lm_head"], ["embed_tokens"], ["up_proj"], []],
    "trainable_token_indices": [[3, 4], {"embed_tokens": [5]}],
    "target_parameters": [["mlp.up_proj.weight"], []],
    "alora_invocation_tokens": [list(INVOCATION), [INVOCATION[1]], list(ASLEEP), []],
    "layer_replication": [[(0, 2), (1, 2)]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "ensure_weight_tying": [True],
    "megatron_core": ["megatron.core.other"],
    "use_bdlora": [BdLoraConfig(["q_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"], 2, False)],
    "arrow_config": [{"top_k": 2}],
    "velora_config": [VeloraConfig()],
    "monteclora_config": [MontecloraConfig()],
    "kasa_config": [KasaConfig()],
    "eva_config": [EvaConfig(rho=1.5)],
    "lora_ga_config": [LoraGAConfig(scale="unit")],
    CONVERTED: ["pissa", "pissa_niter_4", "olora", "lora_ga"],
    EMBEDDINGS: [True],
}
# What an option needs beside it to mean anything.
_COMPANY: dict[str, dict[str, Any]] = {
    "target_parameters": {
        "rank_pattern": {"0.mlp.up_proj.weight": 3},
        "alpha_pattern": {"up_proj.weight": 5, "up_proj": 1},
    },
    "layers_pattern": {"layers_to_transform": [1]},
    "eva_config": {"init_lora_weights": "eva"},
    "lora_ga_config": {"init_lora_weights": "lora_ga"},
    "use_bdlora": {"target_modules": ["q_proj", "o_proj", "up_proj"]},
}
# Fields that say where an adapter comes from, not what its tensors mean, and companions of others.
ELSEWHERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "runtime_config", "megatron_config", "corda_config", "loftq_config",
}  # fmt: skip
# Configs that PEFT makes with attrs, scipy or several trained adapters only: the file alone says so.
_WRITTEN: dict[str, list[Any]] = {"init_lora_weights": ["corda", "loftq"], "arrow_config": [{"top_k": 2}]}
_DRAWN = (
    "target_modules", "r", "lora_alpha", "use_rslora", "lora_dropout", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "exclude_modules", "init_lora_weights", "inference_mode",
    "use_dora", "lora_bias", "bias",
)  # fmt: skip
_PLAIN: dict[str, list[Any]] = {
    "target_modules": OPTIONS["target_modules"][1:-3],
    "lora_alpha": [1, 3, 128, 0.5, -4],
    "init_lora_weights": [True, False, "gaussian", "mica"],
}


@dataclass(frozen=True)
class Case:
    """One config; `option` is its row in the table."""

    option: str
    config: dict[str, Any]


def alone() -> list[Case]:
    return [
        Case(_told({name: value} | _COMPANY.get(name, {})), {name: value} | _COMPANY.get(name, {}))
        for name, values in OPTIONS.items()
        for value in values
    ]


def together(seed: int) -> Iterator[Case]:
    """Random configs without end: PEFT takes not all of them, for some leave no module to adapt."""
    drawn, woken = random.Random(seed), random.Random(seed)
    while True:
        names = drawn.sample(_DRAWN, drawn.randint(3, 7))
        config = {name: drawn.choice(_PLAIN.get(name, OPTIONS[name])) for name in _DRAWN if name in names}
        if "r" in config:
            config["r"] = drawn.randint(1, 64)
        if woken.random() < 0.2:
            config["alora_invocation_tokens"] = list(INVOCATION)
        yield Case(_told(config), config)


def _told(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in config.items())


def train(base: nn.Module, config: dict[str, Any], folder: Path, seed: int) -> PeftModel:
    """Save what `config` makes of a copy of `base` after a step in a random direction; the model as it was saved."""
    config = config.copy()
    saving = {EMBEDDINGS: config.pop(EMBEDDINGS)} if EMBEDDINGS in config else {}
    converted = config.pop(CONVERTED, None)
    if converted:
        config["init_lora_weights"] = converted
    written = {name: config.pop(name) for name in _WRITTEN if config.get(name) in _WRITTEN[name]}
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    with _silence():
        wanted = LoraConfig(task_type="CAUSAL_LM", **({"r": 8, "lora_alpha": 16} | copy.deepcopy(config)))
        _PREPARED.get(str(wanted.init_lora_weights), lambda model, config: None)(model, wanted)
        peft = get_peft_model(model, wanted)
        if wanted.init_lora_weights == "eva":
            batch = {"input_ids": torch.tensor([prompt_ids(n, 60) for n in range(2)])}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            initialize_lora_eva_weights(peft, [batch] * 4, show_progress_bar=False)
        if converted:
            initial = folder.with_name(folder.name + "-initial")
            peft.peft_config["default"].init_lora_weights = True
            peft.save_pretrained(initial)
            peft.peft_config["default"].init_lora_weights = converted
            saving["path_initial_model_for_weight_conversion"] = str(initial)
        _step(peft)
        peft.save_pretrained(folder, **saving)
    reconfigure(folder, **written)
    return peft.eval()


def peft_logits(model: PeftModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """[T, V] float32 of all tokens, as `generate` computes them: an aLoRA is woken by the prompt, not by the answer."""
    tokens = [*prompt, *answer]
    if not model.active_peft_config.alora_invocation_tokens:
        return hf_logits(model, tokens)
    (offset,) = calculate_alora_offsets(model.peft_config, model.active_adapter, torch.tensor([list(prompt)]))
    with torch.inference_mode():
        from_end = None if offset is None else offset + len(answer)
        logits: Tensor = model(torch.tensor([tokens]), alora_offsets=[from_end]).logits[0]
    return logits


def _step(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:  # with inference_mode nothing wants a gradient
                fan = parameter.shape[-1] if parameter.dim() > 1 else 4
                parameter.add_(torch.randn(parameter.shape), alpha=0.5 / fan**0.5)


def _lora_ga(model: nn.Module, config: LoraConfig) -> None:
    config.target_modules = config.target_modules or ["q_proj", "v_proj"]
    config.lora_ga_config = config.lora_ga_config or LoraGAConfig()
    tokens = torch.tensor([prompt_ids(n, 40) for n in range(2)])
    preprocess_loraga(model, config, lambda: model(input_ids=tokens, labels=tokens).loss.backward())


_PREPARED: dict[str, Callable[[nn.Module, LoraConfig], None]] = {"lora_ga": _lora_ga}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """PEFT says much of what it thinks of a test's config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
