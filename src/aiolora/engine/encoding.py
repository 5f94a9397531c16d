"""Encoding: the rows that stand for images and recordings in a step, made when first needed and kept for a while."""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.engine.batch import Packer
from aiolora.engine.media_rows import Span, media_spans
from aiolora.engine.scheduler import Batch
from aiolora.lora.kinds import PageKinds
from aiolora.models.encoder import Encoder
from aiolora.models.inputs import MediaRows
from aiolora.models.layers import Linear
from aiolora.ops.transfer import sent
from aiolora.types import MediaItem, Mix

logger = logging.getLogger(__name__)


class _Key(NamedTuple):
    """What an item's rows depend on: its content, and the mix where that acts in the encoder (else None)."""

    digest: bytes
    mix: bytes | None


class KeptRows:
    """Rows of items by what they depend on; beyond `limit` bytes the least recently used go. Engine thread only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._rows: OrderedDict[_Key, Tensor] = OrderedDict()

    def find(self, key: _Key) -> Tensor | None:
        """Its rows, which count as used now."""
        rows = self._rows.get(key)
        if rows is not None:
            self._rows.move_to_end(key)
        return rows

    def keep(self, key: _Key, rows: Tensor) -> None:
        """Until others need the room."""
        if rows.untyped_storage().nbytes() > rows.nbytes:
            rows = rows.clone()  # a view keeps all alive that it is of
        self._rows[key] = rows
        self.nbytes += rows.nbytes
        while self.nbytes > self.limit:
            _, dropped = self._rows.popitem(last=False)
            self.nbytes -= dropped.nbytes


class Encoding:
    """Runs the encoder for what a step needs of it. Engine thread only.

    An item is encoded alone, with the pages of the mix that its sequence runs with, so its rows are those of exactly
    that mix. A prompt that is cut within an item, or computed again, takes them from what is kept, or anew. An item
    that the encoder fails on has rows of NaN, which end its own request (`NonFiniteLogitsError`) and no other.
    """

    def __init__(
        self, encoder: Encoder, packer: Packer, kinds: PageKinds, *, hidden_size: int, limit: int, device: str
    ) -> None:
        """`limit`: bytes of rows that are kept."""
        self._hidden_size = hidden_size
        self._encoder = encoder
        self._packer = packer
        towers = kinds.of_towers
        self._towers = frozenset([*towers, *map(kinds.vectors_of, towers)])
        self._device = device
        self.kept = KeptRows(limit)

    def rows(self, batch: Batch) -> MediaRows | None:
        """What stands in the place of tokens of `batch`; None: nothing does."""
        spans = list(media_spans(batch))
        if not spans:
            return None
        parts = [self._of(span.item, span.mix)[span.low : span.high] for span in spans]
        rows = torch.cat([part.to(self._encoder.dtype) for part in parts])
        at = torch.cat([_places(span) for span in spans])
        return MediaRows(rows, sent(at, self._device))

    def linears(self) -> Iterable[Linear]:
        """Of the encoder."""
        return [linear for _, linear in self._encoder.linears()]

    def warm_up(self, items: Iterable[MediaItem]) -> None:
        """Encode `items` without adapters and as with some, and keep nothing: what is set up once is set up then."""
        for item in items:
            self._encoder(item.modality, _tensors(item), None)
            if self._towers:
                self._encoder(item.modality, _tensors(item), self._packer.rows_of(None))

    def _of(self, item: MediaItem, mix: Mix | None) -> Tensor:
        """The rows [count, H] of `item` under `mix`, whose adapters are on the device."""
        acting = mix if mix is not None and self._acts(mix) else None
        key = _Key(item.digest, None if acting is None else acting.key)
        rows = self.kept.find(key)
        if rows is None:
            routing = None if acting is None else self._packer.rows_of(acting)
            try:
                rows = self._encoder(item.modality, _tensors(item), routing)
                self._check(rows, item)
            except Exception:
                logger.exception("%s %s cannot be encoded: its request ends", item.modality, item.digest.hex()[:12])
                return torch.full((item.count, self._hidden_size), torch.nan, device=self._device)
            self.kept.keep(key, rows)
        return rows

    def _check(self, rows: Tensor, item: MediaItem) -> None:
        expected = (item.count, self._hidden_size)
        if rows.shape != expected:
            raise ValueError(f"the encoder made rows {list(rows.shape)}, the prompt has room for {list(expected)}")

    def _acts(self, mix: Mix) -> bool:
        """Whether an adapter of `mix` has anything in a tower or a connector."""
        return any(site.kind in self._towers for version in mix.versions for site in version.pages)


def _tensors(item: MediaItem) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in item.features.items()}


def _places(span: Span) -> Tensor:
    return torch.arange(span.at, span.at + span.high - span.low)
