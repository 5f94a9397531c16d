"""Models, tokenizers and adapters small enough for a test, made by transformers, tokenizers and PEFT themselves."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from aiolora.config import EngineArgs
from aiolora.engine.batch import Packer
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.plan import pick_device
from aiolora.engine.scheduler import Batch, Scheduled
from aiolora.engine.sequence import Sequence as Answer
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.residency import Residency
from aiolora.models.loading import load_decoder
from aiolora.models.model import Model
from aiolora.ops import native
from aiolora.types import LoRARequest, Request, RequestOutput, SamplingParams
from tests.dense import DENSE
from tests.sparse import SPARSE

# where models run that a test makes: AIOLORA_TEST_DEVICE=cuda (or cpu), by default where `LLM` runs them by itself
DEVICE = pick_device(os.environ.get("AIOLORA_TEST_DEVICE", "auto"))
# of a logit or a log-probability beside transformers' on the CPU, all float32: a GPU sums in other orders, without TF32
TOLERANCE = 1e-4 if DEVICE == "cpu" else 1e-3
TELLS = 0.01  # what an adapter changes at least
VOCAB = 96  # few enough that logprobs can ask for all of them
EOS = 2
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def _rope(kind: str, **values: float) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {"hidden_size": 64}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama biased": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama every head its own": (LlamaConfig, {"hidden_size": 64, "num_key_value_heads": 4}),
    "llama one key head": (LlamaConfig, {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}),
    "llama odd head": (LlamaConfig, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}),
    "llama llama3": (LlamaConfig, _rope("llama3", **_LLAMA3)),
    "llama linear": (LlamaConfig, _rope("linear", factor=2.5)),
    "llama yarn": (LlamaConfig, _rope("yarn", **_YARN)),
    "mistral": (MistralConfig, {"sliding_window": 9, "hidden_size": 64}),
    "mistral without window": (MistralConfig, {"sliding_window": None, "head_dim": 20}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 windowed": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3 biased windowed": (
        Qwen3Config,
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 0,
        },
    ),
    **DENSE,
    **SPARSE,
}


def fill(module: nn.Module, seed: int) -> None:
    """Weights under which logits are of order 1, attention is not flat and every bias and norm tells."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * noise)  # to one, or to zero where the model adds one to it
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def make_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: object) -> Path:
    """Save a model of `family` with its tokenizer: of words, or of bytes where `vocab_size` has room for them."""
    kind, own = FAMILIES[family]
    config = kind(**(SIZES | own | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=EOS).save_pretrained(folder)
    vocab: int = config.vocab_size
    tokenizer = word_tokenizer(vocab) if vocab < 300 else byte_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_reciter(folder: Path, text: str) -> Path:
    """A model that knows `text` by heart: after each of its tokens, all different, comes the next; at the end eos.

    The layers add nothing; an embedding of one-hot vectors and a head that moves them on do it.
    """
    ids = byte_tokenizer().encode(text).ids
    assert len(set(ids)) == len(ids), "every token may come once"
    make_model(folder, vocab_size=320, hidden_size=320, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        for token, following in zip(ids, [*ids[1:], EOS]):
            model.lm_head.weight[following, token] = 1
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


def word_tokenizer(vocab: int = VOCAB) -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """GPT-2's bytes as tokens 3 to 258, then some merges."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("Ã", "©"), ("ð", "Ł")]
    names += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_adapter(
    base: Path, folder: Path, *, seed: int = 0, strength: float = 0.5, dtype: torch.dtype | None = None, **config: Any
) -> Path:
    """Save a PEFT adapter of random A and B, by PEFT; `dtype`: of the tensors in the file."""
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | config
    with _deprecations_of_peft():
        model = get_peft_model(load_hf(base), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(strength * noise / parameter.shape[1] ** 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of embeddings that it saves too
        model.save_pretrained(folder)
    if dtype is not None:
        rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return folder


def make_loras(base: Path, folder: Path, count: int) -> list[LoRARequest]:
    """Strong adapters a0, a1, ... with the ids 1, 2, ..."""
    made = [make_adapter(base, folder / f"a{seed}", seed=seed, strength=2.0) for seed in range(count)]
    return [LoRARequest(path.name, number, str(path)) for number, path in enumerate(made, start=1)]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Replace the tensors of an adapter by what `change` makes of them."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: object) -> None:
    """Change fields of adapter_config.json (or config.json of a model)."""
    file = next(folder / name for name in ("adapter_config.json", "config.json") if (folder / name).exists())
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load_hf(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def load_peft(base: Path, adapters: Mapping[str, Path]) -> PeftModel:
    """The base with all adapters, `set_adapter` picks one."""
    (first, folder), *rest = adapters.items()
    with _deprecations_of_peft():
        model = PeftModel.from_pretrained(load_hf(base), folder, adapter_name=first)
        for name, path in rest:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


@contextlib.contextmanager
def _deprecations_of_peft() -> Iterator[None]:
    """PEFT 0.21 uses what transformers 5.23 has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)  # of what it thinks of a test's config
        warnings.filterwarnings("ignore", r"The following \w+ keys", RuntimeWarning)  # its own
        yield


def hf_logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """[T, V] float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def prompt_ids(seed: int, length: int, vocab: int = VOCAB) -> list[int]:
    ids = torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed))
    return [int(i) for i in ids]


def everything(max_tokens: int, **params: Any) -> SamplingParams:
    """Greedy, with the log-probability of every token of the vocabulary at every position."""
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=VOCAB, prompt_logprobs=VOCAB, **params
    )


def reported(output: RequestOutput) -> tuple[list[int], Tensor]:
    """All tokens of an answer and [T - 1, V]: what `everything` reports of each but the first."""
    answer = output.outputs[0]
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    assert output.prompt_logprobs[0] is None
    rows = [*output.prompt_logprobs[1:], *answer.logprobs]
    assert None not in rows
    table = torch.tensor(
        [[row[token].logprob if token in row else torch.nan for token in range(VOCAB)] for row in rows]
    )
    return [*output.prompt_token_ids, *answer.token_ids], table


@dataclass(slots=True)
class Loaded:
    """A decoder with a cache of small pages, run by the engine's Packer on steps that the test lays out."""

    model: Model
    cache: KVCache
    packer: Packer

    @classmethod
    def of(cls, folder: Path, **args: Any) -> "Loaded":
        model = load_decoder(EngineArgs(model=str(folder), **({"dtype": "float32"} | args)), folder, device=DEVICE)
        cache = KVCache(model.config, num_pages=128, page_size=4, dtype=model.embed.weight.dtype, device=DEVICE)
        residency: Residency[None] = Residency(PageKinds(0), Room(0), max_host=1)
        return cls(model, cache, Packer(page_size=4, kinds=PageKinds(0), residency=residency, device=DEVICE))

    def sequences(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Sequences whose pages lie scattered among each other's."""
        answers = []
        for number, prompt in enumerate(prompts):
            request = Request(id=str(number), prompt_token_ids=tuple(prompt), params=SamplingParams())
            answers.append(Answer(request, 0, seed=0, number=number, max_length=256))
            answers[-1].pages = list(range(number, 128, len(prompts)))[::-1]
        return answers

    def step(self, *runs: tuple[Answer, int, int]) -> list[Tensor]:
        """Run (sequence, first token, count) together: the logits [count, V] of each, float32 on the CPU."""
        with torch.inference_mode():
            batch = Batch([Scheduled(seq, start, count, True) for seq, start, count in runs])
            inputs = self.packer.pack(batch, self.packer.routes(batch))
            inputs = replace(inputs, logits_at=torch.arange(len(inputs.tokens), device=DEVICE))
            logits = self.model.logits(self.model(inputs, self.cache.layers)).float().cpu()
        return list(logits.split([count for _, _, count in runs]))


@contextlib.contextmanager
def kernels(*, compiled: bool) -> Iterator[None]:
    """With or without the compiled CPU kernels, whatever the environment says; skips where they cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIOLORA_NATIVE", "1" if compiled else "0")
        native.library.cache_clear()
        try:
            if compiled and native.library() is None:
                pytest.skip("no C compiler here")
            yield
        finally:
            native.library.cache_clear()
