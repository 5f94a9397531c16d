"""The kernels that read a projection and pay what it owes: add_norm, silu_mul, rope_store."""

import pytest
import torch
from torch import Tensor

from aiolora.ops import activation, attention, norm
from aiolora.ops.kernels import activation as activation_kernels
from aiolora.ops.kernels import norm as norm_kernels
from aiolora.ops.kernels import rope as rope_kernels
from tests.kernels.close import assert_near
from tests.kernels.routing import Routing, factors, routing, wide

RANKS = [3, 24, 9, 0]  # the second has vectors beside them, the last has vectors alone
STEPS = {  # adapters of the tokens, tile
    "one token": ([0], 16),
    "some none": ([2, -1, 0, 2, -1, 0, 1, 3], 16),
    "over a tile": ([i % 5 - 1 for i in range(40)], 16),
    "large tiles": ([i % 5 - 1 for i in range(90)], 64),
}


@pytest.fixture(params=STEPS)
def routed(request: pytest.FixtureRequest, device: str) -> Routing:
    rows, tile = STEPS[request.param]
    return routing(rows, RANKS, tile=tile, device=device)


def partial(routed: Routing, bounds: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
    """y, bias, owed and where of a projection with those slices; ranks that no token has hold NaN."""
    device = routed.lists[0].device
    tokens = len(routed.lists[0])
    _, b = factors(routed, 8, bounds, dtype)
    most = routed.lists[3].shape[2]
    h = torch.full((tokens, len(bounds) - 1, most * 8), torch.nan, device=device)
    perm, tiles, _, pages, _ = routed.lists
    for (first, count), held in zip(tiles.tolist(), (pages[:, 1] >= 0).sum(-1).tolist()):
        h[perm[first : first + count], :, : held * 8] = torch.randn(count, len(bounds) - 1, held * 8, device=device)
    y = torch.randn(tokens, bounds[-1], device=device).to(dtype)
    return y, torch.randn(bounds[-1], device=device).to(dtype), routed.owed(h, b), [1, routed.tile, *bounds]


@pytest.mark.parametrize("owing", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_add_norm(routed: Routing, biased: bool, owing: bool, dtype: torch.dtype, device: str) -> None:
    y, bias, owed, where = partial(routed, [0, 96], dtype)
    residual = torch.randn(len(y), 96, device=device).to(dtype)
    weight = torch.randn(96, device=device).to(dtype)
    given = bias if biased else None
    owed, where = (owed, where) if owing else ([], [])
    wide_bias = bias.double() if biased else None
    inner = torch.randn(96, device=device).to(dtype)
    for offset, within in ((0.0, None), (1.0, None), (0.0, inner), (1.0, inner)):
        normed, total = norm_kernels.add_norm(y, given, owed, where, residual, weight, 1e-5, offset, within)
        exact = norm.add_norm(
            y.double(),
            wide_bias,
            wide(*owed),
            where,
            *wide(residual, weight),
            1e-5,
            offset,
            None if within is None else within.double(),
        )
        assert_near(total, exact[1])
        assert_near(normed, exact[0])


@pytest.mark.parametrize("shape", [(5, 96), (3, 2, 40)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    for offset in (0.0, 1.0):
        exact = norm.rms_norm(x.double(), weight.double(), 1e-5, offset)
        assert_near(norm_kernels.rms_norm(x, weight, 1e-5, offset), exact)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: 1 / infinity is meant
@pytest.mark.parametrize("gate", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("bounds", [[0, 72, 144], [0, 144]], ids=["two", "fused"])
@pytest.mark.parametrize("owing", [True, False])
def test_gates(routed: Routing, owing: bool, bounds: list[int], gate: str, dtype: torch.dtype) -> None:
    y, bias, owed, where = partial(routed, bounds, dtype)
    owed, where = (owed, where) if owing else ([], [])
    kernel, reference = {
        "silu_mul": (activation_kernels.silu_mul, activation.silu_mul),
        "gelu_mul": (activation_kernels.gelu_mul, activation.gelu_mul),
    }[gate]
    assert_near(kernel(y, bias, owed, where), reference(y.double(), bias.double(), wide(*owed), where))


ROPES = {  # slices, values that turn, size of the norms of q and k, their offset
    "plain": ([0, 48, 72, 96], 12, None, 0.0),
    "normed": ([0, 48, 72, 96], 12, (12, 12), 0.0),
    "around zero": ([0, 48, 72, 96], 12, (12, 12), 1.0),
    "fused, partly": ([0, 96], 8, None, 0.0),
    "partly, normed": ([0, 48, 72, 96], 2, (12, 12), 0.0),
    "all heads normed": ([0, 48, 72, 96], 12, (48, 24), 0.0),
}


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("owing", [True, False])
def test_rope_store(routed: Routing, owing: bool, case: str, dtype: torch.dtype, device: str) -> None:
    heads, groups, dim, page_size = 4, 2, 12, 16
    bounds, turned, normed, offset = ROPES[case]
    y, bias, owed, where = partial(routed, bounds, dtype)
    owed, where = (owed, where) if owing else ([], [])
    tokens = len(y)
    norms = [torch.randn(size, device=device).to(dtype) if size else None for size in normed or (0, 0)]
    cos_sin = torch.randn(50, turned, device=device)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(8 * page_size, device=device)[:tokens].int()
    slots[0] = -1
    caches = [torch.full((8, page_size, groups, dim), 7.0, dtype=dtype, device=device) for _ in range(2)]
    q = rope_kernels.rope_store(y, bias, owed, where, *norms, 1e-5, cos_sin, positions, slots, *caches, heads, offset)
    exact = [torch.full_like(cache, 7.0, dtype=torch.float64) for cache in caches]
    wide_norms = [None if weight is None else weight.double() for weight in norms]
    wanted = attention.rope_store(
        y.double(),
        bias.double(),
        wide(*owed),
        where,
        *wide_norms,
        1e-5,
        cos_sin.double(),
        positions,
        slots,
        *exact,
        heads,
        offset,
    )
    for out, right in zip((q, *caches), (wanted, *exact)):
        assert_near(out, right)
