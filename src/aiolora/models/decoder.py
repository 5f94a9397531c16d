"""The one decoder: attention and an MLP on a residual stream; how families differ is named as switches."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aiolora.models.head import amended, known
from aiolora.models.inputs import HeadInputs, LayerKV, StepInputs
from aiolora.models.layers import Embedding, LayerNorm, Linear, Mlp, Norm, Sinks, added
from aiolora.models.moe import ExpertLinear, MoE, MoEConfig
from aiolora.ops.activation import gated, gelu, gelu_gated
from aiolora.ops.attention import attention_op, stored
from aiolora.ops.blocks import OwnNorms
from aiolora.ops.linear import Partial

CHECKPOINTED = (Linear, ExpertLinear, Embedding, Norm, LayerNorm, Sinks)  # modules that own tensors of a checkpoint
ACTIVATIONS = {"silu gated": gated, "gelu gated": gelu_gated, "gelu": gelu}


class Rope(NamedTuple):
    """Rotary frequencies of a layer, radians a token: R / 2 of them for the first R values of a head."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0  # on cos and sin (YaRN's attention factor)
    trained: int = 0  # the context, in tokens, from which on `longer` holds in the place of `inv_freq` (LongRoPE)
    longer: tuple[float, ...] = ()


class LayerNorms(NamedTuple):
    """What the norms of a layer are called; None: there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # RMSNorm of what attention adds to the stream
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


INPUTS_NORMED = LayerNorms()


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
    ropes: tuple[Rope, ...]  # each layer's
    windows: tuple[int, ...]  # each layer's sliding window, tokens; 0: none
    prefix: str = "model"  # of the names that modules have in a checkpoint, as transformers has them now
    rope_sections: tuple[int, ...] = ()  # frequencies that turn with each axis in turn (M-RoPE); (): there is one axis
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # RMSNorm of q and k before the rotation, of each "head" (Qwen3) or of "all" at once (OLMo 2)
    attention_scale: float | None = None  # of scores; None: head_dim ** -0.5
    attention_cap: float = 0.0  # scores are cap * tanh(score / cap) (Gemma 2); 0: as they are
    sinks: bool = False  # each head has a score that takes weight to nowhere (gpt-oss)
    activation: str = "silu gated"  # one of ACTIVATIONS
    norms: LayerNorms = INPUTS_NORMED
    norm_offset: float = 0.0  # added to every norm's weight (Gemma)
    layer_norm: bool = False  # LayerNorm with a bias instead of RMSNorm
    embedding_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float = 0.0
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: they are one projection in the checkpoint
    mlp: str = "mlp"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # one name: as above
    down: str = "down_proj"
    moe: MoEConfig | None = None  # experts in the place of the MLP, in some layers or all
    renamed: tuple[tuple[str, str], ...] = ()  # in turn: regexes of other checkpoints' names, what we have for it


class Layer(nn.Module):
    """One block: attention, then the MLP."""

    def __init__(self, config: DecoderConfig, index: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        name, hidden, inner = f"{config.prefix}.layers.{index}", config.hidden_size, config.intermediate_size
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        offset = config.norm_offset

        def linear(inputs: int, path: str, names: tuple[str, ...], outputs: tuple[int, ...], bias: bool) -> Linear:
            sizes = outputs if len(names) == len(outputs) else (sum(outputs),)
            parts = {f"{name}.{path}.{part}": size for part, size in zip(names, sizes, strict=True)}
            return Linear(inputs, parts, bias=bias, dtype=dtype, device=device)

        def rms_norm(path: str, size: int) -> Norm:
            return Norm(f"{name}.{path}", size, config.norm_eps, offset=offset, dtype=dtype, device=device)

        def norm(path: str | None) -> Norm | LayerNorm | None:
            return None if path is None else norm_of(config, f"{name}.{path}", dtype, device)

        def inner_norm(path: str | None) -> Norm | None:
            return None if path is None else rms_norm(path, hidden)

        self.num_heads = config.num_heads
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.cap = config.attention_cap
        self.window = config.windows[index]
        self.sinks = Sinks(f"{name}.self_attn.sinks", config.num_heads, device=device) if config.sinks else None
        self.rope = list(dict.fromkeys(config.ropes)).index(config.ropes[index])
        self.norm_eps = config.norm_eps
        self.norm_offset = offset
        self.input_norm = norm(config.norms.before_attention)
        self.qkv = linear(hidden, "self_attn", config.qkv, (heads, kv, kv), config.qkv_bias)
        whole = config.qk_norm == "all"
        self.q_norm = rms_norm("self_attn.q_norm", heads if whole else config.head_dim) if config.qk_norm else None
        self.k_norm = rms_norm("self_attn.k_norm", kv if whole else config.head_dim) if config.qk_norm else None
        self.o = linear(heads, "self_attn", ("o_proj",), (hidden,), config.o_bias)
        self.attention_norm = inner_norm(config.norms.after_attention)
        self.post_norm = norm(config.norms.before_mlp)
        self.mlp_norm = inner_norm(config.norms.after_mlp)
        if config.moe is not None and index in config.moe.layers:
            self.mlp: MoE | Mlp = MoE(name, hidden, config.moe, dtype, device)
            return
        inners = (inner, inner) if config.activation.endswith("gated") else (inner,)
        gate_up = linear(hidden, config.mlp, config.gate_up, inners, config.mlp_bias)
        down = linear(inner, config.mlp, (config.down,), (hidden,), config.mlp_bias)
        self.mlp = Mlp(gate_up, down, ACTIVATIONS[config.activation])

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        step: StepInputs,
        kv: LayerKV,
        cos_sin: Tensor,
        next_norm: Norm | LayerNorm | None,
    ) -> tuple[Tensor, Tensor]:
        """`x` [T, H] normalised, `residual` [T, H] -> the same two for the next layer, under its norm."""
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        q = stored(
            self.qkv(x, step.routing),
            norms,
            self.norm_eps,
            cos_sin,
            step.positions,
            step.slots,
            kv.k,
            kv.v,
            self.num_heads,
            self.norm_offset,
        )
        where = step.block_tables, step.kv_lengths, step.query_starts
        sinks = None if self.sinks is None else self.sinks.weight
        seen = attention_op(q, kv.k, kv.v, *where, self.scale, self.window, self.cap, sinks)
        attended = self.o(seen, step.routing)
        x, residual = joined(attended, residual, self.attention_norm, self.post_norm, step.own_norms)
        return joined(self.mlp(x, step.routing), residual, self.mlp_norm, next_norm, step.own_norms)


class Decoder(nn.Module):
    """Tokens to hidden states, hidden states to logits."""

    cos_sin: Tensor
    embedding_scale: Tensor | None
    capturable = True

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.config = config
        prefix, hidden = config.prefix, config.hidden_size
        self.embed = Embedding(f"{prefix}.embed_tokens", config.vocab_size, hidden, dtype=dtype, device=device)
        self.layers = nn.ModuleList(Layer(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = norm_of(config, f"{prefix}.norm", dtype, device)
        self.head = Linear(
            hidden,
            {"lm_head": config.vocab_size},
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.embed.weight if config.tied_head else None,
        )
        for number, norm in enumerate(self.norms()):
            norm.number = number
        # [tables, positions, R]: the layers' ropes, each once
        tables = [_cos_sin(rope, config.max_positions) for rope in dict.fromkeys(config.ropes)]
        self.register_buffer("cos_sin", torch.stack(tables).to(device), persistent=False)
        # rounded to the model's dtype, as Gemma was trained: 55.5 for a hidden size of 3072 in bfloat16
        scale = torch.tensor(config.embedding_scale, dtype=dtype, device=device)
        self.register_buffer("embedding_scale", None if config.embedding_scale == 1 else scale, persistent=False)

    def forward(self, step: StepInputs, kv: Sequence[LayerKV]) -> Tensor:
        """Hidden states [S, H] at `step.logits_at`, behind the last norm; keys and values go into `kv`."""
        residual = self.embedded(step)
        tables = self.cos_sin.unbind()
        if step.axes is not None:
            tables = tuple(turned(table, step.axes, self.config.rope_sections) for table in tables)
            step = replace(step, positions=torch.arange(len(step.tokens), dtype=torch.int32, device=step.tokens.device))
        layers: Iterable[Layer] = self.layers  # type: ignore[assignment]
        norms = [layer.input_norm for layer in layers] + [self.norm]
        x: Tensor = residual if norms[0] is None else norms[0](residual, step.own_norms)
        for layer, layer_kv, next_norm in zip(layers, kv, norms[1:]):
            x, residual = layer(x, residual, step, layer_kv, tables[layer.rope], next_norm)
        return x if step.logits_at is None else x[step.logits_at]

    def embedded(self, step: StepInputs) -> Tensor:
        """The residual stream [T, H] as it begins: the vectors of the step's tokens, or of what they stand for."""
        embeds = step.routing if step.embeds else None
        x: Tensor = self.embed(step.tokens, step.previous, embeds, step.own_embeddings)
        if step.media is not None:
            x = x.index_copy(0, step.media.at, step.media.rows)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """The base's logits [S, V] of hidden states [S, H]: float32 on the CPU, the model's dtype on a GPU."""
        return self._finished(self._product(hidden))

    def _product(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden, None).y
        return logits.float() if logits.is_cpu else logits

    def _finished(self, logits: Tensor) -> Tensor:
        """What a family does to its logits in the end, in place."""
        divisor, cap = self.config.logits_divisor, self.config.logits_cap
        if divisor != 1:
            logits.div_(divisor)
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def amended(self, logits: Tensor, hidden: Tensor, adapters: HeadInputs | None) -> Tensor:
        """`logits` [S, V] of `hidden` [S, H] with what adapters do to the head; may write to `logits`.

        Wider where an adapter has added tokens; -inf for tokens that a row's own adapter, or the base, does not know.
        """
        if adapters is None:
            return logits
        if self.config.logits_divisor != 1 or self.config.logits_cap:
            logits = self._product(hidden)  # adapters come before the end
        logits = self._finished(amended(logits, hidden, adapters, self.head.site))
        return known(logits, adapters, self.config.vocab_size)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, the view of a parameter that it fills) of every tensor."""
        for module in self.modules():
            if isinstance(module, CHECKPOINTED) and not (module is self.head and self.config.tied_head):
                yield from module.checkpoint()

    def named(self, name: str) -> str:
        """What is called `name` in a checkpoint, as we call it."""
        for theirs, ours in self.config.renamed:
            name = re.sub(theirs, ours, name)
        return name

    def experts(self) -> Iterator[tuple[int, ExpertLinear]]:
        """(layer, projection) of the routed experts."""
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if isinstance(module, ExpertLinear):
                    yield index, module

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of everything inside the layers but the routed experts."""
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if isinstance(module, Linear):
                    yield index, module

    def norms(self) -> Iterator[Norm]:
        """RMSNorms of the residual stream, in the order of `ops.blocks.OwnNorms`."""
        layers: Iterable[Layer] = self.layers  # type: ignore[assignment]
        stream = [norm for layer in layers for norm in (layer.input_norm, layer.post_norm)] + [self.norm]
        yield from (norm for norm in stream if isinstance(norm, Norm))


def joined(
    partial: Partial,
    residual: Tensor,
    inner: Norm | None,
    following: Norm | LayerNorm | None,
    own: OwnNorms | None,
) -> tuple[Tensor, Tensor]:
    """Add what `partial` comes to, under the norm `inner`, to `residual` [T, H]: (the `following` norm of it, it)."""
    if following is not None:
        return following.joined(partial, residual, own, inner)
    residual = added(partial, residual, inner)
    return residual, residual


def norm_of(config: DecoderConfig, name: str, dtype: torch.dtype, device: str) -> Norm | LayerNorm:
    """A norm of the residual stream."""
    if config.layer_norm:
        return LayerNorm(name, config.hidden_size, config.norm_eps, dtype=dtype, device=device)
    return Norm(name, config.hidden_size, config.norm_eps, offset=config.norm_offset, dtype=dtype, device=device)


def turned(cos_sin: Tensor, axes: Tensor, sections: Sequence[int]) -> Tensor:
    """A table [T, R] of each token's own, of `cos_sin` [positions, R] where it stands on three `axes` [3, T].

    The first so many frequencies turn with the first axis, the next with the second, and on in turn (M-RoPE, Qwen2-VL,
    arXiv 2409.12191).
    """
    cos, sin = cos_sin[axes].chunk(2, dim=-1)
    parts = [torch.split(half, list(sections), dim=-1) for half in (cos, sin)]
    return torch.cat([part[i % 3] for half in parts for i, part in enumerate(half)], dim=-1)


def _cos_sin(rope: Rope, max_positions: int) -> Tensor:
    """Cos | sin of every position, [max_positions, R] float32."""
    inv_freq = rope.longer if rope.longer and max_positions > rope.trained else rope.inv_freq
    angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), torch.tensor(inv_freq, dtype=torch.float32))
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * rope.scale
