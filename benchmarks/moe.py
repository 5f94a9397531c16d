"""Decoding a mixture of experts: the base model alone against adapters on attention and on every routed expert.

    python -m benchmarks.moe --rank 8 --out results
    python -m benchmarks.moe --layers 24 --rank 16 --out results

The shape of Qwen3-30B-A3B with random weights (61 GB in bfloat16; fewer `--layers`: 1.27 GB each), adapters of random
numbers that never touch a disk (830 MB each in pages at rank 8). Both sides take turns on one engine, and some answers
of the last round are held against a plain float32 decoder. Without a GPU: `--shape tiny --dtype float32`.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora import LLM, LoRARequest
from aiolora.lora.layout import layout_of
from aiolora.models.loading import DTYPES, outline
from aiolora.ops.linear import RANKS_PER_PAGE
from benchmarks.command import tell
from benchmarks.reference import Check, Reference
from benchmarks.session import Session, core_of
from benchmarks.shapes import Shape, write_tokenizer
from benchmarks.steady import decoding

_SCALE = 2.0  # lora_alpha / r
_SHARE = 1 / 2  # of what a projection gives: so much an adapter adds to it
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class MoEShape(Shape):
    """Sizes of a Qwen3-MoE; `inner` of one expert."""

    experts: int
    top_k: int

    def config(self, layers: int) -> dict[str, object]:
        """Of its config.json, with so many layers."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.inner,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


_QWEN = MoEShape(
    hidden=2048, inner=768, layers=48, heads=32, kv_heads=4, head_dim=128, vocab=151936, experts=128, top_k=8,
    rope_factor=1.0, rope_theta=1e6, positions=32768,
)  # fmt: skip
_TINY = MoEShape(
    hidden=1024, inner=256, layers=4, heads=8, kv_heads=2, head_dim=64, vocab=512, experts=16, top_k=4,
    rope_factor=1.0, rope_theta=1e6, positions=4096,
)  # fmt: skip
MOE_SHAPES = {"qwen3-30b-a3b": _QWEN, "tiny": _TINY}


class Adapters:
    """Factors of the adapter `number`: windows into a few tensors of noise, under the names that PEFT gives them."""

    def __init__(self, shape: MoEShape, layers: int, rank: int) -> None:
        self.shape, self.layers, self.rank = shape, layers, rank
        generator = torch.Generator().manual_seed(rank)
        self._noise = torch.empty(1 << 23, dtype=torch.bfloat16).normal_(generator=generator)
        self._scaled: dict[float, Tensor] = {}

    @property
    def config(self) -> dict[str, object]:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": [*_ATTENTION]}
        return {**fields, "target_parameters": parameters, "r": self.rank, "lora_alpha": _SCALE * self.rank}

    def tensors(self, number: int) -> dict[str, Tensor]:
        turns = count(number * 7919)
        found = {}
        for layer in range(self.layers):
            for module, inputs, outputs, times in self._modules():
                name = f"base_model.model.model.layers.{layer}.{module}"
                found[f"{name}.lora_A.weight"] = self._window((self.rank * times, inputs), inputs**-0.5, next(turns))
                std = _SHARE * self.shape.std * inputs**0.5 / (_SCALE * self.rank**0.5)
                found[f"{name}.lora_B.weight"] = self._window((outputs, self.rank * times), std, next(turns))
        return found

    def _modules(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, in-features, out-features, how many experts)."""
        shape = self.shape
        for name in _ATTENTION:
            outputs, inputs = shape.linears[f"self_attn.{name}"]
            yield f"self_attn.{name}", inputs, outputs, 1
        yield "mlp.experts.base_layer", shape.hidden, 2 * shape.inner, shape.experts
        yield "mlp.experts", shape.inner, shape.hidden, shape.experts

    def _window(self, size: tuple[int, int], std: float, turn: int) -> Tensor:
        if std not in self._scaled:
            self._scaled[std] = self._noise * std
        numel = size[0] * size[1]
        first = turn * 104_729 % (len(self._noise) - numel)
        return self._scaled[std][first : first + numel].view(size)


class MoEReference(Reference):
    """Log-probabilities by the weights of the engine's model, an adapter applied; experts one after the other."""

    def __init__(self, llm: LLM, adapters: Adapters) -> None:
        model = core_of(llm)._runner._model  # type: ignore[attr-defined]
        self._adapters = adapters
        self._shape: MoEShape = adapters.shape
        self._weights = dict(model.checkpoint())
        self._device = model.embed.weight.device
        exponents = torch.arange(0, self._shape.head_dim, 2).float() / self._shape.head_dim
        self._inv_freq = (self._shape.rope_theta**-exponents).to(self._device)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], lora: LoRARequest | None) -> Tensor:
        """[T, V] float32: of what follows each token."""
        own = {} if lora is None else self._adapters.tensors(lora.lora_int_id)
        x = self._weights["model.embed_tokens.weight"][torch.tensor(ids, device=self._device)].float()
        for layer in range(self._adapters.layers):
            name = f"model.layers.{layer}"
            pairs = self._pairs(own, name)
            seen = self._attention(self._norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", pairs)
            x = x + self._linear(seen, f"{name}.self_attn.o_proj", pairs)
            x = x + self._mixed(self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp", pairs)
        return F.linear(self._norm(x, "model.norm"), self._weights["lm_head.weight"].float()).log_softmax(-1)

    def _pairs(self, own: dict[str, Tensor], layer: str) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of the modules of a layer, on the device."""
        prefix, found = f"base_model.model.{layer}.", {}
        for key in own:
            if key.startswith(prefix) and key.endswith(".lora_A.weight"):
                a, b = (own[key.replace("lora_A", letter)].to(self._device).float() for letter in ("lora_A", "lora_B"))
                found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = a, b
        return found

    def _linear(self, x: Tensor, name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """With the norm of each head that q and k have."""
        y = super()._linear(x, name, pairs)
        norm = self._weights.get(name.replace("_proj", "_norm") + ".weight")
        if norm is None:
            return y
        heads = y.view(len(y), -1, self._shape.head_dim)
        return (heads * (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.float()).flatten(1)

    def _mixed(self, x: Tensor, name: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        logits = F.linear(x, self._weights[f"{name}.gate.weight"].float())
        weights, chosen = logits.softmax(-1).topk(self._shape.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            gate_up = [self._weights[f"{name}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
            gate, up = self._of(expert, x[tokens], gate_up, pairs.get(f"{name}.experts.base_layer")).chunk(2, -1)
            down = [self._weights[f"{name}.experts.{expert}.down_proj.weight"]]
            out = self._of(expert, F.silu(gate) * up, down, pairs.get(f"{name}.experts"))
            y[tokens] += out * weights[tokens, places, None]
        return y

    def _of(self, expert: int, x: Tensor, weights: list[Tensor], pair: tuple[Tensor, Tensor] | None) -> Tensor:
        y = torch.cat([F.linear(x, weight.float()) for weight in weights], -1)
        if pair is None:
            return y
        a, b = pair
        rank, experts = self._adapters.rank, self._shape.experts
        return y + x @ a.view(experts, rank, -1)[expert].T @ b.view(-1, rank, experts)[..., expert].T * _SCALE


class MoESession(Session):
    """One engine on the shape, with all adapters published."""

    def __init__(self, folder: Path, adapters: Adapters, args: argparse.Namespace) -> None:
        shape, element = adapters.shape, 4 if args.dtype == "float32" else 2
        kv_nbytes = 2 * adapters.layers * shape.kv_heads * shape.head_dim * element  # of a token
        layout = layout_of(outline(folder).decoder, DTYPES[args.dtype])
        page = sum(map(layout.page_nbytes, range(layout.page_kinds.layers)))
        self.llm = LLM(
            str(folder),
            load_format="dummy",
            dtype=args.dtype,
            max_num_seqs=args.rows,
            max_model_len=1024,
            max_num_batched_tokens=2048,
            kv_cache_memory=max(1024, args.rows * 512) * kv_nbytes,
            enable_lora=True,
            max_loras=args.adapters,
            max_cpu_loras=args.adapters,
            max_lora_rank=args.rank,
            lora_memory=args.adapters * -(-args.rank // RANKS_PER_PAGE) * page,
        )
        self._vocab = shape.vocab
        self._random = random.Random(0)
        self.loras = [LoRARequest(f"a{number}", number, "in memory") for number in range(1, args.adapters + 1)]
        for lora in self.loras:
            tensors = adapters.tensors(lora.lora_int_id)
            self.llm.engine.add_lora(lora.lora_name, tensors=tensors, config=adapters.config)


def make_folder(root: Path, shape: MoEShape, layers: int) -> Path:
    folder = root / f"moe-{shape.hidden}-{layers}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(layers), indent=1))
    write_tokenizer(folder, shape.vocab)
    return folder


def measure(session: MoESession, adapters: Adapters, args: argparse.Namespace) -> tuple[dict[str, float], Check]:
    """Seconds of a decode step without and with adapters, medians over rounds; what answers of both are worth."""
    mixed = [session.loras[row % len(session.loras)] for row in range(args.rows)]
    sides: dict[str, list[str | None]] = {"base": [None] * args.rows, "adapters": [lora.lora_name for lora in mixed]}
    times: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for number in range(args.rounds):
        for name, loras in sides.items():
            with decoding(session, loras, length=args.length) as steady:
                times[name].append(steady.step(args.steps) / args.steps)
                answers[name] = steady.outputs()
            print(f"# round {number}, {name}: {times[name][-1] * 1e3:.3f} ms a step", flush=True)
    few = min(3, len(mixed))
    outputs = [*answers["base"][:1], *answers["adapters"][:few]]
    check = MoEReference(session.llm, adapters).check(outputs, [None, *mixed[:few]])
    return {name: statistics.median(some) for name, some in times.items()}, check


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(MOE_SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = MOE_SHAPES[args.shape]
    layers = args.layers or shape.layers
    with tempfile.TemporaryDirectory() as root:
        adapters = Adapters(shape, layers, args.rank)
        start = time.perf_counter()
        session = MoESession(make_folder(Path(root), shape, layers), adapters, args)
        print(f"# {session.llm.engine.snapshot()}", flush=True)
        print(f"# engine and {args.adapters} adapters: {time.perf_counter() - start:.1f} s", flush=True)
        seconds, check = measure(session, adapters, args)
    ratio = seconds["base"] / seconds["adapters"]
    rows: list[tuple[str | float, ...]] = [
        *((f"a step, {name}", 1e3 * taken, "ms") for name, taken in seconds.items()),
        *((f"decode, {name}", args.rows / taken, "tokens/s") for name, taken in seconds.items()),
        ("adapters over base", 100 * ratio, "% (bar 85)"),
    ]
    said = (
        f"{args.shape}, {layers} layers, {args.dtype}, {args.rows} rows, {args.adapters} adapters of rank {args.rank}"
    )
    tell(args.out / "moe.csv", said, rows, check)


if __name__ == "__main__":
    main()
