"""The attention that does what the kernels do not, against the one that they are held against, and against sums."""

import math

import pytest
import torch
from torch import Tensor

from aiolora.ops.attention import attention
from aiolora.ops.plain_attention import Shape, plain_attention, sees

PAGES, SIZE = 12, 4
TABLES = torch.tensor([[7, 2, 5, 0], [1, 9, 3, 4], [11, 0, 0, 0]], dtype=torch.int32)
LENGTHS = torch.tensor([13, 14, 3], dtype=torch.int32)
STARTS = torch.tensor([0, 1, 15, 18], dtype=torch.int32)  # a token, a prompt, a chunk


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Q [18, 6, 8], keys and values of 2 heads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((18, 6, 8), generator=generator)
    k, v = (torch.randn((PAGES, SIZE, 2, 8), generator=generator) for _ in range(2))
    return q, k, v


def own(drawn: tuple[Tensor, Tensor, Tensor], shape: Shape, sinks: Tensor | None = None) -> Tensor:
    return plain_attention(*drawn, TABLES, LENGTHS, STARTS, shape, sinks)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_without_its_extras_it_is_attention(drawn: tuple[Tensor, Tensor, Tensor], window: int) -> None:
    theirs = attention(*drawn, TABLES, LENGTHS, STARTS, 0.3, window)
    torch.testing.assert_close(own(drawn, Shape(0.3, window)), theirs, rtol=0, atol=1e-5)


def test_extras_are_what_their_formulas_say(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """Token by token in Python, for one head of the prompt's."""
    q, k, v = drawn
    head, shape, sinks = 4, Shape(0.3, window=6, chunk=8, softcap=1.5), torch.linspace(-1, 2, 6)
    out = own(drawn, shape, sinks).view(18, 6, 8)
    keys = k[TABLES[1]].flatten(0, 1)[:14, head // 3]
    values = v[TABLES[1]].flatten(0, 1)[:14, head // 3]
    for position in range(14):
        seen = [at for at in range(position + 1) if at > position - 6 and at // 8 == position // 8]
        scores = [float(q[1 + position, head] @ keys[at]) * 0.3 for at in seen]
        powers = [math.exp(1.5 * math.tanh(score / 1.5)) for score in scores]
        total = sum(powers) + math.exp(float(sinks[head]))
        expected = sum(power / total * values[at] for power, at in zip(powers, seen))
        torch.testing.assert_close(out[1 + position, head], expected, rtol=0, atol=1e-5)


def test_a_sink_takes_weight_and_a_chunk_hides_what_was_before(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    plain = own(drawn, Shape(0.3))
    assert own(drawn, Shape(0.3), torch.full((6,), 50.0)).abs().max() < 1e-6
    torch.testing.assert_close(own(drawn, Shape(0.3), torch.full((6,), -50.0)), plain, rtol=0, atol=1e-6)
    chunked = own(drawn, Shape(0.3, chunk=4))
    first = slice(1, 5)  # of the prompt, within its first chunk
    torch.testing.assert_close(chunked[first], plain[first], rtol=0, atol=1e-6)
    assert (chunked[5:15] - plain[5:15]).abs().max() > 0.1


def test_who_sees_whom() -> None:
    query, key = torch.arange(6).unsqueeze(1), torch.arange(6)
    assert sees(query, key, 0, 0).tolist() == torch.ones(6, 6).tril().bool().tolist()
    assert sees(query, key, 2, 0).sum(1).tolist() == [1, 2, 2, 2, 2, 2]
    assert sees(query, key, 0, 4).sum(1).tolist() == [1, 2, 3, 4, 1, 2]
