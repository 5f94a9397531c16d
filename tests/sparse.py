"""Shapes of mixtures of experts that are tested, by name: transformers' config and what differs from the usual."""

from transformers import (
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

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
}
