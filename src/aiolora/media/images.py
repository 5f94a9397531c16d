"""Images, by transformers' own image processors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from aiolora.errors import RequestError
from aiolora.media.content import IMAGE
from aiolora.media.decode import Picture, picture_of
from aiolora.media.items import Arrays, Opened, item_of

_AT_ONCE = 8  # images of the most pixels that one may have, of a request
_SIDES = (64, 768)  # of blanks

Grid: TypeAlias = tuple[int, int, int]
# (a model's config, its processor, height, width) -> how many tokens an image of that size is
Count: TypeAlias = Callable[[Any, Any, int, int], int]
# (a model's config, what its processor made of an image) -> what its encoder is given, how many tokens, on which axes
Measure: TypeAlias = Callable[[Any, Arrays], tuple[Arrays, int, Grid | None]]


@dataclass(frozen=True)
class Images:
    """Those of a model that says by `count` how many tokens an image will be, and by `measure` how many it is."""

    hf: Any
    processor: Any
    max_pixels: int
    count: Count
    measure: Measure
    unit: str = "pixels"

    @property
    def token_id(self) -> int:
        return int(self.hf.image_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        sides = (min(side, math.isqrt(self.max_pixels)) for side in _SIDES)
        return [np.zeros((side, side, 3), dtype=np.uint8) for side in sides]

    def blank(self, share: float) -> object:
        side = max(1, math.isqrt(int(self.max_pixels * share)))
        return np.zeros((side, side, 3), dtype=np.uint8)

    @property
    def room(self) -> float:
        return _AT_ONCE * self.max_pixels

    def open(self, source: object, param: str) -> Opened:
        picture = picture_of(source, max_pixels=self.max_pixels, param=param)
        try:
            count = self.count(self.hf, self.processor, picture.height, picture.width)
        except ValueError as error:
            raise _unprocessed(error, param) from None
        return Opened(
            IMAGE,
            count,
            picture.height * picture.width,
            lambda: item_of(IMAGE, *self.measure(self.hf, _processed(self.processor, picture))),
        )


def llava_count(hf: Any, processor: Any, height: int, width: int) -> int:
    """As many for every image: all are cut to the size of the tower's."""
    return _patches(hf, hf.vision_config.image_size, hf.vision_config.image_size)


def llava(hf: Any, processed: Arrays) -> tuple[Arrays, int, Grid | None]:
    """A tower of patches, and a token for each of them (and for the class, where that is not left out)."""
    pixels = processed["pixel_values"]
    return {"pixel_values": pixels}, _patches(hf, *pixels.shape[-2:]), None


def _patches(hf: Any, height: int, width: int) -> int:
    patch = hf.vision_config.patch_size
    count: int = (height // patch) * (width // patch)
    count += hf.vision_config.model_type == "clip_vision_model"
    count -= hf.vision_feature_select_strategy == "default"
    return count


def qwen_count(hf: Any, processor: Any, height: int, width: int) -> int:
    """By the size that the processor will give an image; the same for one that lies on its side."""
    return int(processor.get_number_of_image_patches(height, width)) // int(hf.vision_config.spatial_merge_size) ** 2


def qwen(hf: Any, processed: Arrays) -> tuple[Arrays, int, Grid | None]:
    """Patches of the image's own shape, a token for each square of them, turned on three axes."""
    merged = hf.vision_config.spatial_merge_size
    time, height, width = (int(size) for size in processed["image_grid_thw"][0])
    grid = time, height // merged, width // merged
    return processed, int(np.prod(grid)), grid


def _processed(processor: Any, picture: Picture) -> Arrays:
    image = picture.decoded()
    try:
        return dict(processor(images=[image], input_data_format="channels_last", return_tensors="np"))
    except ValueError as error:
        raise _unprocessed(error, picture.param) from None


def _unprocessed(error: ValueError, param: str) -> RequestError:
    return RequestError(f"the image cannot be processed: {error}", param=param)
