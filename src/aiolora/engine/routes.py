"""The mixes of a step: where each lies on the device, and which tokens are whose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aiolora.engine.own_rows import has
from aiolora.lora.kinds import PageKinds
from aiolora.lora.layout import HEAD
from aiolora.types import AdapterVersion, BlockSpan, Mix

Ints = NDArray[np.int32]


class Placed(Protocol):
    """What is asked of `lora.residency.Residency`."""

    def pages(self, version: AdapterVersion) -> Mapping[int, list[int]]: ...


class MixPages(NamedTuple):
    """Where one mix lies on the device, and what each page counts. A mix that lies elsewhere is another value."""

    pages: Ints  # [kinds, W]: rank pages, -1 behind the last of a kind
    scales: NDArray[np.float32]  # [kinds, W]: 0 behind the last
    vector_pages: Ints  # [kinds]: -1: none
    own: list[tuple[BlockSpan, list[int]]]  # blocks of rows, and their pages
    vocabulary: int  # 0: the base's

    @property
    def width(self) -> int:
        """The most pages of one kind."""
        return int(self.pages.shape[1])

    def have(self, kind: int) -> bool:
        """Whether there are rank pages of `kind`; -1: there is no such kind."""
        return kind >= 0 and self.width > 0 and bool(self.pages[kind, 0] >= 0)

    def changes_head(self, kind: int) -> bool:
        """Whether the mix has its own logits; `kind`: the head's, -1 where it takes no low-rank factors."""
        return self.have(kind) or self.vocabulary > 0 or has([self.own], HEAD)


class Places:
    """What `MixPages` each mix is now; those of the last step are not made again. Engine thread only.

    One that was made holds for as long as the residency's answer is the very same object: an adapter that comes to the
    device again gets another.
    """

    def __init__(self, kinds: PageKinds, residency: Placed) -> None:
        self._kinds = kinds
        self._residency = residency
        self._made: dict[Mix, tuple[list[Mapping[int, list[int]]], MixPages]] = {}

    def step(self, mixes: Sequence[Mix]) -> list[MixPages]:
        """Of distinct `mixes`, whose adapters are on the device."""
        before, self._made = self._made, {}
        for mix in mixes:
            placed = [self._residency.pages(version) for version in mix.versions]
            made = before.get(mix)
            if made is None or any(old is not new for old, new in zip(made[0], placed)):
                made = placed, self._make(mix, placed)
            self._made[mix] = made
        return [pages for _, pages in self._made.values()]

    def of(self, mix: Mix) -> MixPages:
        """Of one whose adapters are on the device."""
        return self._make(mix, [self._residency.pages(version) for version in mix.versions])

    def _make(self, mix: Mix, placements: Sequence[Mapping[int, list[int]]]) -> MixPages:
        sites, blocks = self._kinds.sites, self._kinds.blocks
        pages: list[list[int]] = [[] for _ in range(sites)]
        scales: list[list[float]] = [[] for _ in range(sites)]
        vector_pages = np.full(sites, -1, dtype=np.int32)
        own: list[tuple[BlockSpan, list[int]]] = []
        for (version, weight), placed in zip(mix.parts, placements):
            for site in version.pages:
                if site.kind < sites:
                    pages[site.kind] += placed[site.kind]
                    scales[site.kind] += [site.scale * weight] * site.count
                elif site.kind < blocks:
                    (vector_pages[site.kind - sites],) = placed[site.kind]
            first = 0
            for span in version.blocks:
                own.append((span, placed[blocks][first : first + span.high - span.low]))
                first += span.high - span.low
        width = max(map(len, pages), default=0)
        padded_pages = np.full((sites, width), -1, dtype=np.int32)
        padded_scales = np.zeros((sites, width), dtype=np.float32)
        for kind, held in enumerate(pages):
            padded_pages[kind, : len(held)] = held
            padded_scales[kind, : len(held)] = scales[kind]
        return MixPages(padded_pages, padded_scales, vector_pages, own, mix.vocabulary)


@dataclass(frozen=True, slots=True)
class Routes:
    """The mixes of a step. Their numbers mean nothing beyond it, so none can be stale."""

    mixes: list[int]  # of each segment, which are the step's tokens in their order; -1: no adapter
    counts: list[int]  # tokens of each segment
    pages: list[MixPages]  # of each mix

    @property
    def of_tokens(self) -> Ints:
        """The mix of each token [T]; -1: no adapter."""
        return int32(self.mixes).repeat(int32(self.counts))

    @property
    def width(self) -> int:
        """W: the most pages of one kind, made even."""
        return even(max((mix.width for mix in self.pages), default=0))

    @property
    def own(self) -> list[list[tuple[BlockSpan, list[int]]]]:
        """Blocks of rows of each mix, and their pages."""
        return [mix.own for mix in self.pages]

    def have(self, kind: int) -> bool:
        """Whether any mix has rank pages of `kind`; -1: there is no such kind."""
        return kind >= 0 and any(mix.have(kind) for mix in self.pages)


def routing_numbers(
    routes: Routes, mixes: Ints, size: int, *, tile: int, width: int, sites: int, tiles: int = 0, items: int = 0
) -> dict[str, NDArray[Any]]:
    """The fields of `ops.linear.Routing` for `size` tokens, the first of them of `mixes` (-1: none), others of none.

    `tile`: tokens of one at most. `width`: of the page tables. `tiles`, `items`: padded to so many.
    """
    bare = len(routes.pages)  # sorts last
    mix_of_token = np.full(size, bare, dtype=np.int32)
    mix_of_token[: len(mixes)] = np.where(mixes >= 0, mixes, bare)
    members = np.bincount(mix_of_token, minlength=bare + 1)
    ends, tiles_of_mix = members.cumsum(), -(-members // tile)
    mix_of_tile, number = _spread(tiles_of_mix)
    low = (ends - members)[mix_of_tile] + number * tile
    inside = np.minimum(tile, ends[mix_of_tile] - low)
    pairs_of_mix = np.array([*(-(-mix.width // 2) for mix in routes.pages), 0])
    tile_of_item, pair = _spread(pairs_of_mix[mix_of_tile])
    pages = np.full((bare + 1, sites, width), -1, dtype=np.int32)
    scales = np.zeros((bare + 1, sites, width), dtype=np.float32)
    vector_pages = np.full((bare + 1, sites), -1, dtype=np.int32)
    for place, mix in enumerate(routes.pages):
        pages[place, :, : mix.width] = mix.pages
        scales[place, :, : mix.width] = mix.scales
        vector_pages[place] = mix.vector_pages
    perm = mix_of_token.argsort(kind="stable").astype(np.int32)
    owners = np.empty(size, dtype=np.int32)
    owners[perm] = np.repeat(np.arange(len(inside)), inside)
    most_tiles = tiles or len(inside)
    items_of = np.stack([tile_of_item, pair, low[tile_of_item], inside[tile_of_item]], axis=1)
    return {
        "perm": perm,
        "tiles": padded(np.stack([low, inside], axis=1), most_tiles, 0),
        "items": padded(items_of, items or max(1, len(items_of)), (-1, 0, 0, 0)),
        "pages": padded(pages[mix_of_tile], most_tiles, -1),
        "scales": padded(scales[mix_of_tile], most_tiles, 0.0),
        "vector_pages": padded(vector_pages[mix_of_tile], most_tiles, -1),
        "owners": owners,
    }


def _spread(counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of `counts[i]` things of each i, one after another: whose each is, and which of its things."""
    whose = np.repeat(np.arange(len(counts)), counts)
    return whose, np.arange(len(whose)) - (counts.cumsum() - counts)[whose]


def int32(values: Any) -> Ints:
    return np.asarray(values, dtype=np.int32)


def padded(values: NDArray[Any], size: int, neutral: Any) -> NDArray[Any]:
    """`values` as int32 (or the float32 they are), lengthened to `size` along the first axis."""
    out = np.empty((size, *values.shape[1:]), dtype=np.float32 if values.dtype == np.float32 else np.int32)
    out[: len(values)] = values
    out[len(values) :] = neutral
    return out


def even(pages: int) -> int:
    """Kernels take rank pages in pairs."""
    return max(2, -(-pages // 2) * 2)
