"""Model families as data: what their Hugging Face config means for the one decoder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from aiolora.errors import UnsupportedModelError
from aiolora.models.decoder import DecoderConfig, LayerNorms, Rope
from aiolora.models.moe import MoEConfig
from aiolora.models.multimodal import MULTIMODAL, PREFIX, RENAMED
from aiolora.ops.experts import Gate

Switches = Callable[[Any], dict[str, object]]

_GELUS = ("gelu_pytorch_tanh", "gelu_new")  # one formula: gelu as tanh approximates it
_ACTIVATIONS = {"silu": "silu gated", "swish": "silu gated", **dict.fromkeys(_GELUS, "gelu gated")}
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_OUTPUTS_NORMED = LayerNorms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_OUTPUTS_ONLY = _OUTPUTS_NORMED._replace(before_attention=None, before_mlp=None)


def _llama(hf: Any) -> dict[str, object]:
    return _biases(hf) | {"mlp_bias": bool(hf.mlp_bias)}


def _mistral(hf: Any) -> dict[str, object]:
    return {"windows": (hf.sliding_window or 0,) * hf.num_hidden_layers}


def _qwen2(hf: Any) -> dict[str, object]:
    return {"qkv_bias": True, "windows": _typed_windows(hf)}


def _qwen2_vl(hf: Any) -> dict[str, object]:
    return _qwen2(hf) | {"rope_sections": tuple(hf.rope_parameters["mrope_section"])}


def _qwen3(hf: Any) -> dict[str, object]:
    return _biases(hf) | {"qk_norm": "head", "windows": _typed_windows(hf)}


def _gemma(hf: Any) -> dict[str, object]:
    if hf.use_bidirectional_attention:
        raise UnsupportedModelError("use_bidirectional_attention is not served: a token sees those before it only")
    return _biases(hf) | {"norm_offset": 1.0, "embedding_scale": hf.hidden_size**0.5}


def _gemma2(hf: Any) -> dict[str, object]:
    return _gemma(hf) | {
        "norms": _OUTPUTS_NORMED,
        "attention_scale": hf.query_pre_attn_scalar**-0.5,
        "attention_cap": hf.attn_logit_softcapping or 0.0,
        "logits_cap": hf.final_logit_softcapping or 0.0,
        "windows": _typed_windows(hf),
    }


def _gemma3(hf: Any) -> dict[str, object]:
    """Its attention has no cap, whatever the config says, and a rope of its own where there is a window."""
    return _gemma2(hf) | {"attention_cap": 0.0, "qk_norm": "head", "ropes": _typed_ropes(hf)}


def _phi3(hf: Any) -> dict[str, object]:
    rotated = int(_head_dim(hf) * hf.rope_parameters["partial_rotary_factor"])
    return _mistral(hf) | {
        "qkv": ("qkv_proj",),
        "gate_up": ("gate_up_proj",),
        "ropes": (_rope(hf, rotated),) * hf.num_hidden_layers,
    }


def _granite(hf: Any) -> dict[str, object]:
    return _llama(hf) | _granite_scales(hf)


def _granite_scales(hf: Any) -> dict[str, object]:
    """Its layers add `residual_multiplier` of what they compute.

    Here the stream is divided by it instead, which no norm notices whose epsilon is divided by its square.
    """
    return {
        "embedding_scale": hf.embedding_multiplier / hf.residual_multiplier,
        "norm_eps": hf.rms_norm_eps / hf.residual_multiplier**2,
        "attention_scale": hf.attention_multiplier,
        "logits_divisor": hf.logits_scaling,
    }


def _granite_hybrid(hf: Any) -> dict[str, object]:
    """Granite 4 where it is dense and attends in all layers: its MLP is what others have beside experts."""
    kinds = set(hf.layers_block_type)
    if hf.num_local_experts or kinds & {"linear_attention", "mamba"}:
        raise UnsupportedModelError(
            f"granitemoehybrid with num_local_experts={hf.num_local_experts} and layers of {', '.join(sorted(kinds))} "
            "is not served, only without experts and with attention in every layer"
        )
    turning = [hf.position_embedding_type == "rope"] * hf.num_hidden_layers
    mlp = {"mlp": "shared_mlp", "gate_up": ("input_linear",), "down": "output_linear"}
    sizes = {"intermediate_size": hf.shared_intermediate_size, "ropes": _some_ropes(hf, turning)}
    return _biases(hf) | _granite_scales(hf) | mlp | sizes


def _olmo2(hf: Any) -> dict[str, object]:
    return _biases(hf) | {"qk_norm": "all", "norms": _OUTPUTS_ONLY}


def _olmo3(hf: Any) -> dict[str, object]:
    return _olmo2(hf) | {"windows": _typed_windows(hf), "ropes": _typed_ropes(hf)}


def _exaone4(hf: Any) -> dict[str, object]:
    turning = [hf.sliding_window is None or kind == "sliding_attention" for kind in hf.layer_types]
    return {"qk_norm": "head", "norms": _OUTPUTS_ONLY, "windows": _typed_windows(hf), "ropes": _some_ropes(hf, turning)}


def _smollm3(hf: Any) -> dict[str, object]:
    return _llama(hf) | {
        "ropes": _some_ropes(hf, hf.no_rope_layers[: hf.num_hidden_layers]),
        "windows": _typed_windows(hf) if hf.use_sliding_window else (0,) * hf.num_hidden_layers,
    }


def _seed_oss(hf: Any) -> dict[str, object]:
    return _llama(hf) | {"o_bias": bool(hf.attention_out_bias)}


def _ministral(hf: Any) -> dict[str, object]:
    return {"windows": _typed_windows(hf)}


def _starcoder2(hf: Any) -> dict[str, object]:
    if hf.hidden_act not in _GELUS:
        raise UnsupportedModelError(f"hidden_act {hf.hidden_act!r} without a gate is not served, only {_GELUS[0]}")
    bias = bool(hf.use_bias)
    return _mistral(hf) | {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "activation": "gelu",
        "layer_norm": True,
        "norm_eps": hf.norm_epsilon,
        "gate_up": ("c_fc",),
        "down": "c_proj",
    }


def _mixtral(hf: Any) -> dict[str, object]:
    moe = _experts(hf, hf.num_local_experts, inner=hf.intermediate_size, normalised=True)
    parts = (r"\.w1\b", ".gate_proj"), (r"\.w3\b", ".up_proj"), (r"\.w2\b", ".down_proj")
    return _mistral(hf) | {"moe": moe, "renamed": ((r"\.block_sparse_moe\.", ".mlp."), *parts)}


def _qwen2_moe(hf: Any) -> dict[str, object]:
    moe = replace(_qwen_experts(hf), shared=hf.shared_expert_intermediate_size)
    return {"qkv_bias": bool(hf.qkv_bias), "windows": _typed_windows(hf), "moe": moe}


def _qwen3_moe(hf: Any) -> dict[str, object]:
    return _biases(hf) | _mistral(hf) | {"qk_norm": "head", "moe": _qwen_experts(hf)}


def _olmoe(hf: Any) -> dict[str, object]:
    if hf.clip_qkv is not None:
        raise UnsupportedModelError(f"clip_qkv={hf.clip_qkv} is not served: q, k and v are not clipped")
    moe = _experts(hf, hf.num_experts, inner=hf.intermediate_size, normalised=bool(hf.norm_topk_prob))
    return _biases(hf) | {"qk_norm": "all", "moe": moe}


def _granitemoe(hf: Any) -> dict[str, object]:
    moe = _experts(hf, hf.num_local_experts, inner=hf.intermediate_size, normalised=True)
    block = r"(\.block_sparse_moe\.)"
    old = (
        (rf"{block}input_linear\.weight$", r"\1experts.gate_up_proj"),
        (rf"{block}output_linear\.weight$", r"\1experts.down_proj"),
        (rf"{block}router\.layer\.weight$", r"\1router.weight"),
    )
    return (
        _biases(hf)
        | _granite_scales(hf)
        | {"moe": replace(moe, path="block_sparse_moe", gate="router"), "renamed": old}
    )


def _gpt_oss(hf: Any) -> dict[str, object]:
    # constants of transformers' code until its config had them
    limit: float = getattr(hf, "swiglu_limit", 7.0)
    if limit <= 0:
        raise UnsupportedModelError(f"swiglu_limit={limit} is not served, only limits above zero")
    moe = _experts(hf, hf.num_local_experts, inner=hf.intermediate_size, normalised=True)
    gate = Gate(getattr(hf, "swiglu_alpha", 1.702), limit)
    moe = replace(moe, gate="router", bias=True, activation=gate, turned=True)
    return _biases(hf) | {"sinks": True, "windows": _typed_windows(hf), "moe": moe}


def _experts(hf: Any, count: int, *, inner: int, normalised: bool) -> MoEConfig:
    """In every layer."""
    layers = frozenset(range(hf.num_hidden_layers))
    return MoEConfig(experts=count, top_k=hf.num_experts_per_tok, inner=inner, normalised=normalised, layers=layers)


def _qwen_experts(hf: Any) -> MoEConfig:
    moe = _experts(hf, hf.num_experts, inner=hf.moe_intermediate_size, normalised=bool(hf.norm_topk_prob))
    sparse = range(hf.decoder_sparse_step - 1, hf.num_hidden_layers, hf.decoder_sparse_step)
    return replace(moe, layers=frozenset(sparse if hf.num_experts else ()) - set(hf.mlp_only_layers))


FAMILIES: dict[str, Switches] = {
    "exaone4": _exaone4,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "granitemoehybrid": _granite_hybrid,
    "llama": _llama,
    "ministral": _ministral,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "olmoe": _olmoe,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "seed_oss": _seed_oss,
    "smollm3": _smollm3,
    "starcoder2": _starcoder2,
}
_WITHIN: dict[str, Switches] = {"qwen2_vl_text": _qwen2_vl, "qwen2_5_vl_text": _qwen2_vl}  # multi-modal models only


def decoder_config(hf: Any, *, max_positions: int | None = None) -> DecoderConfig:
    """The decoder of a transformers config; `max_positions` shortens the context.

    Raises `UnsupportedModelError` for a family, activation or rope type that is not served.
    """
    if hf.model_type in MULTIMODAL:
        config = decoder_config(hf.get_text_config(), max_positions=max_positions)
        tied = bool(getattr(hf, "tie_word_embeddings", False))
        return replace(config, prefix=PREFIX, tied_head=tied, renamed=(*RENAMED, *config.renamed))
    switches = FAMILIES.get(hf.model_type) or _WITHIN.get(hf.model_type)
    if switches is None:
        served = ", ".join(sorted(FAMILIES.keys() | MULTIMODAL.keys()))
        raise UnsupportedModelError(f"model_type {hf.model_type!r} is not served; served are: {served}")
    own = switches(hf)
    layers, head_dim = hf.num_hidden_layers, _head_dim(hf)
    common: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads or hf.num_attention_heads,
        "head_dim": head_dim,
        "norm_eps": getattr(hf, "rms_norm_eps", 0.0),
        "max_positions": min(max_positions or hf.max_position_embeddings, hf.max_position_embeddings),
        "ropes": own.get("ropes") or (_rope(hf, head_dim),) * layers,
        "windows": (0,) * layers,
        "tied_head": bool(getattr(hf, "tie_word_embeddings", False)),
        "activation": _activation(hf),
    }
    said = common | own
    if said.get("moe") is not None and said["activation"] != "silu gated":
        raise UnsupportedModelError(f"experts with hidden_act {hf.hidden_act!r} are not served, only with silu")
    return DecoderConfig(**said)


def _biases(hf: Any) -> dict[str, object]:
    bias = bool(hf.attention_bias)
    return {"qkv_bias": bias, "o_bias": bias}


def _activation(hf: Any) -> str:
    said: str = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if said not in _ACTIVATIONS:
        raise UnsupportedModelError(f"hidden_act {said!r} is not served; served are: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[said]


def _head_dim(hf: Any) -> int:
    head_dim: int = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return head_dim


def _typed_windows(hf: Any) -> tuple[int, ...]:
    return tuple(hf.sliding_window if kind == "sliding_attention" else 0 for kind in hf.layer_types)


def _typed_ropes(hf: Any) -> tuple[Rope, ...]:
    """Of a config that has rope parameters for each type of layer."""
    ropes = {kind: _rope(hf, _head_dim(hf), kind) for kind in set(hf.layer_types)}
    return tuple(ropes[kind] for kind in hf.layer_types)


def _some_ropes(hf: Any, turning: Sequence[bool]) -> tuple[Rope, ...]:
    """Layers without positions (NoPE, arXiv 2305.19466) turn q and k by no angle."""
    dim = _head_dim(hf)
    rope, none = _rope(hf, dim), Rope((0.0,) * (dim // 2))
    return tuple(rope if turns else none for turns in turning)


def _rope(hf: Any, rotated: int, kind: str | None = None) -> Rope:
    """The rope of `rotated` values of a head, by transformers' own formulas; `kind`: of layers, where they differ."""
    parameters = hf.rope_parameters if kind is None else hf.rope_parameters[kind]
    rope_type = parameters["rope_type"]
    if rope_type not in _ROPES:
        raise UnsupportedModelError(f"rope type {rope_type!r} is not served; served are: {', '.join(_ROPES)}")
    if rope_type in ("default", "dynamic"):  # NTK scaling of the base begins beyond max_position_embeddings
        exponent = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
        return Rope(tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # 4 s to import: only where it is needed

    def formula(seq_len: int | None = None) -> tuple[tuple[float, ...], float]:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](hf, device="cpu", seq_len=seq_len, layer_type=kind)
        return tuple(inv_freq.tolist()), float(scale)

    if rope_type != "longrope":
        return Rope(*formula())
    trained: int = parameters["original_max_position_embeddings"]
    return Rope(*formula(), trained, formula(trained + 1)[0])
