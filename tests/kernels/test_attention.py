"""Paged attention against the reference in float64: pages shuffled, tables with wild tails, NaN wherever nothing is."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from aiolora.ops import attention as reference
from aiolora.ops.kernels import attention as kernels
from aiolora.ops.kernels import flash
from tests.kernels.close import assert_near

PAGE = 16


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels alone, whatever else is installed."""
    monkeypatch.setattr(flash, "_function", lambda device: None)


class Step(NamedTuple):
    """What attention takes, but scale and window."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    kv_lengths: Tensor
    query_starts: Tensor

    def exact(self, scale: float, window: int, cap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        wide = [x.double() for x in self[:3]]
        return reference.attention(*wide, *self[3:], scale, window, cap, sinks)


def step(
    lengths: list[int],
    queries: list[int],
    dtype: torch.dtype,
    device: str,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    window: int = 0,
) -> Step:
    """A step of sequences with that many keys, the last of which have queries; H and G in `heads`.

    Keys that no query sees, slots behind a sequence's last key and pages of nobody hold NaN, their table entries are
    far outside the cache.
    """
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts) + 3).tolist()
    tables = torch.full((len(lengths), max(counts) + 2), 10**6)
    caches = torch.full((2, sum(counts) + 3, PAGE, heads[1], dim), torch.nan)
    for b, (length, count) in enumerate(zip(lengths, queries)):
        first = max(0, length - count + 1 - window) if window else 0
        for page in range(first // PAGE, counts[b]):
            tables[b, page] = order.pop()
            low, high = max(first - page * PAGE, 0), min(length - page * PAGE, PAGE)
            caches[:, tables[b, page], low:high] = torch.randn(2, high - low, heads[1], dim)
    starts = torch.tensor([0, *queries]).cumsum(0)
    q = torch.randn(sum(queries), heads[0], dim)
    return Step(
        *(x.to(device, dtype) for x in (q, *caches)),
        *(x.to(device, torch.int32) for x in (tables, torch.tensor(lengths), starts)),
    )


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels write to is NaN before."""

    new_empty = Tensor.new_empty

    def filled(*args: Any, **options: Any) -> Tensor:
        made = new_empty(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)


def check(made: Step, window: int = 0, scale: float = 0.2, cap: float = 0.0, sinks: Tensor | None = None) -> None:
    out = kernels.attention(*made, scale, window, cap, sinks)
    assert out.dtype == made.q.dtype
    # the reference multiplies what is not seen by zero: it gets the same caches without NaN, and tables within them
    safe = made._replace(
        k_cache=made.k_cache.nan_to_num(),
        v_cache=made.v_cache.nan_to_num(),
        block_tables=made.block_tables % len(made.k_cache),
    )
    assert_near(out, safe.exact(scale, window, cap, sinks))


CASES = {
    "whole prompts": ([70, 2, 33], [70, 2, 33]),
    "chunks behind a prefix": ([150, 64, 97], [3, 64, 33]),
    "a mixed step": ([90, 1, 130, 65, 16], [1, 1, 130, 7, 1]),
    "decoding": ([1, 64, 65, 130, 16], [1] * 5),
}


@pytest.mark.parametrize(
    ("case", "window"),
    [*((case, window) for case in CASES for window in (0, 37)), *(("a mixed step", w) for w in (1, 1000))],
)
def test_each_query_sees_its_own_sequence_up_to_itself(
    case: str, window: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    check(step(*CASES[case], dtype, device, window=window), window)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: 1 / infinity is meant
@pytest.mark.parametrize("case", ["chunks behind a prefix", "a mixed step"])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.5), (37, 30.0)])
def test_scores_may_have_a_cap(
    case: str, window: int, cap: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    made = step(*CASES[case], dtype, device, window=window)
    check(made, window, cap=cap)
    check(made._replace(q=made.q * 1000), window, cap=cap)


@pytest.mark.parametrize("case", ["chunks behind a prefix", "a mixed step", "decoding"])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (37, 0.0), (0, 30.0)])
def test_each_head_may_have_a_sink(
    case: str, window: int, cap: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    made = step(*CASES[case], dtype, device, (6, 2), window=window)
    for sinks in (torch.linspace(-3, 4, 6, device=device), torch.tensor([9.0, -9, 0, 90, -90, 3], device=device)):
        check(made, window, cap=cap, sinks=sinks)
    check(made, window, cap=cap, sinks=sinks.to(dtype))


@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 128), ((8, 2), 64), ((7, 1), 80), ((2, 1), 256)])
def test_heads_share_keys_in_groups(
    heads: tuple[int, int], dim: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    check(step([40, 70, 20], [1, 50, 1], dtype, device, heads, dim), scale=0.1)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("lengths", [[257, 1030], [513, 256, 3]])
def test_a_long_sequence_is_shared_out(
    lengths: list[int], window: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    monkeypatch.setattr(kernels, "MIN_SPLIT", 64)
    monkeypatch.setattr(kernels, "_splits", lambda tiles, device: 8)
    made = step(lengths, [1] * len(lengths), dtype, device, (6, 2), window=window)
    check(made, window)
    check(made, window, sinks=torch.linspace(-3, 6, 6, device=device))
    assert (kernels._counters(made.q.device) == 0).all()
    out, again = (kernels.attention(*made, 0.2, window) for _ in range(2))
    assert torch.equal(out, again), "parts are added in one order"


def test_a_sequence_is_split_only_as_far_as_there_are_processors(device: str) -> None:
    on = torch.device(device)
    for tiles in (1, 2, 8, 60, 132, 200, 2048):
        splits = kernels._splits(tiles, on)
        assert 1 <= splits <= kernels.MAX_SPLITS
        assert splits == 1 or tiles <= len(kernels._counters(on)), "each has a counter"
    assert kernels._splits(1, on) > 1


@pytest.mark.parametrize("padded", [True, False])
def test_padding_rows_are_zero_and_touch_no_page(
    padded: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode step of a graph: rows without keys, starts that nobody set; or a mixed one with such a row."""
    poisoned(monkeypatch)
    made = step([20, 33, 0, 0] if padded else [20, 0, 40, 40], [1, 1, 1, 1] if padded else [1, 1, 9, 40], dtype, device)
    given = made._replace(query_starts=made.query_starts * 0) if padded else made
    out = kernels.attention(*given, 0.2, 0)
    sunk = kernels.attention(*given, 0.2, 0, 0.0, torch.zeros(4, device=device))
    held = [0, 1] if padded else [0, *range(2, 51)]
    rest = [2, 3] if padded else [1]
    assert (out[rest] == 0).all()
    assert (sunk[rest] == 0).all()
    kept = [0, 1] if padded else [0, 2, 3]
    alone = made._replace(
        q=made.q[held],
        k_cache=made.k_cache.nan_to_num(),
        v_cache=made.v_cache.nan_to_num(),
        block_tables=made.block_tables[kept],
        kv_lengths=made.kv_lengths[kept],
        query_starts=torch.tensor([0, 1, 2] if padded else [0, 1, 10, 50], device=device),
    )
    assert_near(out[held], alone.exact(0.2, 0))


def test_rows_of_nobody_are_left_alone_and_hurt_nobody(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    made = step([20, 37], [1, 30], dtype, device)
    longer = made._replace(q=torch.cat((made.q, torch.full_like(made.q[:3], torch.nan))))
    out = kernels.attention(*longer, 0.2, 0)
    assert torch.equal(out[:31], kernels.attention(*made, 0.2, 0))
    assert out[31:].isnan().all()


def test_many_sequences_of_few_queries(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, sequences in more than one go of the search."""
    monkeypatch.setattr(kernels, "SEARCH", 4)
    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    lengths = [3, 2, 9, 1, 5, 2, 1, 17, 4, 2, 6]
    poisoned(monkeypatch)
    check(step(lengths, [min(length, 4) for length in lengths], dtype, device, (2, 1)))


def test_views_of_larger_tensors(dtype: torch.dtype, device: str) -> None:
    """q inside a fused projection, caches inside one of all layers, tables and lengths inside a buffer."""
    made = step([90, 20, 66], [1, 20, 5], dtype, device)
    tokens = made.q.shape[0]
    wide_q = torch.full((tokens, 8, 64), torch.nan, device=device, dtype=dtype)
    wide_q[:, 2:6] = made.q
    layers = torch.full((2, 3, *made.k_cache.shape), torch.nan, device=device, dtype=dtype)
    layers[:, 1] = torch.stack((made.k_cache, made.v_cache))
    buffer = torch.full((5, 64), 10**6, device=device, dtype=torch.int32)
    buffer[1:4, : made.block_tables.shape[1]] = made.block_tables
    views = made._replace(q=wide_q[:, 2:6], k_cache=layers[0, 1], v_cache=layers[1, 1], block_tables=buffer[1:4, :])
    assert torch.equal(kernels.attention(*views, 0.2, 0), kernels.attention(*made, 0.2, 0))


def test_layouts_it_cannot_read_are_refused(device: str) -> None:
    made = step([5], [1], torch.float32, device)
    with pytest.raises(ValueError, match="one layout"):
        kernels.attention(*made._replace(v_cache=made.v_cache[:, ::2]), 0.2, 0)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.attention(*made._replace(q=made.q[..., ::2]), 0.2, 0)
