"""Routed experts: choice, order and products against the references in float64."""

import pytest
import torch
from torch import Tensor

from aiolora.ops import experts as reference
from aiolora.ops import linear
from aiolora.ops.kernels import experts as kernels
from aiolora.ops.kernels import routes
from tests.kernels.close import assert_near
from tests.kernels.routing import Routing, routing, wide
from tests.kernels.routing import factors as gate_factors

RANKS = [3, 24, 9, 16, 8, 0]
EXPERTS, TOP_K = 5, 2
MIXES = {
    "one": [3],
    "all distinct": [3, 1, 0, 2],
    "some none": [2, -1, 0, 2, -1, 0, 1],
    "none": [-1] * 3,
    "over a tile": [i % 4 - 1 for i in range(45)],
}


def factors(routed: Routing, depth: int, columns: int, slices: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [P, E, S, 8, K] and B [P, E, 8, N] as views of one layer of three, pages of nobody full of NaN."""
    device = routed.lists[0].device
    a = torch.full((routed.num_pages, 3 * EXPERTS, slices, 8, depth), torch.nan, dtype=dtype, device=device)
    b = torch.full((routed.num_pages, 3 * EXPERTS, 8, columns), torch.nan, dtype=dtype, device=device)
    pages = routed.lists[3][:, 1]
    used, own = pages[pages >= 0].long(), slice(EXPERTS, 2 * EXPERTS)
    a[used, own] = torch.randn(len(used), EXPERTS, *a.shape[2:], device=device).to(dtype) / depth**0.5
    b[used, own] = torch.randn(len(used), EXPERTS, *b.shape[2:], device=device).to(dtype) / 4
    return a[:, own], b[:, own]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "tile"),
    [(1, 8, 2, 16), (7, 5, 2, 16), (64, 60, 4, 16), (65, 8, 1, 16), (150, 6, 3, 64)],
)
def test_each_token_has_its_experts_and_each_expert_its_rows(
    tokens: int, experts: int, top_k: int, tile: int, normalised: bool, device: str
) -> None:
    logits = torch.randn(tokens, experts, device=device)
    weights, chosen, rows, tiles = routes.choose_experts(logits, None, [], [], top_k, normalised, tile)
    exact = reference.choose_experts(logits, None, [], [], top_k, normalised, tile)
    assert_same_choice((weights, chosen, rows, tiles), exact)


@pytest.mark.parametrize("mix", ["all distinct", "some none", "over a tile", "many"])
def test_adapters_of_the_gate_choose_as_their_sums_say(mix: str, device: str) -> None:
    rows = [i % 7 - 1 for i in range(70)] if mix == "many" else MIXES[mix]
    routed = routing(rows, RANKS, tile=16, device=device)
    a, b = gate_factors(routed, 48, [0, EXPERTS], torch.float32)
    x, y = torch.randn(len(rows), 48, device=device), torch.randn(len(rows), EXPERTS, device=device)
    owed = routed.owed(linear.shrink(x, a, routed.lists, routed.where), b)
    where = [1, routed.tile, 0, EXPERTS]
    bare = reference.choose_experts(y, None, [], [], TOP_K, True, 16)
    for bias in (None, 2 * torch.randn(EXPERTS, device=device)):
        exact = reference.choose_experts(y, bias, owed, where, TOP_K, True, 16)
        assert not torch.equal(bare[1], exact[1])
        assert_same_choice(routes.choose_experts(y, bias, owed, where, TOP_K, True, 16), exact)


@pytest.mark.parametrize("tokens", [3, 70])
def test_a_gate_may_have_a_bias(tokens: int, device: str) -> None:
    y, bias = torch.randn(tokens, EXPERTS, device=device), 2 * torch.randn(EXPERTS, device=device)
    exact = reference.choose_experts(y, bias, [], [], TOP_K, True, 16)
    assert not torch.equal(reference.choose_experts(y, None, [], [], TOP_K, True, 16)[1], exact[1])
    assert_same_choice(routes.choose_experts(y, bias, [], [], TOP_K, True, 16), exact)


def assert_same_choice(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(ours, exact):
        if mine.is_floating_point():
            assert_near(mine, theirs)
        else:
            assert torch.equal(mine, theirs)


def test_one_expert_that_everybody_wants_has_full_tiles_and_the_rest_are_empty(device: str) -> None:
    logits = torch.zeros(100, 4, device=device)
    logits[:, 2] = 9
    *_, rows, tiles = routes.choose_experts(logits, None, [], [], 1, True, 16)
    assert rows.tolist() == list(range(100))
    assert tiles[:7].tolist() == [[2, first, min(16, 100 - first)] for first in range(0, 100, 16)]
    assert not tiles[7:].any()


@pytest.mark.parametrize("gate", [reference.SILU, reference.Gate(1.7, 0.6)], ids=["silu", "limited"])
@pytest.mark.parametrize("mix", ["some none", "over a tile"])
def test_experts_may_have_biases_and_another_gate(
    mix: str, gate: reference.Gate, dtype: torch.dtype, device: str
) -> None:
    rows, tile = MIXES[mix], 64 if mix == "over a tile" else 16
    depth, inner = 72, 40
    routed = routing(rows, RANKS, tile=16, device=device)
    owed = routed.owed(torch.empty(0), torch.empty(0, 0, 1))
    tables = routed.lists[3], routed.lists[4], owed[7]
    up = [*factors(routed, depth, 2 * inner, 2, dtype), *tables]
    down = [*factors(routed, inner, depth, 1, dtype), *tables]
    x = torch.randn(len(rows), depth, device=device).to(dtype)
    weight, bias = (torch.randn(EXPERTS, 2 * inner, n, device=device).to(dtype) / n**0.5 for n in (depth, 1))
    back, last = (torch.randn(EXPERTS, depth, n, device=device).to(dtype) / n**0.5 for n in (inner, 1))
    logits = torch.randn(len(rows), EXPERTS, device=device)
    weights, *chosen = reference.choose_experts(logits, None, [], [], TOP_K, True, tile)
    ends = bias[..., 0].contiguous(), last[..., 0].contiguous()

    for own, behind in (([], []), (up, down)):
        where = [tile, 1] if own else [tile]
        out = kernels.gated_experts(x, weight, ends[0], chosen, own, where, *gate)
        exact = reference.gated_experts(*wide(x, weight, ends[0]), chosen, wide(*own), where, *gate)
        assert_near(out, exact)
        y = kernels.summed_experts(out, back, ends[1], weights, chosen, behind, where)
        assert_near(y, reference.summed_experts(*wide(out, back, ends[1], weights), chosen, wide(*behind), where))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("depth", "inner"), [(64, 32), (72, 40)])
@pytest.mark.parametrize("mix", MIXES)
def test_experts_and_what_adapters_add_to_them(
    mix: str, depth: int, inner: int, apart: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "APART", 10**6 if apart else 0)
    rows, tile = MIXES[mix], 64 if mix == "over a tile" else 16
    routed = routing(rows, RANKS, tile=16, device=device)
    owed = routed.owed(torch.empty(0), torch.empty(0, 0, 1))
    tables = routed.lists[3], routed.lists[4], owed[7]
    up = factors(routed, depth, 2 * inner, 2, dtype)
    down = factors(routed, inner, depth, 1, dtype)
    x = torch.randn(len(rows), depth, device=device).to(dtype)
    weight = torch.randn(EXPERTS, 2 * inner, depth, device=device).to(dtype) / depth**0.5
    back = torch.randn(EXPERTS, depth, inner, device=device).to(dtype) / inner**0.5
    logits = torch.randn(len(rows), EXPERTS, device=device)
    weights, *chosen = reference.choose_experts(logits, None, [], [], TOP_K, True, tile)

    for adapters in (([], []), ([*up, *tables], [*down, *tables])):
        where = [tile, 1] if adapters[0] else [tile]
        out = kernels.gated_experts(x, weight, None, chosen, adapters[0], where)
        exact = reference.gated_experts(*wide(x, weight), None, chosen, wide(*adapters[0]), where)
        assert_near(out, exact)
        y = kernels.summed_experts(out, back, None, weights, chosen, adapters[1], where)
        assert_near(
            y, reference.summed_experts(*wide(out, back), None, *wide(weights), chosen, wide(*adapters[1]), where)
        )
