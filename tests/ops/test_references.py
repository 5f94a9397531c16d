"""Every op: its registration by opcheck, its reference against loops in float64 that follow the formula literally."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from aiolora.engine.sampler import uniform
from aiolora.ops.activation import gelu_mul_op, silu_mul, silu_mul_op
from aiolora.ops.attention import attention, attention_op, rope_store, rope_store_op
from aiolora.ops.blocks import own_logits_op, own_norm_op
from aiolora.ops.embedding import embed, embed_op, embed_own_op, embed_shrink_op
from aiolora.ops.experts import choose_experts, choose_experts_op, gated_experts_op, summed_experts_op
from aiolora.ops.linear import (
    complete,
    complete_op,
    product_op,
    product_shrink_op,
    shrink,
    shrink_op,
    whole_linear,
    whole_linear_op,
)
from aiolora.ops.norm import add_norm, add_norm_op, rms_norm, rms_norm_op
from aiolora.ops.sampling import (
    allow,
    allow_op,
    greedy,
    greedy_op,
    penalise,
    penalise_op,
    report,
    report_op,
    sample,
    sample_op,
)
from tests.ops.routing import adjusted, routing, tables, vectors
from tests.tiny import kernels

DTYPES = [torch.float32, torch.bfloat16]
MIXES = {
    "none": [-1] * 7,
    "one": [0] * 7,
    "all distinct": [3, 1, 0, 2],
    "some none": [2, -1, 0, 2, -1, 0, 1],
    "some in no tile": [-2, 1, -1, 1, -2, 3, 1],
    "one token": [1],
    "no ranks": [5, -1, 4, 5, 1, 4],
}
RANKS = [3, 24, 9, 16, 0, 0]  # of the adapters: none to three pages; every second has vectors
BOUNDS = [0, 6, 10, 15]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def routed(mix: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """[perm, tiles, pages, scales, vector pages] with tiles of two tokens; the pages and scales of each adapter."""
    pages, scales = tables(RANKS)
    return routing(mix, pages, scales, 2), pages, scales


def with_items(rows: list[Tensor]) -> list[Tensor]:
    """`rows` with the items, which references do not read."""
    perm, tiles, pages, scales, _ = rows
    return [perm, tiles, torch.full((3, 4), -1, dtype=torch.int32), pages, scales]


def owing(h: Tensor, b: Tensor, v: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """What a reader of a projection gets, with the tile of each token, which references do not read."""
    return [h, b, v, *rows[:3], rows[4], torch.full_like(rows[0], -1)]


def assert_close(out: Tensor, exact: Tensor) -> None:
    """`out` is the float64 `exact` up to the rounding of its dtype."""
    share = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=share, atol=share * max(1.0, exact.abs().max().item()))


def adapters(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a [S, P, 8, K] and b [P, 8, N], views as the pool makes them."""
    a = torch.randn(10, 2, len(BOUNDS) - 1, 8, width).to(dtype)[:, 1].transpose(0, 1)
    return a, torch.randn(10, 2, 8, BOUNDS[-1]).to(dtype)[:, 0]


def low_rank(x: Tensor, a: Tensor, mix: list[int], pages: Tensor, scales: Tensor) -> Tensor:
    """h [T, S, W * 8] of the formula at the top of ops/linear.py; pages and scales are those of each adapter."""
    h = torch.zeros(len(mix), a.shape[0], pages.shape[2] * 8, dtype=torch.float64)
    for t, adapter in enumerate(mix):
        for place, page in enumerate(pages[adapter, 1].tolist() if adapter >= 0 else []):
            for s in range(a.shape[0] if page >= 0 else 0):
                for r in range(8):
                    down = x[t].double() @ a[s, page, r].double()
                    h[t, s, place * 8 + r] = scales[adapter, 1, place].double() * down
    return h


def expanded(h: Tensor, b: Tensor, mix: list[int], pages: Tensor, bounds: list[int] = BOUNDS) -> Tensor:
    """What is owed, [T, N]; pages are those of each adapter."""
    out = torch.zeros(len(mix), b.shape[2], dtype=torch.float64)
    for t, adapter in enumerate(mix):
        for place, page in enumerate(pages[adapter, 1].tolist() if adapter >= 0 else []):
            for s, (low, high) in enumerate(pairwise(bounds)):
                for r in range(8 if page >= 0 else 0):
                    out[t, low:high] += h[t, s, place * 8 + r].double() * b[page, r, low:high].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_shrink_is_the_product_with_the_pages_of_each_tokens_adapter(mix: str, dtype: torch.dtype) -> None:
    (a, _), (rows, pages, scales) = adapters(11, dtype), routed(MIXES[mix])
    x = torch.randn(len(MIXES[mix]), 11).to(dtype)
    h = shrink(x, a, with_items(rows), [1, 2])
    assert h.dtype == torch.float32
    exact = low_rank(x, a, MIXES[mix], pages, scales)
    torch.testing.assert_close(h.double(), exact, rtol=0, atol=(1e-5 if dtype == torch.float32 else 0.1))
    if dtype == torch.float32:
        assert torch.equal(h == 0, exact == 0), "ranks that an adapter has not, and tokens without one, are zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_complete_adds_what_is_owed_and_the_bias_behind_gain_and_shift(
    mix: str, biased: bool, dtype: torch.dtype
) -> None:
    (_, b), (rows, pages, _) = adapters(11, dtype), routed(MIXES[mix])
    y, v = torch.randn(len(MIXES[mix]), BOUNDS[-1]).to(dtype), vectors(len(RANKS), BOUNDS[-1])
    h = torch.randn(len(y), 3, 32)
    bias = torch.randn(BOUNDS[-1]).to(dtype) if biased else None
    before = y.clone()
    out = complete(y, bias, owing(h, b, v, rows), [1, 2, *BOUNDS])
    extra = 0.0 if bias is None else bias.double()
    assert_close(out, adjusted(y.double() + expanded(h, b, MIXES[mix], pages), MIXES[mix], v) + extra)
    assert torch.equal(y, before)
    plain = complete(y, bias, [], [])
    assert_close(plain, y.double() + extra)
    assert plain.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_whole_linear_is_the_product_and_what_is_owed(mix: str, dtype: torch.dtype, compiled: bool) -> None:
    (a, b), (rows, pages, scales) = adapters(11, dtype), routed(MIXES[mix])
    x, weight = torch.randn(len(MIXES[mix]), 11).to(dtype), torch.randn(BOUNDS[-1], 11).to(dtype)
    h, v = low_rank(x, a, MIXES[mix], pages, scales), vectors(len(RANKS), BOUNDS[-1])
    exact = x.double() @ weight.double().T
    with kernels(compiled=compiled):
        assert_close(whole_linear_op(x, weight, [], []), exact)
        out = whole_linear_op(x, weight, [a, b, v, *rows], [1, *BOUNDS])
    assert_close(out, adjusted(exact + expanded(h, b, MIXES[mix], pages), MIXES[mix], v))


def test_a_token_of_a_step_is_not_changed_by_what_shares_the_step() -> None:
    a, b = adapters(11, torch.float32)
    pages, scales = tables(RANKS)
    x, weight, v = torch.randn(7, 11), torch.randn(BOUNDS[-1], 11), vectors(len(RANKS), BOUNDS[-1])

    def served(tokens: list[int]) -> Tensor:
        rows = routing([MIXES["some none"][t] for t in tokens], pages, scales, 2)
        return whole_linear(x[tokens], weight, [a, b, v, *rows], [1, *BOUNDS])

    for tokens in ([0], [1, 2], [6, 0, 3]):
        torch.testing.assert_close(served(tokens), served(list(range(7)))[tokens], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 10), (2, 4, 6), (1, 1)])
def test_rms_norm_divides_by_the_root_of_the_mean_square(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    exact = torch.empty(shape, dtype=torch.float64)
    for index in np.ndindex(shape[:-1]):
        row = x[index].double()
        exact[index] = row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + 1e-3) * weight.double()
    assert_close(rms_norm(x, weight, 1e-3), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_pays_into_the_residual_first(dtype: torch.dtype) -> None:
    mix = MIXES["some none"]
    (_, b), (rows, pages, _) = adapters(11, dtype), routed(mix)
    y, residual = torch.randn(7, 15).to(dtype), torch.randn(7, 15).to(dtype)
    bias, weight, h = torch.randn(15).to(dtype), torch.randn(15).to(dtype), torch.randn(7, 3, 32)
    v = vectors(len(RANKS), 15)
    normed, total = add_norm(y, bias, owing(h, b, v, rows), [1, 2, *BOUNDS], residual, weight, 1e-5)
    exact = residual.double() + adjusted(y.double() + expanded(h, b, mix, pages), mix, v) + bias.double()
    assert_close(total, exact)
    wide = total.double()
    assert_close(normed, wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_gates_the_paid_value(dtype: torch.dtype) -> None:
    mix = MIXES["some none"]
    (rows, pages, _), b = routed(mix), torch.randn(10, 8, 14).to(dtype)
    y, bias, h = torch.randn(7, 14).to(dtype), torch.randn(14).to(dtype), torch.randn(7, 2, 32)
    v = vectors(len(RANKS), 14)
    out = silu_mul(y, bias, owing(h, b, v, rows), [1, 2, 0, 7, 14])
    value = adjusted(y.double() + expanded(h, b, mix, pages, [0, 7, 14]), mix, v) + bias.double()
    gate, up = value[:, :7], value[:, 7:]
    assert_close(out, gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rope_store_rotates_halves_and_writes_only_to_its_slots(
    index: torch.dtype, normed: bool, dtype: torch.dtype
) -> None:
    tokens, heads, groups, dim, page_size = 5, 4, 2, 6, 4
    y, bias = torch.randn(tokens, (heads + 2 * groups) * dim).to(dtype), torch.randn((heads + 2 * groups) * dim)
    bias = bias.to(dtype)
    norms = [torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)] if normed else [None, None]
    cos_sin = torch.randn(20, dim)
    positions = torch.tensor([3, 19, 0, 7, 7], dtype=index)
    slots = torch.tensor([9, -1, 0, 11, -1], dtype=index)
    caches = [torch.full((3, page_size, groups, dim), 5.0, dtype=dtype) for _ in range(2)]
    q = rope_store(y, bias, [], [], *norms, 1e-5, cos_sin, positions, slots, *caches, heads)

    value = (y.double() + bias.double()).view(tokens, -1, dim)
    exact_q = torch.empty(tokens, heads, dim, dtype=torch.float64)
    exact = [torch.full((3 * page_size, groups, dim), 5.0, dtype=torch.float64) for _ in range(2)]
    for t in range(tokens):
        cos, sin = cos_sin[positions[t]].double().chunk(2)
        rotated = []
        for head in range(heads + groups):
            row = value[t, head]
            norm = norms[0] if head < heads else norms[1]
            if norm is not None:
                row = row / (row.square().mean() + 1e-5).sqrt() * norm.double()
            low, high = row[: dim // 2], row[dim // 2 :]
            rotated.append(torch.cat((low * cos - high * sin, high * cos + low * sin)))
        exact_q[t] = torch.stack(rotated[:heads])
        if slots[t] >= 0:
            exact[0][slots[t]], exact[1][slots[t]] = torch.stack(rotated[heads:]), value[t, heads + groups :]
    assert_close(q, exact_q)
    for cache, wanted in zip(caches, exact):
        assert_close(cache.flatten(0, 1), wanted)


def test_rope_store_pays_what_q_k_and_v_owe() -> None:
    mix, dim = MIXES["some none"], 5 * 2
    (rows, _, _), b = routed(mix), torch.randn(10, 8, 40)
    y, h = torch.randn(7, 40), torch.randn(7, 3, 32)
    owed, where = owing(h, b, vectors(len(RANKS), 40), rows), [1, 2, 0, 20, 30, 40]
    rest: list[Any] = [None, None, 1e-5, torch.randn(9, dim), torch.arange(7), torch.arange(7)]
    caches = [torch.zeros(2, 4, 1, dim) for _ in range(4)]
    q = rope_store(y, None, owed, where, *rest, *caches[:2], 2)
    wanted = rope_store(complete(y, None, owed, where), None, [], [], *rest, *caches[2:], 2)
    torch.testing.assert_close([q, *caches[:2]], [wanted, *caches[2:]])


def paged(lengths: list[int], queries: list[int], dtype: torch.dtype, dim: int = 6) -> list[Tensor]:
    """q, caches of shuffled pages of 4, tables with wild tails, lengths and starts in int32; 4 heads, 2 groups."""
    counts = [-(-length // 4) for length in lengths]
    free = torch.randperm(sum(counts) + 3).tolist()
    tables = torch.full((len(lengths), max(counts) + 2), 10**6, dtype=torch.int32)
    for b, count in enumerate(counts):
        tables[b, :count] = torch.tensor([free.pop() for _ in range(count)])
    caches = [torch.randn(sum(counts) + 3, 4, 2, dim).to(dtype) for _ in range(2)]
    starts = torch.tensor([0, *np.cumsum(queries).tolist()], dtype=torch.int32)
    q = torch.randn(sum(queries), 4, dim).to(dtype)
    return [q, *caches, tables, torch.tensor(lengths, dtype=torch.int32), starts]


CASES = {
    "whole prompts": ([5, 1, 9], [5, 1, 9]),
    "chunks behind a prefix": ([11, 8, 4], [3, 7, 1]),
    "decoding": ([1, 4, 13, 8], [1, 1, 1, 1]),
    "a mixed step": ([17, 6, 12], [1, 6, 5]),
    "a sequence without queries": ([5, 3], [2, 0]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_softmax_over_what_each_token_sees(
    case: str, window: int, dtype: torch.dtype, compiled: bool
) -> None:
    lengths, queries = CASES[case]
    q, k_cache, v_cache, tables, kv_lengths, starts = paged(lengths, queries, dtype, 16 if compiled else 6)
    with kernels(compiled=compiled):
        run = attention_op if compiled else attention
        out = run(q, k_cache, v_cache, tables, kv_lengths, starts, 0.3, window)
    exact = torch.empty(q.shape, dtype=torch.float64)
    for b, (length, count) in enumerate(zip(lengths, queries)):
        for i in range(count):
            position, token = length - count + i, int(starts[b]) + i
            first = max(0, position - window + 1) if window else 0
            for head in range(4):
                keys, values = [], []
                for j in range(first, position + 1):
                    page, offset = int(tables[b, j // 4]), j % 4
                    keys.append(k_cache[page, offset, head // 2].double())
                    values.append(v_cache[page, offset, head // 2].double())
                weight = (torch.stack(keys) @ q[token, head].double() * 0.3).softmax(0)
                exact[token, head] = weight @ torch.stack(values)
    assert_close(out, exact.flatten(1))


# ---- sampling ----


def brute_force(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int | None:
    """The token at point u of the truncated distribution, by id; None: too near a border to tell."""
    if temperature == 0:
        return int(logits.argmax())
    probs = (logits.double() / temperature).softmax(0).tolist()
    kept = [i for i in range(len(probs)) if probs[i] >= min_p * max(probs)]
    if top_k:
        kth = sorted((probs[i] for i in kept), reverse=True)[:top_k][-1]
        kept = [i for i in kept if probs[i] >= kth]
    total = sum(probs[i] for i in kept)
    likelier = {i: sum(probs[j] for j in kept if probs[j] > probs[i]) / total for i in kept}
    if any(abs(mass - top_p) < 1e-6 for mass in likelier.values()):
        return None
    kept = [i for i in kept if likelier[i] < top_p]
    total, mass = sum(probs[i] for i in kept), 0.0
    for i in kept:
        mass += probs[i] / total
        if abs(mass - u) < 1e-6 and mass < 1 - 1e-9:
            return None
        if u < mass:
            return i
    return kept[-1]


def columns(rows: list[tuple[float, int, float, float, float]]) -> list[Tensor]:
    temperature, top_k, top_p, min_p, u = zip(*rows)
    return [torch.tensor(c) for c in (temperature, top_k, top_p, min_p, u)]


def test_sampling_is_the_inverse_of_the_truncated_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(400, 5, generator=generator).tolist()
    rows = [
        (
            0.0 if a < 0.1 else 0.3 + 2 * a,
            0 if b < 0.4 else 1 + int(b * 20),
            1.0 if c < 0.4 else max(c, 0.05),
            0.0 if d < 0.5 else d - 0.5,
            e,
        )
        for a, b, c, d, e in numbers
    ]
    logits = 3 * torch.randn(len(rows), 37, generator=generator)
    logits[::2] = logits[::2].round()  # equals
    out = sample(logits, *columns(rows))
    assert out.dtype == torch.int32
    tokens = out.tolist()
    wanted = [brute_force(row_logits, *row) for row_logits, row in zip(logits, rows)]
    told = [(token, want) for token, want in zip(tokens, wanted) if want is not None]
    assert len(told) > 390
    assert [token for token, _ in told] == [want for _, want in told]


def test_each_truncation_keeps_exactly_its_tokens() -> None:
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    points = [(i + 0.5) / 500 for i in range(500)]
    for setting, kept in {
        (1.0, 0, 1.0, 0.0): {0, 1, 2, 3, 4},
        (1.0, 2, 1.0, 0.0): {1, 3},
        (1.0, 1, 1.0, 0.0): {1},
        (1.0, 99, 1.0, 0.0): {0, 1, 2, 3, 4},
        (1.0, 0, 0.39, 0.0): {1},
        (1.0, 0, 0.69, 0.0): {1, 3},
        (1.0, 0, 0.71, 0.0): {1, 3, 4},
        (1.0, 0, 1e-6, 0.0): {1},
        (1.0, 0, 1.0, 0.3): {1, 3, 4},
        (1.0, 0, 1.0, 1.0): {1},
        (1.0, 3, 0.8, 0.3): {1, 3},  # of 0.4 0.3 0.15, renormalised: 0.47 0.35 0.18
        (1e-30, 0, 1.0, 0.0): {1},
    }.items():
        rows = [(*setting, u) for u in points]
        tokens = sample(probs.log().expand(500, 5), *columns(rows)).tolist()
        assert set(tokens) == kept, setting
        for token in kept:
            share = float(probs[token] / probs[sorted(kept)].sum())
            assert setting[0] < 1 or abs(tokens.count(token) / 500 - share) <= 1 / 500 + 1e-6, setting


def test_equals_stay_or_go_together() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, -torch.inf]])
    points = [(i + 0.5) / 100 for i in range(100)]
    for setting, kept in {
        (1.0, 1, 1.0, 0.0): {1, 3},
        (1.0, 3, 1.0, 0.0): {1, 2, 3, 4},
        (1.0, 0, 0.3, 0.0): {1, 3},
        (1.0, 0, 0.7, 0.0): {1, 2, 3, 4},  # the two likeliest have 0.69
        (1.0, 0, 1.0, 0.36): {1, 2, 3, 4},
        (1.0, 4, 0.72, 0.0): {1, 3},  # 0.73 of what top_k left
    }.items():
        tokens = sample(logits.expand(100, -1), *columns([(*setting, u) for u in points])).tolist()
        assert set(tokens) == kept, setting
        assert tokens == sorted(tokens), "the larger u, the larger the id"


def test_the_ends_of_the_unit_interval_stay_within_what_is_kept() -> None:
    logits = torch.tensor([[-torch.inf, 3.0, 1.0, 3.0, 0.0, -torch.inf]]).repeat(5, 1)
    end = 1 - 2**-24
    settings = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 0, 0.5, 0.0)]
    rows = [(*setting, u) for setting, u in zip(settings, (0.0, 0.0, end, 1.0, 1.0))]
    assert sample(logits, *columns(rows)).tolist() == [1, 1, 3, 4, 3]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_greedy_and_report_are_the_softmax(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(40, 50)).to(dtype)
    logits[0, [7, 30]] = 20.0
    logits[1, 5:] = -torch.inf
    exact = logits.double().log_softmax(-1)
    tokens, logprobs = greedy(logits)
    assert (tokens.dtype, logprobs.dtype) == (torch.int32, torch.float32)
    assert tokens.tolist() == [row.index(max(row)) for row in exact.tolist()]
    torch.testing.assert_close(logprobs.double(), exact.max(-1).values, rtol=1e-5, atol=1e-5)
    asked = torch.randint(0, 50, (40,), dtype=torch.int32)
    for those in (asked, asked.long(), tokens):
        reported, ranks = report(logits, those)
        chosen = exact.gather(1, those.long().unsqueeze(1))
        torch.testing.assert_close(reported.double(), chosen.squeeze(1), rtol=1e-5, atol=1e-5)
        assert (reported.dtype, ranks.dtype) == (torch.float32, torch.int32)
        assert ranks.tolist() == [sum(v > c[0] for v in row) for row, c in zip(exact.tolist(), chosen.tolist())]
    assert torch.equal(report(logits, tokens)[0], logprobs), "to the last bit"


def test_rows_that_are_not_finite_bring_a_token_of_the_vocabulary() -> None:
    logits = torch.stack(
        [
            torch.full((5,), torch.nan),
            torch.full((5,), -torch.inf),
            torch.tensor([0, torch.inf] * 2 + [0]),
            torch.tensor([0, 1, 2, 3, torch.nan]),
        ]
    )
    for setting in ((0.0, 0, 1.0, 0.0, 0.5), (1.0, 0, 1.0, 0.0, 0.5), (1.0, 2, 0.5, 0.1, 0.5)):
        tokens = sample(logits, *columns([setting] * 4))
        assert ((tokens >= 0) & (tokens < 5)).all()
    tokens, logprobs = greedy(logits)
    assert ((tokens >= 0) & (tokens < 5)).all()
    assert logprobs.isnan().all()
    assert report(logits, torch.zeros(4, dtype=torch.int32))[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_follow_transformers_and_openai(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(20)).to(dtype)
    prompt, output = [3, 5, 5, 7], [7, 7, 11, 2, 11, 11]
    seen = [torch.tensor(prompt, dtype=torch.int32), torch.tensor(output, dtype=torch.int32)]
    before = logits.clone()
    for repetition in (1.0, 0.7, 1.8):
        out = penalise(logits, *seen, repetition, 0.0, 0.0)
        assert out.dtype == torch.float32
        processor = RepetitionPenaltyLogitsProcessor(repetition)
        torch.testing.assert_close(out, processor(torch.tensor([prompt + output]), logits[None].float().clone())[0])
    for presence, frequency in ((0.5, 0.0), (0.0, 1.5), (-2.0, 0.25)):
        out = penalise(logits, *seen, 1.0, presence, frequency)
        for token in range(20):
            uses = output.count(token)
            assert float(out[token]) == pytest.approx(
                float(logits[token]) - uses * frequency - (uses > 0) * presence, abs=1e-5
            )
    nothing = torch.empty(0, dtype=torch.int32)
    assert torch.equal(penalise(logits, nothing, nothing, 1.8, 1.0, 1.0), logits.float())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocabulary", "words"), [(64, 2), (50, 2), (70, 2), (31, 1), (5, 3)])
def test_a_token_is_allowed_by_its_bit(vocabulary: int, words: int, dtype: torch.dtype) -> None:
    logits = torch.randn(5, vocabulary).to(dtype)
    bits = torch.randint(-(2**31), 2**31, (3, words), dtype=torch.int32)
    out = logits.clone()
    allow(out, torch.tensor([4, 0, 2]), bits)
    masks = {row: int.from_bytes(words.numpy().tobytes(), "little") for row, words in zip((4, 0, 2), bits)}
    for row in range(5):
        for token in range(vocabulary):
            allowed = row not in masks or masks[row] >> token & 1
            assert float(out[row, token]) == (float(logits[row, token]) if allowed else -math.inf)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("low", [-math.inf, -1e30, -100.0, -81.0])
def test_what_is_next_to_impossible_is_never_drawn(low: float, u: float) -> None:
    logits = torch.full((1, 5000), low)
    logits[0, 7] = logits[0, 4000] = 0.0
    one, off = torch.ones(1), torch.zeros(1)
    drawn = sample(logits, one, off.int(), one, off, torch.tensor([u]))
    assert drawn.tolist() == [7 if u < 0.5 else 4000]


def test_uniform_numbers_are_uniform_and_unrelated_over_seeds_and_positions() -> None:
    table = np.array([[uniform(seed, position) for position in range(300)] for seed in range(-50, 250)])
    assert table.min() >= 0
    assert table.max() < 1
    assert np.array_equal(table, table.astype(np.float32)), "float32 holds them exactly"
    for numbers in (table.ravel(), table[:, 7], table[7], np.diag(table)):
        ordered = np.sort(numbers)
        distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
        assert distance < 1.95 / math.sqrt(len(ordered)), "Kolmogorov-Smirnov at 0.1 %"
    for first, second in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:]), (table[1:, :-1], table[:-1, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / math.sqrt(first.size)
    assert uniform(2**63 - 1, 5) == uniform(2**63 - 1, 5)
    assert len(np.unique(table)) > 0.99 * table.size


# ---- embedding ----


def test_embedding_takes_tokens_in_flight_from_the_step_before_and_reads_no_other_row() -> None:
    weight = torch.randn(9, 4)
    previous = torch.tensor([8, 2, 700], dtype=torch.int32)
    tokens = torch.tensor([5, -1, 0, -2, -3, 9, -1], dtype=torch.int32)
    assert torch.equal(embed(tokens, previous, weight), weight[[5, 8, 0, 2, 8, 8, 8]])


# ---- registration ----


def _embed(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    tokens, previous = (torch.tensor(ids, dtype=torch.int32) for ids in ([3, -2, 0], [1, 2]))
    return [(tokens, previous, torch.randn(5, 6).to(dtype))]


def _embed_shrink(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    tokens, previous = (torch.tensor(ids, dtype=torch.int32) for ids in ([3, -2, 0, 1, 1, 0, 2], [1, 2]))
    _, _, _, pages, scales = with_items(_linear_case(dtype)["rows"])
    owners = torch.zeros(7, dtype=torch.int32)
    return [(tokens, previous, torch.randn(1, 11, 8, 5).to(dtype), pages, scales, owners, 1)]


def _own_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, table and owners of three positions, the last without an adapter."""
    table, owners = torch.tensor([[-1, 1], [-1, -1]], dtype=torch.int32), torch.tensor([0, 0, 1], dtype=torch.int32)
    return torch.randn(2, 128, 6).to(dtype), table, owners


def _embed_own(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    tokens, previous = (torch.tensor(ids, dtype=torch.int32) for ids in ([3, -2, 130], [1, 200]))
    return [(torch.randn(3, 6).to(dtype), tokens, previous, *_own_rows(dtype))]


def _own_logits(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    perm, tiles = torch.tensor([1, 0, 2], dtype=torch.int32), torch.tensor([[0, 2], [2, 1], [0, 0]], dtype=torch.int32)
    return [(torch.randn(3, 200).to(dtype), torch.randn(3, 6).to(dtype), *_own_rows(dtype), perm, tiles, 2)]


OWN_NORMS = [(3, 0.0), (130, 1.0), (999, 0.0)]


def _own_norm(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    x, residual, base = (torch.randn(shape).to(dtype) for shape in ((3, 6), (3, 6), (6,)))
    rows, table, _ = _own_rows(dtype)
    tokens = torch.tensor([2, 0], dtype=torch.int32)
    return [(x, residual, base, rows, table, tokens, number, 1e-5, offset) for number, offset in OWN_NORMS]


def _linear_case(dtype: torch.dtype) -> dict[str, Any]:
    a, b = adapters(11, dtype)
    rows, _, _ = routed(MIXES["some none"])
    return {
        "a": a.contiguous(),
        "b": b.contiguous(),
        "v": torch.randn(len(RANKS), 2, BOUNDS[-1]),
        "rows": rows,
        "owed": owing(torch.randn(7, 3, 32), b.contiguous(), torch.randn(len(RANKS), 2, BOUNDS[-1]), rows),
        "where": [1, 2, *BOUNDS],
        "y": torch.randn(7, 15).to(dtype),
        "bias": torch.randn(15).to(dtype),
    }


def _shrink(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    case = _linear_case(dtype)
    return [(torch.randn(7, 11).to(dtype), case["a"], with_items(case["rows"]), [1, 2])]


def _product(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(7, 11).to(dtype), torch.randn(15, 11).to(dtype))]


def _product_shrink(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(x, torch.randn(15, 11).to(dtype), *rest) for x, *rest in _shrink(dtype)]


def _complete(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    case = _linear_case(dtype)
    y, bias = case["y"], case["bias"]
    return [(y, bias, case["owed"], case["where"]), (y, None, case["owed"], case["where"]), (y, bias, [], [])]


def _whole_linear(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    case = _linear_case(dtype)
    x, weight = torch.randn(7, 11).to(dtype), torch.randn(15, 11).to(dtype)
    return [(x, weight, [case["a"], case["b"], case["v"], *case["rows"]], [1, *BOUNDS]), (x, weight, [], [])]


def _rms_norm(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(7, 2, 6).to(dtype), torch.randn(6).to(dtype), 1e-5, *offset) for offset in ([], [1.0])]


def _add_norm(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    rest = [torch.randn(7, 15).to(dtype), torch.randn(15).to(dtype), 1e-5]
    ends: list[list[Any]] = [[], [1.0], [0.0, torch.randn(15).to(dtype)]]
    return [(*case, *rest, *end) for case in _complete(dtype) for end in ends]


def _silu_mul(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    rows, _, _ = routed(MIXES["some none"])
    owed = owing(torch.randn(7, 2, 32), torch.randn(10, 8, 14).to(dtype), torch.randn(len(RANKS), 2, 14), rows)
    y, bias = torch.randn(7, 14).to(dtype), torch.randn(14).to(dtype)
    return [(y, bias, owed, [1, 2, 0, 7, 14]), (y, None, [], [])]


def _choose(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    rows, _, _ = routed(MIXES["some none"])
    owed = owing(torch.randn(7, 1, 32), torch.randn(10, 8, 5).to(dtype), torch.randn(len(RANKS), 2, 5), rows)
    y = torch.randn(7, 5).to(dtype)
    bias = torch.randn(5).to(dtype)
    return [(y, bias, owed, [1, 2, 0, 5], 2, True, 2), (y, None, [], [], 3, False, 16)]


def _chosen(dtype: torch.dtype, slices: int, inputs: int, outputs: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """[weights, experts, rows, tiles] of seven tokens through two of five experts each; adapters there and not."""
    rows, _, _ = routed(MIXES["some none"])
    chosen = [*choose_experts(torch.randn(7, 5), None, [], [], 2, True, 2)]
    a, b = torch.randn(10, 5, slices, 8, inputs).to(dtype), torch.randn(10, 5, 8, outputs).to(dtype)
    owners = torch.arange(7, dtype=torch.int32) % len(rows[1])
    return chosen, [[a, b, rows[2], rows[3], owners], []]


def _gated_experts(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    x, weight = torch.randn(7, 6).to(dtype), torch.randn(5, 8, 6).to(dtype)
    (_, *chosen), adapters = _chosen(dtype, 2, 6, 8)
    bias = torch.randn(5, 8).to(dtype)
    plain, biased = [(x, weight, term, chosen) for term in (None, bias)]
    return [(*plain, adapters[0], [2, 1]), (*biased, adapters[1], [2], 1.7, 0.5), (*biased, adapters[0], [2, 1])]


def _summed_experts(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    inner, weight = torch.randn(14, 4).to(dtype), torch.randn(5, 6, 4).to(dtype)
    (weights, *chosen), adapters = _chosen(dtype, 1, 4, 6)
    bias = torch.randn(5, 6).to(dtype)
    return [
        (inner, weight, term, weights, chosen, own, [2, 1] if own else [2]) for own in adapters for term in (None, bias)
    ]


def _rope_store(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    rows, _, _ = routed(MIXES["some none"])
    owed = owing(torch.randn(7, 3, 32), torch.randn(10, 8, 48).to(dtype), torch.randn(len(RANKS), 2, 48), rows)
    y, bias, norm = torch.randn(7, 48).to(dtype), torch.randn(48).to(dtype), torch.randn(6).to(dtype)
    index = torch.tensor([0, 1, 2, 5, 4, 3, -1], dtype=torch.int32)
    rest = [1e-5, torch.randn(9, 6), index.abs(), index]
    caches = [torch.zeros(3, 4, 2, 6, dtype=dtype) for _ in range(6)]
    partly = [1e-5, torch.randn(9, 4), index.abs(), index]
    whole = torch.randn(24).to(dtype), torch.randn(12).to(dtype)
    return [
        (y, bias, owed, [1, 2, 0, 24, 36, 48], norm, norm, *rest, *caches[:2], 4),
        (y, None, [], [], None, None, *rest, *caches[2:4], 4),
        (y, None, [], [], *whole, *partly, *caches[4:], 4, 1.0),
    ]


def _attention(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [
        (*paged(*CASES["a mixed step"], dtype), 0.3, *rest) for rest in ([0], [3], [3, 1.5], [3, 0.0, torch.randn(4)])
    ]


def _greedy(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(3, 9).to(dtype),)]


def _report(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(3, 9).to(dtype), torch.tensor([8, 0, 4], dtype=torch.int32))]


def _sample(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 9).to(dtype), *columns([(0.0, 0, 1.0, 0.0, 0.2), (0.8, 4, 0.9, 0.1, 0.7)]))]


def _penalise(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    return [(torch.randn(9).to(dtype), torch.tensor([1, 4]), torch.tensor([4, 4, 7]), 1.2, 0.3, 0.4)]


def _allow(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    bits = torch.tensor([[5, 7], [-1, 0]], dtype=torch.int32)
    return [(torch.randn(3, 40).to(dtype), torch.tensor([2, 0]), bits)]


OPS: dict[str, tuple[Any, Callable[[torch.dtype], list[tuple[Any, ...]]]]] = {
    "embed": (embed_op, _embed),
    "embed_shrink": (embed_shrink_op, _embed_shrink),
    "embed_own": (embed_own_op, _embed_own),
    "own_logits": (own_logits_op, _own_logits),
    "own_norm": (own_norm_op, _own_norm),
    "product": (product_op, _product),
    "product_shrink": (product_shrink_op, _product_shrink),
    "shrink": (shrink_op, _shrink),
    "complete": (complete_op, _complete),
    "whole_linear": (whole_linear_op, _whole_linear),
    "rms_norm": (rms_norm_op, _rms_norm),
    "add_norm": (add_norm_op, _add_norm),
    "silu_mul": (silu_mul_op, _silu_mul),
    "gelu_mul": (gelu_mul_op, _silu_mul),
    "choose_experts": (choose_experts_op, _choose),
    "gated_experts": (gated_experts_op, _gated_experts),
    "summed_experts": (summed_experts_op, _summed_experts),
    "rope_store": (rope_store_op, _rope_store),
    "attention": (attention_op, _attention),
    "greedy": (greedy_op, _greedy),
    "report": (report_op, _report),
    "sample": (sample_op, _sample),
    "penalise": (penalise_op, _penalise),
    "allow": (allow_op, _allow),
}


def test_the_list_of_ops_is_complete() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aiolora::")}
    assert registered == set(OPS)


@pytest.mark.parametrize("compiled", [False, True], ids=["reference", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_an_op_says_truly_what_it_returns_and_mutates(name: str, dtype: torch.dtype, compiled: bool) -> None:
    op, cases = OPS[name]
    with kernels(compiled=compiled):
        for case in cases(dtype):
            torch.library.opcheck(op, case)
