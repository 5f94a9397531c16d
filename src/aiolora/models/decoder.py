"""The one decoder: attention and a gated MLP on a residual stream; how families differ is named as switches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.models.layers import Embedding, Linear, Norm
from aiolora.ops.activation import gated
from aiolora.ops.attention import attention_op, stored
from aiolora.ops.norm import norm_after


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a family's decoder, whatever the checkpoint calls them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    inv_freq: tuple[float, ...]  # head_dim / 2 rotary frequencies, radians a token
    rope_scale: float = 1.0  # on cos and sin (YaRN's attention factor)
    windows: tuple[int, ...]  # each layer's sliding window, tokens; 0: none
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head of q and k before the rotation (Qwen3)


class Layer(nn.Module):
    """One block: attention, then the MLP."""

    def __init__(self, config: DecoderConfig, index: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        name, hidden, kv = f"model.layers.{index}", config.hidden_size, config.num_kv_heads * config.head_dim
        heads = config.num_heads * config.head_dim
        attn, mlp = f"{name}.self_attn", f"{name}.mlp"

        def linear(inputs: int, parts: dict[str, int], bias: bool) -> Linear:
            return Linear(inputs, parts, bias=bias, dtype=dtype, device=device)

        def norm(path: str, size: int) -> Norm:
            return Norm(path, size, config.norm_eps, dtype=dtype, device=device)

        qkv = {f"{attn}.q_proj": heads, f"{attn}.k_proj": kv, f"{attn}.v_proj": kv}
        gate_up = {f"{mlp}.gate_proj": config.intermediate_size, f"{mlp}.up_proj": config.intermediate_size}
        self.num_heads = config.num_heads
        self.scale = config.head_dim**-0.5
        self.window = config.windows[index]
        self.input_norm = norm(f"{name}.input_layernorm", hidden)
        self.qkv = linear(hidden, qkv, config.qkv_bias)
        self.q_norm = norm(f"{attn}.q_norm", config.head_dim) if config.qk_norm else None
        self.k_norm = norm(f"{attn}.k_norm", config.head_dim) if config.qk_norm else None
        self.o = linear(heads, {f"{attn}.o_proj": hidden}, config.o_bias)
        self.post_norm = norm(f"{name}.post_attention_layernorm", hidden)
        self.gate_up = linear(hidden, gate_up, config.mlp_bias)
        self.down = linear(config.intermediate_size, {f"{mlp}.down_proj": hidden}, config.mlp_bias)

    def forward(
        self, x: Tensor, residual: Tensor, step: StepInputs, kv: LayerKV, cos_sin: Tensor, next_norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """`x` [T, H] normalised, `residual` [T, H] -> the same two for the next layer, under its norm."""
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        q = stored(
            self.qkv(x, step.routing),
            norms,
            self.input_norm.eps,
            cos_sin,
            step.positions,
            step.slots,
            kv.k,
            kv.v,
            self.num_heads,
        )
        seen = attention_op(
            q, kv.k, kv.v, step.block_tables, step.kv_lengths, step.query_starts, self.scale, self.window
        )
        x, residual = norm_after(self.o(seen, step.routing), residual, self.post_norm.weight, self.post_norm.eps)
        inner = gated(self.gate_up(x, step.routing))
        return norm_after(self.down(inner, step.routing), residual, next_norm.weight, next_norm.eps)


class Decoder(nn.Module):
    """Tokens to hidden states, hidden states to logits."""

    cos_sin: Tensor

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = Norm("model.norm", config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.head = Linear(
            config.hidden_size,
            {"lm_head": config.vocab_size},
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.embed.weight if config.tied_head else None,
        )
        self.register_buffer("cos_sin", _cos_sin(config).to(device), persistent=False)

    def forward(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`, behind the last norm; keys and values go into `kv`."""
        residual = self.embed(step.tokens, step.previous)
        layers: Iterable[Layer] = self.layers  # type: ignore[assignment]
        norms = [layer.input_norm for layer in layers] + [self.norm]
        x: Tensor = norms[0](residual)
        for layer, layer_kv, next_norm in zip(layers, kv, norms[1:]):
            x, residual = layer(x, residual, step, layer_kv, self.cos_sin, next_norm)
        return x if step.logits_at is None else x[step.logits_at]

    def logits(self, hidden: Tensor, step: StepInputs) -> Tensor:
        """Logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        logits: Tensor = self.head(hidden, None).y
        return logits if logits.is_cuda else logits.float()

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, the view of a parameter that it fills) of every tensor."""
        for module in self.modules():
            if isinstance(module, (Linear, Embedding, Norm)) and not (module is self.head and self.config.tied_head):
                yield from module.checkpoint()

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of everything inside the layers."""
        for index, layer in enumerate(self.layers):
            for module in layer.children():
                if isinstance(module, Linear):
                    yield index, module


def _cos_sin(config: DecoderConfig) -> Tensor:
    """Cos | sin of every position, [max_positions, head_dim] float32."""
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * config.rope_scale
