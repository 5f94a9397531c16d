"""What transformers' processors make of one image or recording, and how many tokens stand for it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aiolora.errors import ModelError, RequestError
from aiolora.media.content import IMAGE
from aiolora.media.decode import image_of
from aiolora.types import MediaItem

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Processor(Protocol):
    """One modality of one model. Any thread."""

    @property
    def token_id(self) -> int:
        """The placeholder."""
        ...

    def item(self, source: object, param: str) -> MediaItem:
        """`source` as its encoder takes it. Raises `RequestError`."""
        ...


def processors_of(folder: Path, *, max_pixels: int) -> dict[str, Processor]:
    """By modality; none for a model that takes text only. Raises `ModelError`."""
    from transformers import AutoConfig

    try:
        hf = AutoConfig.from_pretrained(folder)
        if hf.model_type == "llava":
            return {IMAGE: LlavaImages(hf, _image_processor(folder), max_pixels)}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder} holds no processor that can be read: {error}") from error
    return {}


@dataclass(frozen=True)
class LlavaImages:
    """A tower of patches, and a token for each of them (and for the class, where that is not left out)."""

    hf: Any
    processor: Any
    max_pixels: int

    @property
    def token_id(self) -> int:
        return int(self.hf.image_token_id)

    def item(self, source: object, param: str) -> MediaItem:
        pixels = _processed(self.processor, source, self.max_pixels, param)["pixel_values"]
        height, width = pixels.shape[-2:]
        patch = self.hf.vision_config.patch_size
        count = (height // patch) * (width // patch)
        count += self.hf.vision_config.model_type == "clip_vision_model"
        count -= self.hf.vision_feature_select_strategy == "default"
        return item_of(IMAGE, {"pixel_values": pixels}, count)


def item_of(modality: str, features: Arrays, count: int, grid: tuple[int, int, int] | None = None) -> MediaItem:
    """With the digest of what the encoder is given: equal ones have equal rows."""
    digest = hashlib.sha256(modality.encode())
    for name, array in sorted(features.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return MediaItem(modality=modality, digest=digest.digest(), features=features, count=int(count), grid=grid)


def _image_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def _processed(processor: Any, source: object, max_pixels: int, param: str) -> Arrays:
    image = image_of(source, max_pixels=max_pixels, param=param)
    try:
        return dict(processor(images=[image], input_data_format="channels_last", return_tensors="np"))
    except ValueError as error:
        raise RequestError(f"the image cannot be processed: {error}", param=param) from None
