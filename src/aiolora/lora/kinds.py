"""Kinds of pages, numbered: rank pages of each kind of site, behind them vector pages of each, and blocks of rows."""

from typing import NamedTuple


class PageKinds(NamedTuple):
    """The one numbering of pages that layout, books, store and packer share."""

    sites: int  # kinds of sites: those inside the layers, then the embedding and the head if they take adapters
    embedding: int = -1  # which of them; -1: none
    head: int = -1
    experts: tuple[int, ...] = ()  # those of routed experts, inside the layers, which have no vector pages
    towers: int = 0  # how many of those inside the layers, the last of them, are an encoder's and not the decoder's

    @property
    def of_towers(self) -> range:
        """The kinds of sites that act on images and recordings, before there are tokens."""
        return range(self.layers - self.towers, self.layers)

    @property
    def layers(self) -> int:
        """So many first kinds of sites are inside the layers, where any adapter may need them."""
        return self.sites - (self.embedding >= 0) - (self.head >= 0)

    @property
    def linears(self) -> list[int]:
        """Those of `layers` that are no routed experts."""
        return [kind for kind in range(self.layers) if kind not in self.experts]

    @property
    def ends(self) -> range:
        """The others: the embedding and the head, which few adapters change."""
        return range(self.layers, self.sites)

    def vectors_of(self, site: int) -> int:
        """The kind of the vector pages that go with rank pages of `site`."""
        return self.sites + site

    @property
    def blocks(self) -> int:
        """Of rows: the last kind."""
        return 2 * self.sites


class Room(NamedTuple):
    """Pages on the device."""

    layers: int  # rank pages of each kind inside the layers but those of routed experts
    vectors: int = 0  # vector pages of each kind
    ends: int = 0  # rank pages of embedding and head each
    blocks: int = 0
    experts: int = 0  # rank pages of each kind of routed experts

    def pages(self, kinds: PageKinds) -> list[int]:
        """How many of each kind. The ends have no more vector pages than rank pages: those never come alone."""
        ranks = [self.experts if kind in kinds.experts else self.layers for kind in range(kinds.layers)]
        ranks += [self.ends for _ in kinds.ends]
        vectors = [0 if kind in kinds.experts else self.vectors for kind in range(kinds.layers)]
        vectors += [min(self.vectors, self.ends) for _ in kinds.ends]
        return [*ranks, *vectors, self.blocks]
