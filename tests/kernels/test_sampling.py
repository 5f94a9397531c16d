"""The sampling kernels against their references: every token is the same, except where rounding may decide."""

import pytest
import torch
from torch import Tensor

from aiolora.ops import sampling
from aiolora.ops.kernels import sampling as kernels
from aiolora.ops.kernels.launch import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about NaN, in the interpreter

VOCABULARY = 300 if INTERPRETED else 128256
ROWS = 6 if INTERPRETED else 64
Setting = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p

SETTINGS: list[Setting] = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.3, 20, 1.0, 0.0),
    (0.6, 20, 0.95, 0.05),
    (2.0, 0, 1.0, 0.1),
    (1e-7, 5, 0.5, 0.0),
    (0.9, 1, 1.0, 0.0),
    (5.0, 10**6, 0.999, 0.0),
    (0.1, 3, 1e-6, 0.0),
]


def columns(settings: list[Setting], u: Tensor) -> list[Tensor]:
    """What `sample` takes after the logits."""
    temperature, top_k, top_p, min_p = (torch.tensor(column, device=u.device) for column in zip(*settings))
    return [temperature, top_k.int(), top_p, min_p, u]


def logits_of(rows: int, device: str, dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(rows, VOCABULARY, device=device)).to(dtype)


def cumulative(logits: Tensor, setting: Setting) -> Tensor:
    """Of one row [V], over what is kept, by id: sums to 1, in float64."""
    temperature, top_k, top_p, min_p = setting
    x = logits.double()
    probs = (x / temperature).softmax(0)
    probs = probs.where(probs >= min_p * probs.max(), 0)
    values, order = x.sort(descending=True)
    if 0 < top_k < len(x):
        probs = probs.where(x >= values[top_k - 1], 0)
    if top_p < 1:
        inside = (probs[order].cumsum(0) - probs[order]) < top_p * probs.sum()  # of equals the first decides for all
        first = torch.searchsorted(-values, -values)
        probs = torch.zeros_like(probs).scatter_(0, order, probs[order].where(inside[first], 0))
    return probs.cumsum(0) / probs.sum()


def assert_drawn(logits: Tensor, settings: list[Setting], u: Tensor) -> None:
    """Every token of the kernel stands at its u, up to rounding, and is the reference's unless rounding decides."""
    out = kernels.sample(logits, *columns(settings, u))
    assert out.dtype == torch.int32
    same = sampling.sample(logits, *columns(settings, u)) == out
    for row, setting in enumerate(settings):
        token, point = int(out[row]), float(u[row])
        if setting[0] < 1e-6:
            assert token == int(logits[row].argmax())
            continue
        ends = cumulative(logits[row], setting)
        low, high = float(ends[token - 1]) if token else 0.0, float(ends[token])
        assert low - 3e-5 <= point <= high + 3e-5, (row, setting)
        if low + 3e-5 < point < high - 3e-5:
            assert same[row], (row, setting)
    if INTERPRETED:  # so small a vocabulary has few borders
        assert same.all()


def test_greedy_is_the_reference_with_ties_and_padded_rows(device: str, dtype: torch.dtype) -> None:
    padded = logits_of(ROWS, device, dtype)[:, : VOCABULARY - 3]  # rows apart by more than their length
    padded[0, [7, 200, VOCABULARY - 4]] = 50.0
    padded[1] = -torch.inf
    padded[1, 150] = 1.0
    padded[2, VOCABULARY - 4] = 60.0
    tokens, logprobs = kernels.greedy(padded)
    expected = sampling.greedy(padded)
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, expected[0])
    assert tokens[:3].tolist() == [7, 150, VOCABULARY - 4]
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)


def test_report_is_the_reference_and_agrees_with_greedy(device: str, dtype: torch.dtype) -> None:
    logits = logits_of(ROWS, device, dtype)
    logits[0, 9] = -torch.inf
    tokens = torch.randint(0, VOCABULARY, (ROWS,), dtype=torch.int32, device=device)
    tokens[0] = 9
    for asked in (tokens, tokens.long()):
        logprobs, ranks = kernels.report(logits, asked)
        expected = sampling.report(logits, asked)
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-5)
        assert ranks.dtype == torch.int32
        assert torch.equal(ranks, expected[1])
    likeliest, best = kernels.greedy(logits)
    logprobs, ranks = kernels.report(logits, likeliest)
    assert torch.equal(logprobs, best), "to the last bit"
    assert not ranks.any()


def test_a_row_is_served_alike_whoever_is_beside_it(device: str) -> None:
    logits, u = logits_of(4, device, torch.float32), torch.rand(4, device=device)
    settings = SETTINGS[2:6]
    together = kernels.sample(logits, *columns(settings, u))
    logprobs = kernels.greedy(logits)[1]
    for row in range(4):
        alone = logits[row : row + 1]
        assert torch.equal(kernels.sample(alone, *columns(settings[row : row + 1], u[row : row + 1]))[0], together[row])
        assert torch.equal(kernels.greedy(alone)[1][0], logprobs[row])


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_are_those_of_the_reference(device: str, dtype: torch.dtype, setting: Setting) -> None:
    assert_drawn(logits_of(ROWS, device, dtype), [setting] * ROWS, torch.rand(ROWS, device=device))


def test_rows_of_a_batch_each_have_their_own_setting(device: str) -> None:
    assert_drawn(logits_of(len(SETTINGS), device, torch.float32), SETTINGS, torch.rand(len(SETTINGS), device=device))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 100.0])
def test_flat_and_steep_distributions(device: str, spread: float) -> None:
    settings: list[Setting] = [(1.0, 30, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 250, 0.3, 0.5)]
    assert_drawn(spread * logits_of(3, device, torch.float32) - 40, settings, torch.rand(3, device=device))


def test_equals_stay_or_go_together_and_masked_tokens_go(device: str, dtype: torch.dtype) -> None:
    likeliest, likely, others = {5, 100}, {40, 200}, {30, 31, 220}  # ids beyond the first block
    levels = torch.full((VOCABULARY,), -torch.inf)
    for ids, logit in ((likeliest, 2.0), (likely, 1.0), (others, -3.0)):
        levels[[kernels.BLOCK + id_ for id_ in ids]] = logit
    settings: dict[Setting, set[int]] = {
        (1.0, 1, 1.0, 0.0): likeliest,
        (1.0, 3, 1.0, 0.0): likeliest | likely,
        (1.0, 0, 0.3, 0.0): likeliest,
        (1.0, 0, 0.8, 0.0): likeliest | likely,
        (1.0, 0, 1.0, 0.3): likeliest | likely,
        (1.0, 0, 1.0, 0.0): likeliest | likely | others,
        (1.0, 100, 1.0, 0.0): likeliest | likely | others,
    }
    points = [*((i + 0.5) / 64 for i in range(64)), 0.0, 1 - 2**-24, 1.0] if device == "cuda" else [0.0, 0.3, 0.6, 1.0]
    u = torch.tensor(points, device=device)
    for setting, ids in settings.items():
        kept = {kernels.BLOCK + id_ for id_ in ids}
        logits = levels.to(device, dtype).expand(len(points), -1)
        tokens = kernels.sample(logits, *columns([setting] * len(points), u)).tolist()
        assert set(tokens) <= kept, setting
        assert tokens == sorted(tokens[: points.index(0.0)]) + tokens[points.index(0.0) :], "by id"
        assert tokens[points.index(0.0)] == min(kept), setting
        assert tokens[-1] == max(kept), setting


def test_rows_that_are_not_finite_bring_a_token_of_the_vocabulary(device: str, dtype: torch.dtype) -> None:
    logits = logits_of(5, device, dtype)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 8] = torch.inf
    logits[3, VOCABULARY - 1] = torch.nan
    tokens, logprobs = kernels.greedy(logits)
    assert ((tokens >= 0) & (tokens < VOCABULARY)).all()
    assert logprobs.isnan().tolist() == [True] * 4 + [False]
    assert kernels.report(logits, torch.full_like(tokens, 11))[0].isnan().tolist() == [True] * 4 + [False]
    for setting in ((1.0, 0, 1.0, 0.0), (0.8, 5, 0.9, 0.1)):
        drawn = kernels.sample(logits, *columns([setting] * 5, torch.full((5,), 0.7, device=device)))
        assert ((drawn >= 0) & (drawn < VOCABULARY)).all()


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0, 0.0), (0.8, 12, 0.9, 0.01)], ids=str)
def test_frequencies_over_a_grid_of_points_are_the_probabilities(device: str, setting: Setting) -> None:
    count = 4000 if device == "cuda" else 40
    logits = 3 * torch.randn(1, VOCABULARY, device=device)
    u = (torch.arange(count, device=device) + 0.5) / count
    tokens = kernels.sample(logits.expand(count, -1), *columns([setting] * count, u))
    shares = torch.bincount(tokens, minlength=VOCABULARY).double() / count
    temperature, top_k, top_p, _ = setting
    exact = (logits[0].double() / temperature).softmax(0)
    exact[exact < setting[3] * exact.max()] = 0
    if top_k:
        exact[exact < exact.topk(top_k).values[-1]] = 0
    ordered, ids = exact.sort(descending=True)
    exact[ids[ordered.cumsum(0) - ordered >= top_p * exact.sum()]] = 0
    exact /= exact.sum()
    assert (shares - exact).abs().max() <= 1 / count + 1e-5
    assert not shares[exact == 0].any()


def test_no_rows_bring_no_tokens(device: str) -> None:
    logits = torch.empty(0, VOCABULARY, device=device)
    empty = torch.empty(0, device=device)
    assert [len(out) for out in kernels.greedy(logits)] == [0, 0]
    assert [len(out) for out in kernels.report(logits, empty.int())] == [0, 0]
    assert len(kernels.sample(logits, empty, empty.int(), empty, empty, empty)) == 0


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs")
def test_greedy_in_a_cuda_graph_follows_its_input() -> None:
    logits = logits_of(8, "cuda", torch.bfloat16)
    kernels.greedy(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, logprobs = kernels.greedy(logits)
    for _ in range(3):
        logits.copy_(logits_of(8, "cuda", torch.bfloat16))
        graph.replay()
        expected = sampling.greedy(logits)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)
