"""Images, by transformers' own image processors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiolora.errors import RequestError
from aiolora.media.content import IMAGE
from aiolora.media.decode import image_of
from aiolora.media.items import Arrays, item_of
from aiolora.types import MediaItem

_BLANKS = [np.zeros((side, side, 3), dtype=np.uint8) for side in (64, 768)]


@dataclass(frozen=True)
class LlavaImages:
    """A tower of patches, and a token for each of them (and for the class, where that is not left out)."""

    hf: Any
    processor: Any
    max_pixels: int

    @property
    def token_id(self) -> int:
        return int(self.hf.image_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        return _BLANKS

    def item(self, source: object, param: str) -> MediaItem:
        pixels = _processed(self.processor, source, self.max_pixels, param)["pixel_values"]
        height, width = pixels.shape[-2:]
        patch = self.hf.vision_config.patch_size
        count = (height // patch) * (width // patch)
        count += self.hf.vision_config.model_type == "clip_vision_model"
        count -= self.hf.vision_feature_select_strategy == "default"
        return item_of(IMAGE, {"pixel_values": pixels}, count)


@dataclass(frozen=True)
class QwenImages:
    """Patches of the image's own shape, a token for each square of them, turned on three axes."""

    hf: Any
    processor: Any
    max_pixels: int

    @property
    def token_id(self) -> int:
        return int(self.hf.image_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        return _BLANKS

    def item(self, source: object, param: str) -> MediaItem:
        features = _processed(self.processor, source, self.max_pixels, param)
        merged = self.hf.vision_config.spatial_merge_size
        time, height, width = (int(size) for size in features["image_grid_thw"][0])
        grid = time, height // merged, width // merged
        return item_of(IMAGE, features, int(np.prod(grid)), grid)


def _processed(processor: Any, source: object, max_pixels: int, param: str) -> Arrays:
    image = image_of(source, max_pixels=max_pixels, param=param)
    try:
        return dict(processor(images=[image], input_data_format="channels_last", return_tensors="np"))
    except ValueError as error:
        raise RequestError(f"the image cannot be processed: {error}", param=param) from None
