"""The switches of routed experts against their formulas, row by row."""

import pytest
import torch
from torch import Tensor

from aiolora.ops.experts import SILU, Gate, choose, gated_by, summed_by
from aiolora.ops.linear import Partial

TOKENS, EXPERTS, TOP_K, HIDDEN, INNER = 9, 5, 2, 12, 7
LIMITED = Gate(1.7, 0.6)


@pytest.fixture
def drawn() -> list[Tensor]:
    """x [T, H], then weight and bias of gate and up, and of down."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, HIDDEN), (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, 2 * INNER), (EXPERTS, HIDDEN, INNER)
    return [torch.randn(shape, generator=generator) for shape in (*shapes, (EXPERTS, HIDDEN))]


@pytest.mark.parametrize("gate", [SILU, LIMITED], ids=["silu", "limited"])
def test_biases_and_gates_are_what_their_formulas_say(gate: Gate, drawn: list[Tensor]) -> None:
    x, weight, bias, back, last = drawn
    logits, shift = torch.randn(TOKENS, EXPERTS), torch.tensor([3.0, 0.0, -3.0, 1.0, 0.0])
    chosen = choose(Partial(logits, shift), TOP_K, True)
    inner = gated_by(x, weight, bias, chosen, None, None, gate)
    y = summed_by(inner, back, last, chosen, None, None)
    for t in range(TOKENS):
        best = (logits[t] + shift).topk(TOP_K)
        assert chosen.experts[t].tolist() == best.indices.tolist()
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for share, e in zip(best.values.double().softmax(0), best.indices):
            opened, up = (weight[e].double() @ x[t].double() + bias[e]).chunk(2)
            if gate is SILU:
                middle = opened / (1 + (-opened).exp()) * up
            else:
                opened, up = opened.clamp(max=0.6), up.clamp(-0.6, 0.6)
                middle = opened / (1 + (-1.7 * opened).exp()) * (up + 1)
            expected += share * (back[e].double() @ middle + last[e])
        torch.testing.assert_close(y[t].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_limit_lets_nan_through(drawn: list[Tensor]) -> None:
    x, weight, bias, *_ = drawn
    x[3] = torch.nan
    chosen = choose(Partial(torch.randn(TOKENS, EXPERTS)), TOP_K, True)
    inner = gated_by(x, weight, bias, chosen, None, None, LIMITED).view(TOKENS, TOP_K, INNER)
    assert inner[3].isnan().all()
    assert inner[[0, 1, 2, 4]].isfinite().all()
