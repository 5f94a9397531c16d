"""Shapes of mixtures of experts that are tested, by name: transformers' config and what differs from the usual."""

from transformers import (
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

_GPT_OSS = {
    "head_dim": 16,
    "intermediate_size": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}


def _gate(**constants: object) -> dict[str, object]:
    """Of gpt-oss' experts, where this version of transformers has them in its config."""
    return constants if hasattr(GptOssConfig(), "swiglu_limit") else {}


SPARSE: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 11}),
    "qwen2-moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 3,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2-moe normalised": (
        Qwen2MoeConfig,
        {
            "num_experts": 9,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (OlmoeConfig, {"num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 24}),
    "granite-moe": (
        GraniteMoeConfig,
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "gpt-oss": (GptOssConfig, _GPT_OSS | _gate(swiglu_limit=0.8)),
    "gpt-oss without biases, one key head": (
        GptOssConfig,
        _GPT_OSS
        | {
            "attention_bias": False,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        }
        | _gate(swiglu_alpha=1.1),
    ),
}
