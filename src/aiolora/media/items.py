"""What every processor makes: items with the digest of what their encoder is given."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aiolora.types import MediaItem

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Processor(Protocol):
    """One modality of one model. Any thread."""

    @property
    def token_id(self) -> int:
        """The placeholder."""
        ...

    @property
    def blanks(self) -> Sequence[object]:
        """Two sources without content, a small one and a large one."""
        ...

    def blank(self, share: float) -> object:
        """One of so much of the largest that is taken."""
        ...

    def item(self, source: object, param: str) -> MediaItem:
        """`source` as its encoder takes it. Raises `RequestError`."""
        ...


def item_of(modality: str, features: Arrays, count: int, grid: tuple[int, int, int] | None = None) -> MediaItem:
    """With the digest of what the encoder is given: equal ones have equal rows."""
    digest = hashlib.sha256(modality.encode())
    for name, array in sorted(features.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return MediaItem(modality=modality, digest=digest.digest(), features=features, count=int(count), grid=grid)
