"""Multi-modal models as data: how transformers' own towers and connectors are asked for the rows of an item.

`docs/multimodal.md` says what a model must provide to be one of these.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

# (transformers' model without its language model, what its processor made of one item) -> what it returns of it
Features: TypeAlias = Callable[[Any, Mapping[str, Tensor]], Any]

PREFIX = "model.language_model"  # of the decoder's modules, in all of them


@dataclass(frozen=True)
class Multimodal:
    """How a model of transformers is asked for rows."""

    ways: Mapping[str, Features]  # by modality
    unread: tuple[
        str, ...
    ] = ()  # paths in it that no row depends on: adapters trained there change nothing, as in PEFT


def _pixels(model: Any, item: Mapping[str, Tensor]) -> Any:
    return model.get_image_features(pixel_values=item["pixel_values"])


MULTIMODAL: dict[str, Multimodal] = {  # by model_type
    "llava": Multimodal({"image": _pixels}, unread=("vision_tower.head.",)),
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
