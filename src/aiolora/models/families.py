"""Model families as data: what their Hugging Face config means for the one decoder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from aiolora.errors import UnsupportedModelError
from aiolora.models.decoder import DecoderConfig
from aiolora.models.multimodal import MULTIMODAL, PREFIX

Switches = Callable[[Any], dict[str, object]]


def _llama(hf: Any) -> dict[str, object]:
    return {
        "qkv_bias": bool(hf.attention_bias),
        "o_bias": bool(hf.attention_bias),
        "mlp_bias": bool(hf.mlp_bias),
    }


def _mistral(hf: Any) -> dict[str, object]:
    return {"windows": (hf.sliding_window or 0,) * hf.num_hidden_layers}


def _qwen2(hf: Any) -> dict[str, object]:
    return {"qkv_bias": True, "windows": _typed_windows(hf)}


def _qwen2_vl(hf: Any) -> dict[str, object]:
    return _qwen2(hf) | {"rope_sections": tuple(hf.rope_parameters["mrope_section"])}


def _qwen3(hf: Any) -> dict[str, object]:
    bias = bool(hf.attention_bias)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": _typed_windows(hf)}


_TEXT_OF_OTHERS = {"qwen2_vl_text": _qwen2_vl, "qwen2_5_vl_text": _qwen2_vl}  # within multi-modal models only

FAMILIES: dict[str, Switches] = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}
FAMILIES |= _TEXT_OF_OTHERS


def decoder_config(hf: Any, *, max_positions: int | None = None) -> DecoderConfig:
    """The decoder of a transformers config; `max_positions` shortens the context.

    Raises `UnsupportedModelError` for a family, activation or rope type that is not served.
    """
    if hf.model_type in MULTIMODAL:
        config = decoder_config(hf.get_text_config(), max_positions=max_positions)
        return replace(config, prefix=PREFIX, tied_head=bool(getattr(hf, "tie_word_embeddings", False)))
    if hf.model_type not in FAMILIES:
        served = ", ".join(sorted(MULTIMODAL.keys() | (FAMILIES.keys() - _TEXT_OF_OTHERS.keys())))
        raise UnsupportedModelError(f"model_type {hf.model_type!r} is not served; served are: {served}")
    if hf.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act {hf.hidden_act!r} is not served, only silu")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq, rope_scale = _rope(hf, head_dim)
    common: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": head_dim,
        "norm_eps": hf.rms_norm_eps,
        "max_positions": min(max_positions or hf.max_position_embeddings, hf.max_position_embeddings),
        "inv_freq": inv_freq,
        "rope_scale": rope_scale,
        "windows": (0,) * hf.num_hidden_layers,
        "tied_head": bool(getattr(hf, "tie_word_embeddings", False)),
    }
    return DecoderConfig(**(common | FAMILIES[hf.model_type](hf)))


def _typed_windows(hf: Any) -> tuple[int, ...]:
    return tuple(hf.sliding_window if kind == "sliding_attention" else 0 for kind in hf.layer_types)


def _rope(hf: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Rotary frequencies and the factor on cos and sin, by transformers' own formulas."""
    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        theta = hf.rope_parameters["rope_theta"]
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / theta**exponent).tolist()), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModelError(f"rope type {kind!r} is not served; served are: default, linear, llama3, yarn")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # 4 s to import: only where it is needed

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](hf, device="cpu")
    return tuple(inv_freq.tolist()), float(scale)
