"""Multi-modal models small enough for a test, made by transformers itself, and what they say."""

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny import EOS, VOCAB, fill, word_tokenizer

IMAGE = VOCAB - 1  # the placeholder: a word of the tokenizer
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %} w95 "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
LLAVAS: dict[str, dict[str, Any]] = {
    "clip": {"vision_config": CLIPVisionConfig(**_VISION)},
    "clip full, two layers": {
        "vision_config": CLIPVisionConfig(**_VISION),
        "vision_feature_layer": [-2, -1],
        "vision_feature_select_strategy": "full",
    },
    "siglip": {
        "vision_config": SiglipVisionConfig(**_VISION),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


def make_llava(folder: Path, kind: str = "clip", *, seed: int = 0) -> Path:
    """Save a LLaVA of `kind` with its tokenizer of words and its processor of images."""
    config = LlavaConfig(text_config=LlamaConfig(**_TEXT), image_token_id=IMAGE, **LLAVAS[kind])
    save(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), folder, seed)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save(model: nn.Module, folder: Path, seed: int) -> None:
    fill_all(model, seed)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=EOS).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def fill_all(model: nn.Module, seed: int) -> None:
    """As `fill`, and vectors that are no bias (a class token, queries)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, 1.0, 0.2, generator=torch.Generator().manual_seed(seed))
    flat = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}
    fill(_Only(flat), seed)
    biases = {name: one for name, one in model.named_parameters() if one.dim() == 1 and name.endswith("bias")}
    fill(_Only(biases), seed + 1)


class _Only(nn.Module):
    """Some parameters under their names."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self._named.items())


def make_mm_adapter(base: Path, folder: Path, *, seed: int = 0, strength: float = 1.0, **config: Any) -> Path:
    """Save a PEFT adapter of random A and B over the whole of a multi-modal model."""
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_mm(base), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and parameter.dim() == 2:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(strength * noise / parameter.shape[1] ** 0.5)
        model.save_pretrained(folder)
    return folder


def load_mm(folder: Path) -> nn.Module:
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def load_mm_peft(base: Path, adapters: Mapping[str, Path]) -> PeftModel:
    (first, folder), *rest = adapters.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_mm(base), folder, adapter_name=first)
        for name, path in rest:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


def picture(seed: int, height: int = 40, width: int = 31) -> NDArray[np.uint8]:
    """A random image [height, width, 3], smooth enough that scaling leaves something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return coarse.repeat(-(-height // 5), axis=0)[:height].repeat(-(-width // 4), axis=1)[:, :width]


def mm_logprobs(model: nn.Module, tokens: Sequence[int], **features: Tensor) -> Tensor:
    """[T - 1, V]: of what transformers predicts after each token but the last."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)]), **features).logits[0]
    return logits.log_softmax(-1)[:-1]
