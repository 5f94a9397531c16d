"""Tiny models of architectures that only transformers computes, and of those that nobody serves."""

import contextlib
import io
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from tests import tiny
from tests.tiny import EOS, word_tokenizer

SIZES: dict[str, object] = tiny.SIZES | {"hidden_size": 64, "pad_token_id": None}
_WINDOW: dict[str, object] = {"sliding_window": 9}
_MIXED: dict[str, object] = _WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
_TIED: dict[str, object] = {"tie_word_embeddings": True}
_HEAD: dict[str, object] = {"head_dim": 16}
_EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, object] = _EXPERTS | {  # multi-head latent attention: keys of 24, values of 12
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

SERVED: dict[str, tuple[str, dict[str, object]]] = {
    "afmoe": ("afmoe", _EXPERTS | _MIXED | _HEAD),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "biogpt": ("biogpt", {"pad_token_id": 0}),
    "bitnet": ("bitnet", {}),
    "cohere": ("cohere", _TIED | {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("cohere2", _MIXED | {"logit_scale": 0.5}),
    "ctrl": ("ctrl", {}),
    "cwm": ("cwm", _MIXED | _HEAD),
    "deepseek_v2": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "ernie4_5": ("ernie4_5", _HEAD),
    "ernie4_5_moe": ("ernie4_5_moe", _EXPERTS),
    "flex_olmo": ("flex_olmo", _EXPERTS),
    "gemma4": (
        "gemma4_text",
        _HEAD | _MIXED | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 32},
    ),
    "glm": ("glm", _HEAD | {"pad_token_id": 0}),
    "glm4": ("glm4", _HEAD | {"pad_token_id": 0}),
    "glm4_moe": ("glm4_moe", _EXPERTS | _HEAD),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox one norm after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "granite_swa": ("granite_swa", _MIXED),
    "granitemoeshared": ("granitemoeshared", _EXPERTS),
    "helium": ("helium", _HEAD),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEAD),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", _EXPERTS | _HEAD),
    "hyperclovax": ("hyperclovax", {}),
    "jais2": ("jais2", {}),
    "jetmoe": ("jetmoe", _EXPERTS | {"kv_channels": 16}),
    "llama4": (
        "llama4_text",
        _EXPERTS
        | _HEAD
        | {"intermediate_size_mlp": 64, "attention_chunk_size": 16, "no_rope_layers": [1, 0], "pad_token_id": 0},
    ),
    "minicpm3": ("minicpm3", _LATENT),
    "ministral3": ("ministral3", _HEAD),
    "moshi": ("moshi", {"sliding_window": 9}),
    "nanochat": ("nanochat", {}),
    "nemotron": ("nemotron", _HEAD),
    "olmo": ("olmo", {"clip_qkv": 1.5}),
    "opt": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 64, "pad_token_id": 0}),
    "opt projected": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", {"qk_layernorm": True}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phimoe": ("phimoe", _EXPERTS | {"sliding_window": 9, "lm_head_bias": True}),
    "stablelm": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "vaultgemma": ("vaultgemma", _HEAD | _MIXED | _TIED),
    "youtu": ("youtu", _LATENT),
}

ONE_BY_ONE: dict[str, tuple[str, dict[str, object]]] = {  # served as well, one sequence of a step after the other
    "bloom": ("bloom", {}),
    "codegen": ("codegen", {"rotary_dim": 8}),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "falcon": ("falcon", {}),
    "falcon with alibi": ("falcon", {"alibi": True, "bias": True}),
    "falcon with groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 9}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "hrm_text": ("hrm_text", {}),
    "mpt": ("mpt", {}),
    "xglm": ("xglm", {"pad_token_id": 0}),
}
SERVED |= ONE_BY_ONE

OURS: dict[str, tuple[str, dict[str, object]]] = {  # of our decoder, here by transformers' code
    "gemma3": ("gemma3_text", _HEAD | _MIXED | _TIED | {"query_pre_attn_scalar": 20}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 0.5},
    ),
    "olmo2": ("olmo2", {}),
}

REFUSED: dict[str, tuple[str, dict[str, object], str]] = {  # name -> (model_type, changes, what the refusal says)
    "bamba": ("bamba", {}, "layers of linear_attention keep a state"),
    "bert": ("bert", {}, "its head is more than a projection"),
    "cpmant": ("cpmant", {}, "does not run on vectors alone"),
    "deepseek_v32": ("deepseek_v32", _LATENT, "layers of indexed_attention keep a state"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of conv keep a state"),
    "mamba": ("mamba", {}, "layers of linear_attention keep a state"),
    "minimax": ("minimax", {}, "layers of linear_attention keep a state"),
    "openai-gpt": ("openai-gpt", {}, "do not keep keys and values of each token"),
    "rwkv": ("rwkv", {}, "do not keep keys and values of each token"),
    "t5": ("t5", {}, "an encoder-decoder"),
}


def make_borrowed(folder: Path, kind: str, changes: dict[str, object], *, seed: int = 0) -> Path:
    """Save a model of the type `kind` with random weights under which every part of it tells."""
    config = CONFIG_MAPPING[kind](**(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    draw(model, seed)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=EOS).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_config(folder: Path, kind: str, changes: dict[str, object]) -> Path:
    """A config of the type `kind` and nothing else."""
    CONFIG_MAPPING[kind](**(SIZES | changes)).save_pretrained(folder)
    return folder


def draw(model: nn.Module, seed: int) -> None:
    """As `tiny.fill`, whatever a model calls its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise if name.endswith(("bias", "sinks")) else 1 + 0.2 * noise)
