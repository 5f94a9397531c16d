"""The optional attention of prompts: what it is asked for, and on a card that has it what it answers."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from aiolora.engine.plan import graph_buckets
from aiolora.ops import attention as reference
from aiolora.ops.kernels import attention as kernels
from aiolora.ops.kernels import flash
from tests.kernels.close import assert_near
from tests.kernels.test_attention import CASES, Step, step


@pytest.fixture(autouse=True)
def any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "LEAST", 1)


STEPS = {name: case for name, case in CASES.items() if name != "decoding"}


def tame(made: Step) -> Step:
    """With pages of the cache behind every table's end, as the engine has them."""
    return made._replace(block_tables=made.block_tables % len(made.k_cache))


def asked_as_documented(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    num_splits: int,
) -> Tensor:
    """`flash_attn_with_kvcache` as its documentation has it, by the reference."""
    queries = cu_seqlens_q.diff()
    assert q.dtype == k_cache.dtype == v_cache.dtype
    assert causal
    assert num_splits == 1
    assert int(queries.max()) <= max_seqlen_q <= len(q)
    window = 0 if window_size == (-1, -1) else window_size[0] + 1
    assert window_size[1] in (-1, 0)
    caches = (k_cache.nan_to_num(), v_cache.nan_to_num())
    out = reference.attention(q, *caches, page_table, cache_seqlens, cu_seqlens_q, softmax_scale, window)
    return out.view(q.shape)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A module in the package's place, and the calls that it got."""
    calls: list[Any] = []

    def called(*args: Any, **named: Any) -> Tensor:
        calls.append(named)
        return asked_as_documented(*args, **named)

    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = called  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    flash._function.cache_clear()
    yield calls
    flash._function.cache_clear()


@pytest.mark.parametrize("window", [0, 37])
@pytest.mark.parametrize("case", STEPS)
def test_prompts_are_asked_of_it_when_it_is_there(case: str, window: int, device: str, standing_in: list[Any]) -> None:
    made = tame(step(*STEPS[case], torch.float16, device, window=window))
    out = kernels.attention(*made, 0.2, window)
    assert len(standing_in) == 1
    safe = made._replace(k_cache=made.k_cache.nan_to_num(), v_cache=made.v_cache.nan_to_num())
    assert_near(out, safe.exact(0.2, window))


def test_heads_with_sinks_stay_with_our_own(device: str, standing_in: list[Any]) -> None:
    made, sinks = tame(step([40], [40], torch.float16, device)), torch.linspace(-1, 2, 4, device=device)
    safe = made._replace(k_cache=made.k_cache.nan_to_num(), v_cache=made.v_cache.nan_to_num())
    assert_near(kernels.attention(*made, 0.2, 0, 0.0, sinks), safe.exact(0.2, 0, 0.0, sinks))
    assert standing_in == []


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda device: step(*CASES["decoding"], torch.float16, device), id="one query each"),
        pytest.param(lambda device: step([40], [40], torch.float32, device), id="float32"),
        pytest.param(lambda device: step([40], [40], torch.float16, device, (7, 1), 80), id="heads of 80"),
    ],
)
def test_the_rest_stays_with_our_own(made: Any, device: str, standing_in: list[Any]) -> None:
    kernels.attention(*made(device), 0.2, 0)
    assert standing_in == []


def test_steps_that_graphs_take_stay_with_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert max(bucket.tokens for bucket in graph_buckets(256, 8192, 8, 8)) < flash.LEAST


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_cards_do_not_even_look_for_it(
    capability: tuple[int, int], device: str, standing_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    kernels.attention(*tame(step([40], [40], torch.float16, device)), 0.2, 0)
    assert standing_in == []


def test_a_package_that_cannot_be_loaded_is_not_there(
    device: str, standing_in: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # importing it raises ImportError
    made = tame(step([40], [40], torch.float16, device))
    safe = made._replace(k_cache=made.k_cache.nan_to_num(), v_cache=made.v_cache.nan_to_num())
    assert_near(kernels.attention(*made, 0.2, 0), safe.exact(0.2, 0))


@pytest.mark.parametrize("heads", [(4, 2), (8, 1)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", STEPS)
def test_on_a_card_its_answers_are_the_reference_s(case: str, dim: int, heads: tuple[int, int], device: str) -> None:
    flash._function.cache_clear()
    if device != "cuda" or flash._function(torch.device("cuda")) is None:
        pytest.skip("needs FlashAttention 3 and a card for it")
    made = tame(step(*STEPS[case], torch.bfloat16, device, heads, dim))  # NaN behind each sequence's last key
    safe = made._replace(k_cache=made.k_cache.nan_to_num(), v_cache=made.v_cache.nan_to_num())
    assert_near(kernels.attention(*made, 0.2, 0), safe.exact(0.2, 0))
