"""A projection and what adapters add to it: shrink into the rank space, expand out of it, each token by its own pages.

    h[t, s] = scale * (x[t] @ a[s, page].T)            for every page of the tile of t, concatenated over pages
    y[t, slice s] += h[t, s] @ b[page, :, slice s]
    y[t] = gain * y[t] + shift                         where the mix of t has a vector page (DoRA, biases)

Rank pages (the unified paging of S-LoRA, arXiv 2311.03285, with 8 ranks a page) carry no padding to the largest rank:
a tile lists the pages its tokens have, and only those are read.

Shapes: T tokens, S slices of a fused Linear (q k v; gate up), K in-features, N out-features of all slices,
P pages, W pages a tile at most, V vector pages, G tiles of tokens of one mix, I items of work.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.registration import define

RANKS_PER_PAGE = 8


def tile_of(tokens: int, device: str) -> int:
    """How many tokens of one mix a tile of a step of so many `tokens` has at most."""
    if device == "cpu":
        return 1024
    return 16 if tokens <= 256 else 64


class Routing(NamedTuple):
    """The step's routing, shared by all Linears: which tokens belong together, and where their pages are."""

    perm: Tensor  # [T] int32, the tokens sorted by mix, those without an adapter last
    tiles: Tensor  # [G, 2] int32: (first position in perm, tokens); tokens of one mix; tokens 0: an empty tile
    items: Tensor  # [I, 4] int32: (tile, pair of its pages, first, tokens), what a shrink has to do; tile -1: nothing
    pages: Tensor  # [G, kinds, W] int32, -1 after the last page of the tile's mix; without an adapter -1 throughout
    scales: Tensor  # [G, kinds, W] float32, one for each page
    vector_pages: Tensor  # [G, kinds] int32, the vector page of the tile's mix; -1: it has none
    owners: Tensor  # [T] int32, the tile of each token
    tile: int  # most tokens of a tile


class Site(NamedTuple):
    """Where the pool keeps one Linear's pages. Attached once; the addresses never change."""

    kind: int  # index into the second axis of Routing.pages
    a: Tensor  # [S, P, 8, K]
    b: Tensor  # [P, 8, N]
    vectors: Tensor  # [V, 2, N] float32: gain and shift
    bounds: list[int]  # S + 1 ends of the slices in N


class Partial(NamedTuple):
    """A projection whose adapters' share may still be owed: value = complete(self). Whoever reads it pays."""

    y: Tensor  # [T, N] base product, without the bias
    bias: Tensor | None = None  # [N], added after everything else
    h: Tensor | None = None  # [T, S, W * 8] float32, scaled; None: nothing is owed
    site: Site | None = None
    routing: Routing | None = None

    @property
    def flat(self) -> tuple[Tensor, Tensor | None, list[Tensor], list[int]]:
        """What every reading op begins with: y, bias, [h, b, vectors, *routing] or [], [kind, tile, *bounds] or []."""
        if self.h is None or self.site is None or self.routing is None:
            return self.y, self.bias, [], []
        site, routing = self.site, self.routing
        tables = (routing.perm, routing.tiles, routing.pages, routing.vector_pages, routing.owners)
        owed = [self.h, site.b, site.vectors, *tables]
        return self.y, self.bias, owed, [site.kind, routing.tile, *site.bounds]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, site: Site | None, routing: Routing | None, *, whole: bool = False
) -> Partial:
    """`x` [T, K] times `weight` [N, K]: the base product, and what the adapters of `routing` owe on top of it.

    `whole`: one kernel does all of it and nothing is owed (CPU, where the kernels could be compiled).
    """
    if site is None or routing is None:
        return Partial(whole_linear_op(x, weight, [], []) if whole else product_op(x, weight), bias)
    if whole:
        tables = [routing.perm, routing.tiles, routing.pages, routing.scales, routing.vector_pages]
        adapters = [site.a, site.b, site.vectors, *tables]
        return Partial(whole_linear_op(x, weight, adapters, [site.kind, *site.bounds]), bias)
    tables = [routing.perm, routing.tiles, routing.items, routing.pages, routing.scales]
    y, h = product_shrink_op(x, weight, site.a, tables, [site.kind, routing.tile])
    return Partial(y, bias, h, site, routing)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [T, K] times `weight` [N, K]: [T, N]."""
    return F.linear(x, weight)


def product_shrink(
    x: Tensor, weight: Tensor, a: Tensor, routing: list[Tensor], where: list[int]
) -> tuple[Tensor, Tensor]:
    """`product` and `shrink` of the same x; `routing` is [perm, tiles, items, pages, scales]."""
    return F.linear(x, weight), shrink(x, a, routing, where)


def shrink(x: Tensor, a: Tensor, routing: list[Tensor], where: list[int]) -> Tensor:
    """`x` [T, K] into rank space, scaled: float32 [T, S, W * 8]; `where` is [kind, tile].

    Ranks that a token does not have are undefined (here 0): who expands reads only pages that there are.
    """
    perm, tiles, _, pages, scales = routing
    kind = where[0]
    slices, _, ranks, _ = a.shape
    h = x.new_zeros((x.shape[0], slices, pages.shape[2] * ranks), dtype=torch.float32)
    for tile, (start, count) in enumerate(tiles.tolist()):
        held = _held(pages, tile, kind)
        if count == 0 or len(held) == 0:
            continue
        tokens = perm[start : start + count]
        scale = scales[tile, kind, : len(held)].repeat_interleave(ranks)
        for s in range(slices):
            a_RK = a[s, held].flatten(0, 1)
            h[tokens, s, : len(held) * ranks] = (x[tokens].to(a.dtype) @ a_RK.T).float() * scale
    return h


def complete(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """`y` [T, N] with what its adapters owe, plus the bias, summed in float32: [T, N] in y's dtype."""
    return paid(y, bias, owed, where).to(y.dtype, copy=True)


def paid(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """`complete` for the inside of other references: float32 where something was added, y itself where nothing was."""
    if not owed and bias is None:
        return y
    out = y.to(torch.float32, copy=True)
    if owed:
        h, b, vectors, perm, tiles, pages, vector_pages = owed[:7]
        kind, bounds = where[0], where[2:]
        ranks = b.shape[1]
        for tile, (start, count) in enumerate(tiles.tolist()):
            held, vector = _held(pages, tile, kind), int(vector_pages[tile, kind])
            if count == 0 or (len(held) == 0 and vector < 0):
                continue
            tokens = perm[start : start + count]
            b_RN = b[held].flatten(0, 1)
            for s, (low, high) in enumerate(itertools.pairwise(bounds)):
                h_TR = h[tokens, s, : len(held) * ranks]
                out[tokens, low:high] += (h_TR.to(b.dtype) @ b_RN[:, low:high]).float()
            if vector >= 0:
                gain, shift = vectors[vector]
                out[tokens] = (gain * out[tokens] + shift).float()
    return out if bias is None else out + bias.float()


def whole_linear(x: Tensor, weight: Tensor, adapters: list[Tensor], where: list[int]) -> Tensor:
    """`complete(linear(x, ...))` [T, N] as one op.

    `adapters` is [a, b, vectors, perm, tiles, pages, scales, vector pages] or empty, `where` [kind, *bounds].
    """
    y = F.linear(x, weight)
    if not adapters:
        return y
    a, b, vectors, perm, tiles, pages, scales, vector_pages = adapters
    kind, *bounds = where
    h = shrink(x, a, [perm, tiles, tiles, pages, scales], [kind, 0])
    return complete(y, None, [h, b, vectors, perm, tiles, pages, vector_pages], [kind, 0, *bounds])


def _whole_linear_cpu(x: Tensor, weight: Tensor, adapters: list[Tensor], where: list[int]) -> Tensor:
    y = native.linear(x, weight, adapters, where)
    return whole_linear(x, weight, adapters, where) if y is None else y


def _held(pages: Tensor, tile: int, kind: int) -> Tensor:
    held = pages[tile, kind]
    return held[held >= 0]


def _product_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _shrink_fake(x: Tensor, a: Tensor, routing: list[Tensor], where: list[int]) -> Tensor:
    pages = routing[3]
    return x.new_empty((x.shape[0], a.shape[0], pages.shape[2] * a.shape[2]), dtype=torch.float32)


def _product_shrink_fake(
    x: Tensor, weight: Tensor, a: Tensor, routing: list[Tensor], where: list[int]
) -> tuple[Tensor, Tensor]:
    return _product_fake(x, weight), _shrink_fake(x, a, routing, where)


def _complete_fake(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    return torch.empty_like(y)


def _whole_linear_fake(x: Tensor, weight: Tensor, adapters: list[Tensor], where: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_KERNELS = "aiolora.ops.kernels.linear"
product_op = define(product, fake=_product_fake, cuda=_KERNELS)
product_shrink_op = define(product_shrink, fake=_product_shrink_fake, cuda=_KERNELS)
shrink_op = define(shrink, fake=_shrink_fake, cuda=_KERNELS)
complete_op = define(complete, fake=_complete_fake, cuda=_KERNELS)
whole_linear_op = define(whole_linear, fake=_whole_linear_fake, cpu=_whole_linear_cpu)


def completed(partial: Partial) -> Tensor:
    """What `partial` comes to, for readers that are no op of their own."""
    return partial.y if partial.h is None and partial.bias is None else complete_op(*partial.flat)
