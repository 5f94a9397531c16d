"""A step's routing as the packer lays it out: scattered pages, empty tiles and items last, -1 after the last page."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = 2


@dataclass
class Routing:
    """`lists` is what a shrink takes, `owed(h, b)` what a reader of the projection takes."""

    lists: list[Tensor]  # perm, tiles, items, pages, scales
    vector_pages: Tensor
    num_pages: int
    tile: int

    @property
    def where(self) -> list[int]:
        return [1, self.tile]

    def owed(self, h: Tensor, b: Tensor) -> list[Tensor]:
        perm, tiles, _, pages, _ = self.lists
        owners = torch.zeros_like(perm)
        for tile, (first, count) in enumerate(tiles.tolist()):
            owners[perm[first : first + count].long()] = tile
        return [h, b, self.vectors(b.shape[2]), perm, tiles, pages, self.vector_pages, owners]

    def vectors(self, columns: int) -> Tensor:
        """Gains and shifts [V, 2, N], one layer of three; pages of nobody are full of NaN. The same at every call."""
        made = torch.full((self.num_pages, 3, 2, columns), torch.nan, device=self.vector_pages.device)
        used = self.vector_pages[:, 1]
        used = used[used >= 0].long()
        generator = torch.Generator().manual_seed(1)
        made[used, 1] = torch.randn(len(used), 2, columns, generator=generator).to(made.device)
        return made[:, 1]


def routing(rows: list[int], ranks: list[int], *, tile: int, device: str, width: int = 0) -> Routing:
    """Of tokens with those adapters (-1: none), adapters with those ranks; `width` pages a tile at least.

    Every second adapter has vectors.
    """
    held = [-(-rank // 8) for rank in ranks]
    num_pages = sum(held) + 2
    width = max([width, 2, *(count + count % 2 for count in held)])
    free = torch.randperm(num_pages).tolist()
    of = torch.full((len(ranks) + 1, KINDS, width), -1)  # the last is nobody's
    of[:-1, 0] = num_pages - 1  # another kind's, not to be read
    for row, count in enumerate(held):
        of[row, 1, :count] = torch.tensor([free.pop() for _ in range(count)])
    by_adapter = torch.rand(of.shape) + 0.5
    perm = sorted(range(len(rows)), key=lambda t: (rows[t] < 0, rows[t]))
    tiles, items, owners, first = [], [], [], 0
    while first < len(perm):
        row = rows[perm[first]]
        count = sum(rows[t] == row for t in perm[first : first + tile])
        items += [[len(tiles), pair, first, count] for pair in range((held[row] + 1) // 2)] if row >= 0 else []
        tiles.append([first, count])
        owners.append(row)
        first += count
    tiles += [[0, 0]] * 2
    items += [[-1, 0, 0, 0]] * 3
    owners += [-1] * 2
    ints = [torch.tensor(values, dtype=torch.int32) for values in (perm, tiles, items)] + [of[owners].int()]
    vector_pages = torch.tensor([[10**6, row // 2 if row % 2 and row > 0 else -1] for row in owners]).int()
    lists = [x.to(device) for x in (*ints, by_adapter[owners])]
    return Routing(lists, vector_pages.to(device), num_pages, max(tile, 16))


def factors(routed: Routing, depth: int, bounds: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [S, P, 8, K] and B [P, 8, N] as views of one layer of three, pages of nobody and other layers full of NaN."""
    device = routed.lists[0].device
    a = torch.full((routed.num_pages, 3, len(bounds) - 1, 8, depth), torch.nan, dtype=dtype, device=device)
    b = torch.full((routed.num_pages, 3, 8, bounds[-1]), torch.nan, dtype=dtype, device=device)
    pages = routed.lists[3][:, 1]
    used = pages[pages >= 0].long()
    a[used, 1] = torch.randn(len(used), *a.shape[2:], device=device).to(dtype) / depth**0.5
    b[used, 1] = torch.randn(len(used), *b.shape[2:], device=device).to(dtype) / 4
    return a[:, 1].transpose(0, 1), b[:, 1]


def wide(*tensors: Tensor) -> list[Tensor]:
    """Floating point tensors in float64, the others as they are."""
    return [x.double() if x.is_floating_point() else x for x in tensors]
