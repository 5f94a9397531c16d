"""Shapes of models as data, and what an engine starts on: the embedded model, or a folder with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from aiolora.models.weights import locate

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 128256
    tied: bool = False
    rope_factor: float = 8.0
    rope_theta: float = 500000.0
    positions: int = 131072
    std: float = 0.02  # of the weights of the linears
    embedded: bool = False  # real weights come along

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out-features, in-features) of the seven linears of a layer, by their names in a checkpoint."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (heads, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, heads),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def weight_nbytes(self) -> int:
        """Bytes that a decode step reads of the weights, in bfloat16: all linears and the head."""
        layer = sum(outputs * inputs for outputs, inputs in self.linears.values())
        return 2 * (self.layers * layer + self.vocab * self.hidden)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of one token's keys and values, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def adapter_nbytes(self, rank: int) -> int:
        """Bytes of an adapter on all seven linears, in bfloat16."""
        return self.a_nbytes(rank) + 2 * rank * self.layers * sum(outputs for outputs, _ in self.linears.values())

    def a_nbytes(self, rank: int) -> int:
        """Bytes of its A alone."""
        return 2 * rank * self.layers * sum(inputs for _, inputs in self.linears.values())


SHAPES = {
    "llama-3.1-8b": Shape(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, head_dim=128),
    "llama-3.2-3b": Shape(
        hidden=3072, inner=8192, layers=28, heads=24, kv_heads=8, head_dim=128, tied=True, rope_factor=32.0
    ),
    "smollm2-135m": Shape(
        hidden=576,
        inner=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=49152,
        tied=True,
        rope_factor=1.0,
        rope_theta=100000.0,
        positions=8192,
        std=0.19,
        embedded=True,
    ),
    "tiny": Shape(hidden=64, inner=160, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512, positions=16384),
}


def started_on(root: Path, name: str) -> dict[str, str]:
    """`model` and `load_format` of the engine's arguments."""
    return {"model": str(make_model(root, name)), "load_format": "auto" if SHAPES[name].embedded else "dummy"}


def make_model(root: Path, name: str) -> Path:
    """`root/name`: the config and a tokenizer of the shape; what is there already stays. An embedded one is pulled."""
    shape, folder = SHAPES[name], root / name
    if shape.embedded:
        return locate(name)
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA3_ROPE | {"factor": shape.rope_factor},
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, shape.vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """The files of a tokenizer of so many tokens."""
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    _tokenizer(vocab).save(str(folder / "tokenizer.json"))


def _tokenizer(vocab: int) -> Tokenizer:
    """Llama 3's kind (bytes under BPE) with as many tokens: every id has text, so detokenisation costs what it does."""
    words = [f"Ġw{number}" for number in range(vocab)]
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *words][:vocab]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
