"""What some families switch on in an op: references against formulas, compiled kernels against references."""

import math

import pytest
import torch
from torch import Tensor

from aiolora.ops import native
from aiolora.ops.activation import gelu, gelu_mul, gelu_mul_op
from aiolora.ops.attention import attention, attention_op, rope_store, rope_store_op
from aiolora.ops.blocks import own_norm
from aiolora.ops.linear import Partial
from aiolora.ops.norm import add_norm, add_norm_op, rms_norm, rms_norm_op
from tests.ops.test_native import assert_rounded_once, paged, wide
from tests.tiny import kernels

DTYPES = [torch.float32, torch.bfloat16]
HEADS, GROUPS = 6, 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_offset_is_added_to_the_weight_of_a_norm(dtype: torch.dtype) -> None:
    x, y = (torch.randn(5, 72).to(dtype) for _ in range(2))
    weight = (0.01 * torch.randn(72)).to(dtype)  # around one bfloat16 could not tell most of them from it
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())
    assert_rounded_once(rms_norm(x, weight, 1e-5, 1.0), exact.float())
    assert_rounded_once(rms_norm_op(x, weight, 1e-5, 1.0), exact.float())
    normed, total = add_norm_op(y, None, [], [], x, weight, 1e-5, 1.0)
    assert_rounded_once(normed, rms_norm(*wide(total, weight), 1e-5, 1.0))
    assert torch.equal(add_norm(y, None, [], [], x, weight, 1e-5, 1.0)[0], rms_norm(x + y, weight, 1e-5, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_joins_the_stream_may_have_a_norm_of_its_own(dtype: torch.dtype, offset: float) -> None:
    y, residual = (torch.randn(5, 72).to(dtype) for _ in range(2))
    bias, weight, inner = (torch.randn(72).to(dtype) for _ in range(3))
    value = rms_norm((y.float() + bias.float()).to(dtype), inner, 1e-5, offset)
    for run in (add_norm, add_norm_op):
        normed, total = run(y, bias, [], [], residual, weight, 1e-5, offset, inner)
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 3e-2}
        torch.testing.assert_close(total, residual + value, **near)
        torch.testing.assert_close(normed, rms_norm(total, weight, 1e-5, offset), **near)


def test_an_adapters_own_norm_has_the_offset_too() -> None:
    x, residual, base = torch.randn(2, 6), torch.randn(2, 6), torch.randn(6)
    rows, pages, tokens = torch.randn(1, 128, 6), torch.tensor([[0]]), torch.tensor([1])
    out = own_norm(x, residual, base, rows, pages, tokens, 5, 1e-5, 1.0)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], rms_norm(residual[1], 1 + rows[0, 5], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (3, 64), (40, 1000)])
def test_gelu_gates_as_tanh_approximates_it(dtype: torch.dtype, tokens: int, width: int) -> None:
    y, bias = (4 * torch.randn(tokens, 2 * width)).to(dtype), torch.randn(2 * width).to(dtype)
    for term in (None, bias):
        value = y.float() if term is None else y.float() + term.float()
        gate, up = value.double().chunk(2, dim=-1)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        exact = 0.5 * gate * (1 + inner.tanh()) * up
        torch.testing.assert_close(gelu_mul(y.float(), None if term is None else term.float(), [], []), exact.float())
        assert_rounded_once(gelu_mul_op(y, term, [], []), exact.float())
    torch.testing.assert_close(gelu(Partial(value)), torch.nn.functional.gelu(value, approximate="tanh"))


def test_gelu_of_extreme_gates_is_zero_or_the_gate() -> None:
    gate = torch.tensor([[-1e9, -200.0, -5.0, 0.0, 5.0, 200.0, 1e9, torch.nan]])
    out = gelu_mul_op(torch.cat((gate, torch.ones_like(gate)), 1), None, [], [])
    expected = torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def rope_case(dtype: torch.dtype, dim: int, rotated: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    tokens = 33
    y, bias = (torch.randn(shape).to(dtype) for shape in ((tokens, 10 * dim), (10 * dim,)))
    slots = torch.randperm(80)[:tokens].to(torch.int32)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    return [y, bias], [positions, slots], torch.randn(50, rotated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(12, 8), (64, 48), (80, 2), (96, 96)])
def test_only_the_first_values_of_a_head_are_rotated(dtype: torch.dtype, dim: int, rotated: int) -> None:
    (y, bias), (positions, slots), cos_sin = rope_case(dtype, dim, rotated)
    norms = [(0.1 * torch.randn(dim)).to(dtype) for _ in range(2)]
    caches = [torch.zeros(10, 8, GROUPS, dim, dtype=dtype) for _ in range(2)]
    exact = wide(*caches)
    q = rope_store_op(y, bias, [], [], *norms, 1e-6, cos_sin, positions, slots, *caches, HEADS, 1.0)
    rest = [1e-6, cos_sin, positions, slots]
    expected = rope_store(*wide(y, bias), [], [], *wide(*norms), *rest, *exact, HEADS, 1.0)
    for ours, theirs in zip((q, *caches), (expected, *exact)):
        assert_rounded_once(ours, theirs)
    value = (y.double() + bias.double()).view(len(y), 10, dim)[:, 0]
    value = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norms[0].double())
    (cos, sin), (low, high) = cos_sin[positions].chunk(2, -1), value[:, :rotated].chunk(2, -1)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin, value[:, rotated:]), -1)
    assert_rounded_once(q[:, 0], turned.float())


@pytest.mark.parametrize("compiled", [False, True])
def test_all_heads_of_q_and_of_k_may_share_a_norm(compiled: bool) -> None:
    dim = 16
    (y, _), (positions, slots), cos_sin = rope_case(torch.float32, dim, dim)
    norms = torch.rand(HEADS * dim), torch.rand(GROUPS * dim)
    caches = [torch.zeros(10, 8, GROUPS, dim) for _ in range(4)]
    with kernels(compiled=compiled):
        q = rope_store_op(y, None, [], [], *norms, 1e-6, cos_sin, positions, slots, *caches[:2], HEADS)
    parts = list(y.split((HEADS * dim, GROUPS * dim, GROUPS * dim), 1))
    parts[:2] = [part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm for part, norm in zip(parts, norms)]
    rest = [None, None, 0.0, cos_sin, positions, slots]
    expected = rope_store(torch.cat(parts, 1), None, [], [], *rest, *caches[2:], HEADS)
    torch.testing.assert_close([q, *caches[:2]], [expected, *caches[2:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_capped_scores_never_pass_the_cap(dtype: torch.dtype, window: int, cap: float) -> None:
    case = paged([1, 17, 256, 3, 300, 20], [1, 1, 2, 3, 1, 20], HEADS, GROUPS, dtype)
    out = attention_op(*case, 0.4, window, cap)
    assert_rounded_once(out, attention(*wide(*case), 0.4, window, cap))
    q, k_cache, v_cache, tables, lengths, starts = case
    token, length = int(starts[4]), int(lengths[4])
    pages = tables[4, : -(-length // 16)]
    k, v = (cache[pages].flatten(0, 1)[:length].double() for cache in (k_cache, v_cache))
    for head in range(HEADS):
        scores = cap * (k[:, head // 3] @ q[token, head].double() * 0.4 / cap).tanh()
        if window:
            scores[:-window] = -torch.inf
        exact = scores.softmax(0) @ v[:, head // 3]
        torch.testing.assert_close(
            out[token].view(HEADS, -1)[head].double(), exact, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_a_sink_is_a_key_that_has_no_value(dtype: torch.dtype, window: int, cap: float) -> None:
    case = paged([1, 17, 256, 3, 300, 20], [1, 1, 2, 3, 1, 20], HEADS, GROUPS, dtype)
    sinks = torch.tensor([-2.0, 0.0, 1.0, 2.5, 50.0, -50.0])
    out = attention_op(*case, 0.4, window, cap, sinks)
    assert_rounded_once(out, attention(*wide(*case), 0.4, window, cap, sinks))
    q, k_cache, v_cache, tables, lengths, starts = case
    for b in (0, 4, 5):  # one key; over two parts of keys; a whole prompt
        token, length = int(starts[b + 1]) - 1, int(lengths[b])
        pages = tables[b, : -(-length // 16)]
        k, v = (cache[pages].flatten(0, 1)[:length].double() for cache in (k_cache, v_cache))
        for head in range(HEADS):
            scores = k[:, head // 3] @ q[token, head].double() * 0.4
            scores = cap * (scores / cap).tanh() if cap else scores
            if window:
                scores[:-window] = -torch.inf
            weights = torch.cat((scores, sinks[head, None].double())).softmax(0)[:-1]
            exact = weights @ v[:, head // 3]
            near = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(out[token].view(HEADS, -1)[head].double(), exact, rtol=0, atol=near)


def test_scores_far_beyond_the_cap_are_the_cap() -> None:
    q, k, v, *rest = paged([40], [1], 4, 2, torch.float32)
    out = attention_op(q * 1e6, k, v, *rest, 0.4, 0, 1.0)
    assert native.library() is None or out.isfinite().all()
    torch.testing.assert_close(out, attention(q * 1e6, k, v, *rest, 0.4, 0, 1.0), rtol=1e-5, atol=1e-5)
