"""Multi-modal models as data: how transformers' own towers and connectors are asked for the rows of an item.

`docs/multimodal.md` says what a model must provide to be one of these.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aiolora.ops.transfer import sent

# (transformers' model without its language model, what its processor made of one item) -> its rows [n, H].
# Floats are on the device in the model's dtype. Whole numbers stay on the host: they say how much there is to do, and
# who asks a device waits for it
Way: TypeAlias = Callable[[Any, Mapping[str, Tensor]], Tensor]

PREFIX = "model.language_model"  # of the decoder's modules, in all of them


@dataclass(frozen=True)
class Multimodal:
    """How a model of transformers is asked for rows."""

    ways: Mapping[str, Way]  # by modality
    begin: Callable[[Any], None] = lambda model: None  # what is done to the model before the first
    # paths in it that no row depends on: adapters trained there change nothing, as in PEFT
    unread: tuple[str, ...] = ()


def _image(model: Any, item: Mapping[str, Tensor]) -> Tensor:
    rows: Tensor = model.get_image_features(**item).pooler_output[0]
    return rows


def _qwen_vl(model: Any, item: Mapping[str, Tensor]) -> Tensor:
    """With what transformers would find out on the device: who is where, and which windows there are."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    from aiolora.models.windows import by_length

    visual, device, grid = model.visual, item["pixel_values"].device, item["image_grid_thw"]
    found = {"position_ids": sent(get_vision_position_ids(grid, visual.spatial_merge_size), device)}
    if hasattr(visual, "window_size"):  # 2.5
        sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
        index, ends = get_vision_window_index(grid, *sizes)
        index, ends = by_length(index, ends, visual.spatial_merge_unit)
        found |= {"window_index": sent(index, device), "cu_window_seqlens": ends}
    rows: Tensor = model.get_image_features(**item, **found).pooler_output[0]
    return rows


def _in_windows(model: Any) -> None:
    from aiolora.models.attends import answer_by
    from aiolora.models.windows import WINDOWS

    answer_by(model.visual, WINDOWS)


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
    "qwen2_vl": Multimodal({"image": _qwen_vl}, _in_windows),
    "qwen2_5_vl": Multimodal({"image": _qwen_vl}, _in_windows),
    "granite_speech": Multimodal({"audio": _granite_speech}),
    "qwen2_audio": Multimodal({"audio": _qwen2_audio}),
}

# Names of earlier versions of transformers, as in `DecoderConfig.renamed`.
RENAMED = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.(?:model\.)+", f"{PREFIX}."),  # transformers 5.17 saves some with one more
    (r"^(vision_tower|audio_tower|multi_modal_projector|visual|encoder|projector)\.", r"model.\1."),
    (r"^model\.(layers|embed_tokens|norm)\b", rf"{PREFIX}.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
