"""Images, by transformers' own image processors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from aiolora.errors import RequestError
from aiolora.media.content import IMAGE
from aiolora.media.decode import image_of
from aiolora.media.items import Arrays, item_of
from aiolora.types import MediaItem

_BLANKS = [np.zeros((side, side, 3), dtype=np.uint8) for side in (64, 768)]


Grid: TypeAlias = tuple[int, int, int]
# (a model's config, what its processor made of an image) -> what its encoder is given, how many tokens, on which axes
Measure: TypeAlias = Callable[[Any, Arrays], tuple[Arrays, int, Grid | None]]


@dataclass(frozen=True)
class Images:
    """Those of a model that says by `measure` how many tokens an image is."""

    hf: Any
    processor: Any
    max_pixels: int
    measure: Measure

    @property
    def token_id(self) -> int:
        return int(self.hf.image_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        return _BLANKS

    def blank(self, share: float) -> object:
        side = max(1, math.isqrt(int(self.max_pixels * share)))
        return np.zeros((side, side, 3), dtype=np.uint8)

    def item(self, source: object, param: str) -> MediaItem:
        return item_of(IMAGE, *self.measure(self.hf, _processed(self.processor, source, self.max_pixels, param)))


def llava(hf: Any, processed: Arrays) -> tuple[Arrays, int, Grid | None]:
    """A tower of patches, and a token for each of them (and for the class, where that is not left out)."""
    pixels = processed["pixel_values"]
    height, width = pixels.shape[-2:]
    patch = hf.vision_config.patch_size
    count = (height // patch) * (width // patch)
    count += hf.vision_config.model_type == "clip_vision_model"
    count -= hf.vision_feature_select_strategy == "default"
    return {"pixel_values": pixels}, count, None


def qwen(hf: Any, processed: Arrays) -> tuple[Arrays, int, Grid | None]:
    """Patches of the image's own shape, a token for each square of them, turned on three axes."""
    merged = hf.vision_config.spatial_merge_size
    time, height, width = (int(size) for size in processed["image_grid_thw"][0])
    grid = time, height // merged, width // merged
    return processed, int(np.prod(grid)), grid


def _processed(processor: Any, source: object, max_pixels: int, param: str) -> Arrays:
    image = image_of(source, max_pixels=max_pixels, param=param)
    try:
        return dict(processor(images=[image], input_data_format="channels_last", return_tensors="np"))
    except ValueError as error:
        raise RequestError(f"the image cannot be processed: {error}", param=param) from None
