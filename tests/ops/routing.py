"""A step's routing: scattered pages, tiles without tokens between the others, tokens without an adapter."""

import torch
from torch import Tensor

KINDS = 2  # the tests read kind 1


def tables(ranks: list[int]) -> tuple[Tensor, Tensor]:
    """Pages and scales [adapters, kinds, W] of adapters of `ranks`; the last page of all is nobody's."""
    held = [-(-rank // 8) for rank in ranks]
    order = torch.randperm(sum(held)).tolist()
    pages = torch.full((len(ranks), KINDS, max(held) + 1), -1, dtype=torch.int32)
    for adapter, count in enumerate(held):
        pages[adapter, 1, :count] = torch.tensor([order.pop() for _ in range(count)])
    pages[:, 0] = sum(held)  # another kind's, not to be read
    return pages, torch.rand(pages.shape) + 0.5


def routing(mix: list[int], pages: Tensor, scales: Tensor, tile: int) -> list[Tensor]:
    """[perm, tiles, pages, scales] of a token for each of `mix`: its adapter in the tables of `tables`.

    -1: without one, in a tile that has no pages; -2: without one, in no tile.
    """
    perm = sorted(range(len(mix)), key=lambda t: mix[t] if mix[t] >= 0 else len(pages) - mix[t])
    nobody = len(pages)
    tiles, adapters, start = [[0, 0]], [nobody - 1], 0
    while start < len(perm) and mix[perm[start]] > -2:
        adapter = mix[perm[start]]
        count = sum(mix[t] == adapter for t in perm[start : start + tile])
        tiles += [[start, count], [start, 0]]
        adapters += [nobody if adapter < 0 else adapter, nobody - 1]
        start += count
    of = torch.cat((pages, torch.full_like(pages[:1], -1)))[adapters]
    by = torch.cat((scales, torch.rand_like(scales[:1])))[adapters]
    return [torch.tensor(perm, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32), of, by]
