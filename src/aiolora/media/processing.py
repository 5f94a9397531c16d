"""Which processors a model has: transformers' own, from the files beside it."""

import json
from pathlib import Path
from typing import Any

from aiolora.errors import MissingExtraError, ModelError
from aiolora.media.content import AUDIO, IMAGE
from aiolora.media.images import Images, llava, llava_count, qwen, qwen_count
from aiolora.media.items import Processor
from aiolora.media.recordings import GraniteRecordings, QwenRecordings

_TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "granite_speech", "qwen2_audio")  # of configs; others take text alone


def processors_of(folder: Path, *, max_pixels: int) -> dict[str, Processor]:
    """By modality; none for a model that takes text only. Raises `ModelError`, or `MissingExtraError` for Pillow."""
    try:
        if json.loads((folder / "config.json").read_text()).get("model_type") not in _TYPES:
            return {}
        from transformers import AutoConfig

        hf = AutoConfig.from_pretrained(folder)
        if hf.model_type == "llava":
            return {IMAGE: Images(hf, _image_processor(folder), max_pixels, llava_count, llava)}
        if hf.model_type in ("qwen2_vl", "qwen2_5_vl"):
            return {IMAGE: Images(hf, _image_processor(folder), max_pixels, qwen_count, qwen)}
        if hf.model_type == "granite_speech":
            return {AUDIO: GraniteRecordings.of(hf, _said(folder))}
        if hf.model_type == "qwen2_audio":
            return {AUDIO: QwenRecordings(hf, _feature_extractor(folder))}
    except ImportError as error:
        raise MissingExtraError(f"the model in {folder}", "media") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder} holds no processor that can be read: {error}") from error
    return {}


def _image_processor(folder: Path) -> Any:
    # not from the top: there transformers 5.17 has it only beside torchvision
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def _feature_extractor(folder: Path) -> Any:
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(folder)


def _said(folder: Path) -> dict[str, Any]:
    """The config of a processor of recordings, under any of the names that it is saved under."""
    for name, keys in (
        ("processor_config.json", ("audio_processor", "feature_extractor")),
        ("preprocessor_config.json", ()),
    ):
        if (folder / name).is_file():
            said: dict[str, Any] = json.loads((folder / name).read_text())
            inner = [said[key] for key in keys if key in said]
            if inner or not keys:
                return inner[0] if inner else said
    return {}
