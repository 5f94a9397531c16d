"""What every processor makes: items with the digest of what their encoder is given."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from aiolora.errors import ModelError
from aiolora.types import MediaItem

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Opened(Struct, frozen=True):
    """One image or recording of which only the sizes are known: nothing large was made of it yet."""

    modality: str
    count: int  # placeholder tokens that it needs
    size: float  # what there is to work on, in the unit of its processor
    make: Callable[[], MediaItem]

    def item(self) -> MediaItem:
        """It, as its encoder takes it. Raises `RequestError`, and `ModelError` where the count was another."""
        item = self.make()
        if item.count != self.count:
            raise ModelError(f"the processor of {self.modality} makes {item.count} tokens where {self.count} are due")
        return item


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

    @property
    def room(self) -> float:
        """The most of it that one request may bring."""
        ...

    @property
    def unit(self) -> str:
        """What `room` is counted in."""
        ...

    def open(self, source: object, param: str) -> Opened:
        """`source` by its sizes. Raises `RequestError`."""
        ...


def item_of(modality: str, features: Arrays, count: int, grid: tuple[int, int, int] | None = None) -> MediaItem:
    """With the digest of what the encoder is given: equal ones have equal rows."""
    digest = hashlib.sha256(modality.encode())
    for name, array in sorted(features.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return MediaItem(modality=modality, digest=digest.digest(), features=features, count=int(count), grid=grid)
