"""Projections: product, shrink and expand against the references in float64."""

import pytest
import torch

from aiolora.ops import linear as reference
from aiolora.ops.kernels import linear as kernels
from tests.kernels.close import assert_near
from tests.kernels.routing import factors, routing, wide

RANKS = [3, 24, 9, 16, 8, 0]  # every second has vectors, the last has nothing else
MIXES = {
    "one": [3],
    "all distinct": [3, 1, 0, 2],
    "some none": [2, -1, 0, 2, -1, 0, 1],
    "vectors alone": [5, -1, 5, 4],
    "none": [-1] * 3,
    "over a tile": [i % 3 - 1 for i in range(40)],
}


@pytest.mark.parametrize(("depth", "bounds"), [(256, [0, 64, 96, 128]), (200, [0, 70]), (1100, [0, 40, 80])])
@pytest.mark.parametrize("mix", MIXES)
def test_a_projection_and_what_its_adapters_owe(
    mix: str, depth: int, bounds: list[int], dtype: torch.dtype, device: str
) -> None:
    rows = MIXES[mix]
    routed = routing(rows, RANKS, tile=16, device=device)
    a, b = factors(routed, depth, bounds, dtype)
    x = torch.randn(len(rows), depth, device=device).to(dtype)
    weight = torch.randn(bounds[-1], depth, device=device).to(dtype) / depth**0.5
    bias = torch.randn(bounds[-1], device=device).to(dtype)
    where = [1, routed.tile, *bounds]

    y, h = kernels.product_shrink(x, weight, a, routed.lists, routed.where)
    out = kernels.complete(y, bias, routed.owed(h, b), where)

    exact_y, exact_h = reference.product_shrink(*wide(x, weight, a), routed.lists, routed.where)
    exact = reference.complete(exact_y, bias.double(), routed.owed(exact_h, b.double()), where)
    assert_near(y, exact_y)
    assert_near(out, exact)
    assert_near(kernels.complete(kernels.product(x, weight), bias, [], []), exact_y + bias.double())


@pytest.mark.parametrize("tile", [16, 64])
def test_a_shrink_alone(tile: int, dtype: torch.dtype, device: str) -> None:
    rows = [i % 5 - 1 for i in range(90)]
    routed = routing(rows, RANKS, tile=tile, device=device, width=6)
    a, b = factors(routed, 96, [0, 32, 64], dtype)
    x = torch.randn(len(rows), 96, device=device).to(dtype)
    h = kernels.shrink(x, a, routed.lists, routed.where)
    y = torch.zeros(len(rows), 64, device=device, dtype=dtype)
    where = [1, routed.tile, 0, 32, 64]
    exact = reference.shrink(*wide(x, a), routed.lists, routed.where)
    wanted = reference.complete(y.double(), None, routed.owed(exact, b.double()), where)
    assert_near(kernels.complete(y, None, routed.owed(h, b), where), wanted)


@pytest.mark.parametrize("depth", [256, 1100])
@pytest.mark.parametrize(("tile", "bound"), [(16, "COUNTED"), (64, "MOST_PARTS")])
def test_too_many_items_to_keep_their_parts_are_summed_whole(
    tile: int, bound: str, depth: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [i % 3 - 1 for i in range(40)]
    routed = routing(rows, RANKS, tile=tile, device=device)
    a, _ = factors(routed, depth, [0, 32, 64], dtype)
    x = torch.randn(len(rows), depth, device=device).to(dtype)
    monkeypatch.setattr(kernels, bound, 1)
    assert kernels._splits(depth, len(routed.lists[2]), 16)[0] == 1
    h = kernels.shrink(x, a, routed.lists, routed.where)
    exact = reference.shrink(*wide(x, a), routed.lists, routed.where)
    _, tiles, _, pages, _ = routed.lists
    perm = routed.lists[0].long()
    for (first, count), held in zip(tiles.tolist(), (pages[:, 1] >= 0).sum(1).tolist()):
        tokens = perm[first : first + count]
        assert_near(h[tokens, :, : held * 8], exact[tokens, :, : held * 8])
