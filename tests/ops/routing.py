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


def vectors(adapters: int, columns: int) -> Tensor:
    """Gains and shifts [adapters, 2, N], a view as the pool makes it; every second adapter has none (NaN)."""
    made = torch.randn(adapters, 3, 2, columns)[:, 1]
    made[::2] = torch.nan
    return made


def adjusted(value: Tensor, mix: list[int], vectors: Tensor) -> Tensor:
    """`value` [T, N], what the adapters of `mix` make of it with their gains and shifts."""
    out = value.clone()
    for t, adapter in enumerate(mix):
        if adapter >= 0 and adapter % 2:
            out[t] = value[t] * vectors[adapter, 0] + vectors[adapter, 1]
    return out


def routing(mix: list[int], pages: Tensor, scales: Tensor, tile: int) -> list[Tensor]:
    """[perm, tiles, pages, scales, vector pages] of a token for each of `mix`: its adapter in the tables of `tables`.

    -1: without one, in a tile that has no pages; -2: without one, in no tile. Every second adapter has vectors.
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
    vector_pages = torch.tensor([[10**6, adapter if adapter % 2 and adapter < nobody else -1] for adapter in adapters])
    return [torch.tensor(perm, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32), of, by, vector_pages.int()]
