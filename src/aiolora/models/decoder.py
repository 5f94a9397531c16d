"""The one decoder: attention and a gated MLP on a residual stream; how families differ is named as switches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aiolora.models.inputs import HeadInputs, LayerKV, StepInputs
from aiolora.models.layers import Embedding, Linear, Norm
from aiolora.ops.activation import gated
from aiolora.ops.attention import attention_op, stored
from aiolora.ops.blocks import OwnNorms, own_logits_op, own_norm_op
from aiolora.ops.linear import Partial, complete_op, shrink_op
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
    prefix: str = "model"  # of the names that modules have in a checkpoint, as transformers has them now
    rope_sections: tuple[int, ...] = ()  # frequencies that turn with each axis in turn (M-RoPE); (): there is one axis
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head of q and k before the rotation (Qwen3)


class Layer(nn.Module):
    """One block: attention, then the MLP."""

    def __init__(self, config: DecoderConfig, index: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        name, hidden, kv = f"{config.prefix}.layers.{index}", config.hidden_size, config.num_kv_heads * config.head_dim
        self.index = index
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
        x = own_norm(step.own_norms, x, residual, 2 * self.index + 1, self.post_norm)
        inner = gated(self.gate_up(x, step.routing))
        x, residual = norm_after(self.down(inner, step.routing), residual, next_norm.weight, next_norm.eps)
        return own_norm(step.own_norms, x, residual, 2 * self.index + 2, next_norm), residual


class Decoder(nn.Module):
    """Tokens to hidden states, hidden states to logits."""

    cos_sin: Tensor

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.config = config
        prefix, hidden = config.prefix, config.hidden_size
        self.embed = Embedding(f"{prefix}.embed_tokens", config.vocab_size, hidden, dtype=dtype, device=device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = Norm(f"{prefix}.norm", hidden, config.norm_eps, dtype=dtype, device=device)
        self.head = Linear(
            hidden,
            {"lm_head": config.vocab_size},
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.embed.weight if config.tied_head else None,
        )
        self.register_buffer("cos_sin", _cos_sin(config).to(device), persistent=False)

    def forward(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`, behind the last norm; keys and values go into `kv`."""
        embeds = step.routing if step.embeds else None
        residual = self.embed(step.tokens, step.previous, embeds, step.own_embeddings)
        if step.media is not None:
            residual = residual.index_copy(0, step.media.at, step.media.rows)
        cos_sin = self.cos_sin
        if step.axes is not None:
            cos_sin = turned(cos_sin, step.axes, self.config.rope_sections)
            step = replace(step, positions=torch.arange(len(cos_sin), dtype=torch.int32, device=cos_sin.device))
        layers: Iterable[Layer] = self.layers  # type: ignore[assignment]
        norms = [layer.input_norm for layer in layers] + [self.norm]
        x: Tensor = own_norm(step.own_norms, norms[0](residual), residual, 0, norms[0])
        for layer, layer_kv, next_norm in zip(layers, kv, norms[1:]):
            x, residual = layer(x, residual, step, layer_kv, cos_sin, next_norm)
        return x if step.logits_at is None else x[step.logits_at]

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        logits: Tensor = self.head(hidden, None).y
        return logits if logits.is_cuda else logits.float()

    def amended(self, logits: Tensor, hidden: Tensor, adapters: HeadInputs | None) -> Tensor:
        """`logits` [S, V] of `hidden` [S, H] with what adapters do to the head; may write to `logits`.

        Wider where an adapter has added tokens; -inf for tokens that a row's own adapter, or the base, does not know.
        """
        if adapters is None:
            return logits
        routing, site = adapters.routing, self.head.site
        vocabulary = logits.shape[1]
        if adapters.widest > vocabulary:
            logits = F.pad(logits, (0, adapters.widest - vocabulary))
        if adapters.own is not None:
            own_logits_op(logits, hidden, *adapters.own, routing.perm, routing.tiles, routing.tile)
        if site is not None and adapters.low_rank:
            tables = [routing.perm, routing.tiles, routing.items, routing.pages, routing.scales]
            h = shrink_op(hidden, site.a, tables, [site.kind, routing.tile])
            of_base = complete_op(*Partial(logits[:, :vocabulary].contiguous(), None, h, site, routing).flat)
            logits = of_base if logits.shape[1] == vocabulary else torch.cat((of_base, logits[:, vocabulary:]), dim=1)
        if adapters.vocabularies is None:
            return logits
        known = torch.where(adapters.vocabularies > 0, adapters.vocabularies, vocabulary)
        ids = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(ids >= known.unsqueeze(1), -torch.inf)

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

    def norms(self) -> Iterator[Norm]:
        """Those on the residual stream, in the order of `ops.blocks.OwnNorms`."""
        layers: Iterable[Layer] = self.layers  # type: ignore[assignment]
        for layer in layers:
            yield layer.input_norm
            yield layer.post_norm
        yield self.norm


def own_norm(own: OwnNorms | None, x: Tensor, residual: Tensor, number: int, norm: Norm) -> Tensor:
    """`x` [T, H], which is `norm` of `residual`, by the norms of those adapters that have their own."""
    return x if own is None else own_norm_op(x, residual, norm.weight, *own, number, norm.eps)


def turned(cos_sin: Tensor, axes: Tensor, sections: Sequence[int]) -> Tensor:
    """A table [T, D] of each token's own, of `cos_sin` [positions, D] where it stands on three `axes` [3, T].

    The first so many frequencies turn with the first axis, the next with the second, and on in turn (M-RoPE, Qwen2-VL,
    arXiv 2409.12191).
    """
    cos, sin = cos_sin[axes].chunk(2, dim=-1)
    parts = [torch.split(half, list(sections), dim=-1) for half in (cos, sin)]
    return torch.cat([part[i % 3] for half in parts for i, part in enumerate(half)], dim=-1)


def _cos_sin(config: DecoderConfig) -> Tensor:
    """Cos | sin of every position, [max_positions, head_dim] float32."""
    inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32)
    angle = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), inv_freq)
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * config.rope_scale
