"""The decoder again, written plainly: one sequence, full causal attention, float32, adapters as x A' B'.

Independent of the engine but for its weight tensors, which may exist only there (`load_format="dummy"`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora import LoRARequest, RequestOutput
from aiolora.models.decoder import Decoder
from benchmarks.adapters import SCALE, factors
from benchmarks.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Check:
    """How far answers are from the reference, over all their tokens, teacher-forced."""

    tokens: int
    agreement: float  # share of tokens that are the reference's argmax
    worst_gap: float  # nat from the reference's argmax to the token taken, the largest
    mean_gap: float
    off: float  # nat, |mean log-probability of an answer: ours - reference's|, the largest
    blind: float  # the same mean gap under a reference without the adapter: what a wrong adapter looks like
    spread: (
        float  # nat, of the reference's log-probabilities over the vocabulary: what the others are large or small of
    )

    @property
    def right(self) -> bool:
        """Bfloat16's noise passes, another adapter does not."""
        close = max(self.worst_gap / 0.4, self.mean_gap / 0.015, self.off / 0.04) < self.spread
        return close and not self.blind < 0.1 * self.spread

    def __str__(self) -> str:
        verdict = "ok" if self.right else "WRONG"
        return (
            f"{verdict}: {self.agreement:.1%} argmax of {self.tokens}, gap {self.mean_gap:.4f} mean "
            f"{self.worst_gap:.3f} max, logprob off {self.off:.4f}"
            + ("" if math.isnan(self.blind) else f", without adapter {self.blind:.3f}")
        )


class Reference:
    """Log-probabilities of a sequence by the weights of `model`, an adapter applied."""

    def __init__(self, model: Decoder, name: str) -> None:
        self._weights = dict(model.checkpoint())
        self._shape = SHAPES[name]
        self._device = model.embed.weight.device
        self._inv_freq = _inv_freq(self._shape).to(self._device)

    def check(self, outputs: Sequence[RequestOutput], loras: Sequence[LoRARequest | None]) -> Check:
        """Hold greedy answers against the reference. Raises nothing: see `Check.right`."""
        hits, gaps, offs, blind, spreads = 0, [], [], [], []
        for output, lora in zip(outputs, loras):
            answer, start = output.outputs[0], len(output.prompt_token_ids) - 1
            ids = [*output.prompt_token_ids, *answer.token_ids]
            chosen = torch.tensor(answer.token_ids, device=self._device)
            logprobs = self.logprobs(ids[:-1], lora)[start:]
            mine = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
            gap = logprobs.amax(-1) - mine
            hits += int((gap == 0).sum())
            gaps.append(gap)
            spreads.append(logprobs.std(-1).mean())
            offs.append(abs(answer.cumulative_logprob - float(mine.sum())) / len(chosen))
            if lora is not None:
                bare = self.logprobs(ids[:-1], None)[start:]
                blind.append((bare.amax(-1) - bare.gather(1, chosen.unsqueeze(1)).squeeze(1)).mean())
        every = torch.cat(gaps)
        without = float(torch.stack(blind).mean()) if blind else float("nan")
        return Check(
            tokens=len(every),
            agreement=hits / len(every),
            worst_gap=float(every.max()),
            mean_gap=float(every.mean()),
            off=max(offs),
            blind=without,
            spread=float(torch.stack(spreads).mean()),
        )

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], lora: LoRARequest | None) -> Tensor:
        """[T, V] float32: of what follows each token."""
        pairs = {} if lora is None else _on_device(lora, str(self._device))
        x = self._weights["model.embed_tokens.weight"][torch.tensor(ids, device=self._device)].float()
        for layer in range(self._shape.layers):
            name = f"model.layers.{layer}"
            seen = self._attention(self._norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", pairs)
            x = x + self._linear(seen, f"{name}.self_attn.o_proj", pairs)
            y = self._norm(x, f"{name}.post_attention_layernorm")
            gate, up = (self._linear(y, f"{name}.mlp.{part}_proj", pairs) for part in ("gate", "up"))
            x = x + self._linear(F.silu(gate) * up, f"{name}.mlp.down_proj", pairs)
        head = "model.embed_tokens" if self._shape.tied else "lm_head"
        return F.linear(self._norm(x, "model.norm"), self._weights[f"{head}.weight"].float()).log_softmax(-1)

    def _attention(self, x: Tensor, name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        shape = self._shape
        q, k, v = (
            self._linear(x, f"{name}.{part}_proj", pairs).view(len(x), -1, shape.head_dim).transpose(0, 1)
            for part in "qkv"
        )
        angle = torch.outer(torch.arange(len(x), device=x.device).float(), self._inv_freq).repeat(1, 2)
        q, k = (part * angle.cos() + _rotated(part) * angle.sin() for part in (q, k))
        k, v = (part.repeat_interleave(shape.heads // shape.kv_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / shape.head_dim**0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return seen.transpose(0, 1).flatten(1)

    def _linear(self, x: Tensor, name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        y = F.linear(x, self._weights[f"{name}.weight"].float())
        if name in pairs:
            a, b = pairs[name]
            y = y + x @ a.float().T @ b.float().T * SCALE
        return y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self._weights[f"{name}.weight"].float()


@lru_cache(maxsize=8)
def _on_device(lora: LoRARequest, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    return {module: (a.to(device), b.to(device)) for module, (a, b) in factors(lora).items()}


def _rotated(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def _inv_freq(shape: Shape) -> Tensor:
    """Llama 3's frequencies: short waves as they are, long ones slowed by the factor (1: none is), a ramp between."""
    plain = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    turns = 8192 * plain / (2 * torch.pi)  # within the original context
    keep = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / shape.rope_factor
