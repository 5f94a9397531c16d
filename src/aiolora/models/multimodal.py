"""Multi-modal models as data: how transformers' own towers and connectors are asked for the rows of an item.

`docs/multimodal.md` says what a model must provide to be one of these.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# (transformers' model without its language model, what its processor made of one item) -> its rows [n, H]
Way: TypeAlias = Callable[[Any, Mapping[str, Tensor]], Tensor]

PREFIX = "model.language_model"  # of the decoder's modules, in all of them


@dataclass(frozen=True)
class Multimodal:
    """How a model of transformers is asked for rows."""

    ways: Mapping[str, Way]  # by modality
    # paths in it that no row depends on: adapters trained there change nothing, as in PEFT
    unread: tuple[str, ...] = ()


def _image(model: Any, item: Mapping[str, Tensor]) -> Tensor:
    rows: Tensor = model.get_image_features(**item).pooler_output[0]
    return rows


def _granite_speech(model: Any, item: Mapping[str, Tensor]) -> Tensor:
    rows: Tensor = model.get_audio_features(input_features=item["input_features"]).pooler_output[0]
    return rows


def _qwen2_audio(model: Any, item: Mapping[str, Tensor]) -> Tensor:
    """Frames behind the recording's end are padding that nobody looks at, and have no rows."""
    features, frames = item["input_features"], int(item["feature_attention_mask"].sum())
    length = (features.shape[-1] - 2) // 2 + 1
    seen = torch.arange(length, device=features.device) < (frames - 1) // 2 + 1
    mask = torch.where(seen, 0.0, torch.finfo(model.audio_tower.dtype).min).to(model.audio_tower.dtype)
    hidden = model.audio_tower(features, attention_mask=mask.expand(1, 1, length, length)).last_hidden_state
    rows: Tensor = model.multi_modal_projector(hidden)[0]
    return rows[: ((frames - 1) // 2 - 1) // 2 + 1]


MULTIMODAL: dict[str, Multimodal] = {  # by model_type
    "llava": Multimodal({"image": _image}, unread=("vision_tower.head.",)),
    "qwen2_vl": Multimodal({"image": _image}),
    "qwen2_5_vl": Multimodal({"image": _image}),
    "granite_speech": Multimodal({"audio": _granite_speech}),
    "qwen2_audio": Multimodal({"audio": _qwen2_audio}),
}

# Names that checkpoints and adapters have from earlier versions of transformers.
_RENAMED = (
    (r"language_model\.lm_head\.", "lm_head."),
    (r"language_model\.model\.", f"{PREFIX}."),
    (r"(vision_tower|audio_tower|multi_modal_projector|visual|encoder|projector)\.", r"model.\1."),
    (r"model\.(layers|embed_tokens|norm)\.", rf"{PREFIX}.\1."),
    (r"model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


def current_name(name: str) -> str:
    """The name that transformers gives now to a tensor or module of a multi-modal model."""
    for old, new in _RENAMED:
        name = re.sub(f"^{old}", new, name)
    return name
