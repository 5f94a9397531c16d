"""Shapes of the dense families for `tests.tiny`, each switch of a family on and off in some of them."""

from transformers import (
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MinistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

_GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 0}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
_PHI = {"pad_token_id": None}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.5,
}
_SMOLLM = {"pad_token_id": None, "tie_word_embeddings": True}


def _rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def longrope(pairs: int, trained: int, **values: object) -> dict[str, object]:
    """transformers takes the long factors for texts of more than `trained` tokens."""
    factors = [1.0 + 0.1 * pair for pair in range(pairs)]
    return _rope(
        "longrope",
        original_max_position_embeddings=trained,
        short_factor=factors,
        long_factor=[2 * factor for factor in factors],
        **values,
    )


DENSE: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama dynamic": (LlamaConfig, _rope("dynamic", factor=2.0)),
    "llama longrope": (LlamaConfig, longrope(6, 256, factor=4.0)),
    "gemma": (GemmaConfig, _GEMMA),
    "gemma biased, one key head": (GemmaConfig, _GEMMA | {"attention_bias": True, "num_key_value_heads": 1}),
    "gemma2": (Gemma2Config, _GEMMA | _MIXED | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    "gemma2 without caps, untied": (
        Gemma2Config,
        _GEMMA | {"tie_word_embeddings": False, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (Gemma3TextConfig, _GEMMA | _MIXED | {"query_pre_attn_scalar": 20}),
    "gemma3 capped, every head its own": (
        Gemma3TextConfig,
        _GEMMA | _MIXED | {"num_key_value_heads": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    ),
    "phi3": (Phi3Config, _PHI | {"sliding_window": 9}),
    "phi3 partly rotated, tied": (
        Phi3Config,
        _PHI | _rope("default", partial_rotary_factor=0.5) | {"hidden_size": 64, "tie_word_embeddings": True},
    ),
    "phi3 longrope": (
        Phi3Config,
        _PHI | longrope(6, 1, partial_rotary_factor=0.75, attention_factor=1.2) | {"hidden_size": 64},
    ),
    "granite": (GraniteConfig, _GRANITE | {"tie_word_embeddings": True}),
    "granite biased": (GraniteConfig, _GRANITE | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "granite 4": (
        GraniteMoeHybridConfig,
        _GRANITE
        | {
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 72,
            "mamba_n_heads": 4,
        },
    ),
    "granite 4 without positions": (
        GraniteMoeHybridConfig,
        _GRANITE
        | {
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "mamba_n_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "olmo2 biased, every head its own": (Olmo2Config, {"attention_bias": True, "num_key_value_heads": 4}),
    "olmo3": (
        Olmo3Config,
        _MIXED
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            }
        },
    ),
    "exaone4": (Exaone4Config, _MIXED),
    "seed_oss": (SeedOssConfig, {"head_dim": 16, "attention_bias": True, "attention_out_bias": False}),
    "ministral": (MinistralConfig, _MIXED | {"head_dim": 16}),
    "smollm3": (SmolLM3Config, _SMOLLM | {"no_rope_layer_interval": 2}),
    "smollm3 windowed": (
        SmolLM3Config,
        _SMOLLM | {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 9, "hidden_size": 64},
    ),
    "starcoder2": (Starcoder2Config, {"tie_word_embeddings": True}),
    "starcoder2 windowed without biases": (Starcoder2Config, {"use_bias": False, "sliding_window": 9}),
}
