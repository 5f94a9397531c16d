"""Multi-modal models small enough for a test, made by transformers itself, and what they say."""

import contextlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import EOS, SIZES, VOCAB, fill, word_tokenizer

IMAGE = VOCAB - 1  # the placeholder: a word of the tokenizer
AUDIO = VOCAB - 2
RATE = 16000
PLACEHOLDERS = {"<image>": IMAGE, "<|audio|>": AUDIO}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'audio' %}<|audio|>{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
_TEXT = {name: size for name, size in SIZES.items() if name != "tie_word_embeddings"}  # that is the whole model's
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


def make_granite_speech(folder: Path, text: str = "granite", *, seed: int = 0) -> Path:
    """Save a conformer, a Q-former and a language model of the family `text`, with their tokenizer and processor."""
    own = {"granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}}
    config = GraniteSpeechConfig(
        text_config={"model_type": text, **_TEXT, **own.get(text, {})},
        encoder_config={
            "input_dim": 160,
            "num_layers": 2,
            "hidden_dim": 32,
            "feedforward_mult": 2,
            "num_heads": 4,
            "dim_head": 8,
            "output_dim": 12,
            "context_size": 10,
            "max_pos_emb": 16,
            "conv_kernel_size": 5,
            "conv_expansion_factor": 2,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 32,
            "use_qformer_text_input": False,
        },
        audio_token_index=AUDIO,
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )
    save(GraniteSpeechForConditionalGeneration(config), folder, seed)
    (folder / "preprocessor_config.json").write_text('{"feature_extractor_type": "GraniteSpeechFeatureExtractor"}')
    return folder


def make_qwen2_audio(folder: Path, *, seed: int = 0) -> Path:
    """Save a Whisper-like tower over recordings of 2 s and a Qwen2, with their tokenizer and processor."""
    tower = {
        "num_mel_bins": 20,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "max_source_positions": 100,
    }
    config = Qwen2AudioConfig(audio_config=tower, text_config={"model_type": "qwen2", **_TEXT}, audio_token_id=AUDIO)
    save(Qwen2AudioForConditionalGeneration(config), folder, seed)
    WhisperFeatureExtractor(feature_size=20, chunk_length=2).save_pretrained(folder)
    return folder


def make_qwen_vl(folder: Path, version: str = "2", *, seed: int = 0) -> Path:
    """Save a Qwen2-VL or ("2.5") Qwen2.5-VL, with its tokenizer and processor."""
    text = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}}
    ids = {"image_token_id": IMAGE, "video_token_id": 80, "vision_start_token_id": 81, "vision_end_token_id": 82}
    vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "tie_word_embeddings": False}
    model: nn.Module
    if version == "2":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 40, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    save(model, folder, seed)
    Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 2048}).save_pretrained(folder)
    return folder


def save(model: nn.Module, folder: Path, seed: int) -> None:
    fill_all(model, seed)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model.save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=EOS).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def _tokenizer() -> Tokenizer:
    """Words, and the placeholders as models spell them."""
    spelled = json.loads(word_tokenizer().to_str())
    ids = spelled["model"]["vocab"]
    del ids[f"w{IMAGE}"], ids[f"w{AUDIO}"]
    tokenizer = Tokenizer.from_str(json.dumps(spelled | {"model": spelled["model"] | {"vocab": ids | PLACEHOLDERS}}))
    tokenizer.add_special_tokens(list(PLACEHOLDERS))
    return tokenizer


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
    kind = {
        "granite_speech": GraniteSpeechForConditionalGeneration,
        "qwen2_audio": Qwen2AudioForConditionalGeneration,
    }.get(AutoConfig.from_pretrained(folder).model_type, AutoModelForImageTextToText)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


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


def sound(seed: int, seconds: float = 0.7) -> NDArray[np.float32]:
    """Some tones that come and go, at `RATE`."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(RATE * seconds)) / RATE
    tones = [
        np.sin(2 * np.pi * rng.uniform(100, 4000) * time) * np.sin(2 * np.pi * rng.uniform(1, 9) * time) for _ in "abc"
    ]
    return (np.sum(tones, axis=0) / 3).astype(np.float32)


def mm_logprobs(model: nn.Module, tokens: Sequence[int], **features: Tensor) -> Tensor:
    """[T - 1, V]: of what transformers predicts after each token but the last.

    A Granite divides its logits by `logits_scaling`, which transformers 5.23 forgets where it is part of another model.
    """
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)]), **features).logits[0]
    text = model.config.get_text_config().to_dict()  # type: ignore[union-attr]
    return (logits / text.get("logits_scaling", 1.0)).log_softmax(-1)[:-1]
