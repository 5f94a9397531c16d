"""Launches find what was compiled for the same traits, and nothing else."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import get_ident
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime._async_compile import FutureKernel, active_mode

from aiolora.ops.kernels import launch as module
from aiolora.ops.kernels.launch import launch, rehearsal

STREAM = 77


class Param(NamedTuple):
    name: str
    is_constexpr: bool = False
    do_not_specialize: bool = False


class Compiled:
    """Keeps what it is run with: grid, arguments, stream."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self.runs.append((grid, args, stream))


class Jitted:
    """Keeps what it binds: grid, arguments, what was named, and the variant it returned."""

    def __init__(self, *params: Param) -> None:
        self.__name__ = "jitted"
        self.params = list(params)
        self.bound: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any], Compiled]] = []
        self.prepared: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def bind(*args: Any, **named: Any) -> Compiled:
            compiled = Compiled()
            self.bound.append((grid, args, named, compiled))
            return compiled

        return bind

    def warmup(self, *args: Any, grid: tuple[int, ...], **named: Any) -> None:
        self.prepared.append((grid, args, named))


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device, raising=False)


@pytest.fixture
def jitted() -> Jitted:
    free = Param("tokens", do_not_specialize=True)
    return Jitted(Param("x"), Param("width"), free, Param("eps"), Param("BLOCK", True), Param("PDL", True))


def halves(offset: int = 0) -> torch.Tensor:
    return torch.zeros(32, dtype=torch.float16)[offset:]


def call(jitted: Jitted, grid: tuple[int, ...] = (3,), **other: Any) -> None:
    """A launch, `other` than usual in those respects."""
    given = {"x": halves(), "width": 48, "tokens": 5, "eps": 1e-5, "BLOCK": 16, **other}
    args = tuple(given.pop(name) for name in ("x", "width", "tokens", "eps"))
    launch(jitted, grid, args, **given)


def test_the_first_launch_binds(jitted: Jitted) -> None:
    call(jitted, num_warps=8, num_stages=2, pdl=True)
    ((grid, args, named, compiled),) = jitted.bound
    assert (grid, args[1:]) == ((3,), (48, 5, 1e-5))
    assert named == {"BLOCK": 16, "PDL": True, "num_warps": 8, "num_stages": 2, "launch_pdl": True}
    assert compiled.runs == []  # binding has launched it


@pytest.mark.parametrize(("grid", "padded"), [((2,), (2, 1, 1)), ((2, 7), (2, 7, 1)), ((2, 7, 9), (2, 7, 9))])
def test_the_same_traits_run_what_was_compiled(
    jitted: Jitted, grid: tuple[int, ...], padded: tuple[int, int, int]
) -> None:
    call(jitted)
    x = halves()
    call(jitted, grid, x=x, tokens=1, eps=0.5)
    ((*_, compiled),) = jitted.bound
    ((ran, args, stream),) = compiled.runs
    assert args[0] is x
    assert args[1:] == (48, 1, 0.5, 16, False)  # constexprs behind, in their order
    assert (ran, stream) == (padded, STREAM)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(32)},
        {"x": None},
        {"width": 64},
        {"width": 1},
        {"BLOCK": 32},
        {"pdl": True},
        {"num_warps": 8},
        {"num_stages": 4},
    ],
    ids=lambda other: " ".join(other),
)
def test_other_traits_are_another_variant(jitted: Jitted, other: dict[str, Any]) -> None:
    for _ in range(2):
        call(jitted)
        call(jitted, **other)
    (*_, usual), (*_, another) = jitted.bound
    assert len(usual.runs) == len(another.runs) == 1


def test_an_address_off_16_bytes_is_bound_each_time(jitted: Jitted) -> None:
    for offset in (0, 1, 1, 0):
        call(jitted, x=halves(offset))
    aligned, *rest = [compiled.runs for *_, compiled in jitted.bound]
    assert len(aligned) == 1
    assert rest == [[], []]
    call(jitted, x=halves(8))
    assert len(aligned) == 2


def test_any_int_serves_where_nothing_is_specialised(jitted: Jitted) -> None:
    for tokens in (5, 0, 1, 16, 2**31 - 1, -(2**31)):
        call(jitted, tokens=tokens)
    assert len(jitted.bound) == 1


@pytest.mark.parametrize("tokens", [2**31, -(2**31) - 1, 2**63])
def test_an_int_of_another_type_is_another_variant(jitted: Jitted, tokens: int) -> None:
    call(jitted)
    call(jitted, tokens=tokens)
    assert len(jitted.bound) == 2


@pytest.mark.parametrize("name", ["width", "tokens", "eps"])
def test_equal_numbers_of_different_types_are_different_variants(jitted: Jitted, name: str) -> None:
    for value in (1, True, 1.0) * 2:
        call(jitted, **{name: value})
    assert [type(args[["width", "tokens", "eps"].index(name) + 1]) for _, args, *_ in jitted.bound] == [
        int,
        bool,
        float,
    ]


def test_each_card_has_its_own_variant(jitted: Jitted, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (0, 1, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        call(jitted)
    (*_, first), (*_, second) = jitted.bound
    assert first.runs == []
    assert [stream for *_, stream in second.runs] == [STREAM + 1]


def test_the_interpreter_binds_each_time(jitted: Jitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERPRETED", True)
    call(jitted)
    call(jitted)
    assert len(jitted.bound) == 2


def test_constexprs_come_last() -> None:
    with pytest.raises(AssertionError, match="jitted: constexprs come last"):
        launch(Jitted(Param("BLOCK", True), Param("PDL", True), Param("x")), (1,), (halves(),), BLOCK=1)


def test_a_rehearsal_compiles_and_runs_nothing(jitted: Jitted) -> None:
    with rehearsal():
        call(jitted, num_warps=8, pdl=True)
    ((grid, args, named),) = jitted.prepared
    call(jitted, num_warps=8, pdl=True)  # in earnest
    ((*bound, compiled),) = jitted.bound
    assert (grid, args[1:], named) == (bound[0], bound[1][1:], bound[2])
    with rehearsal():
        call(jitted, num_warps=8, pdl=True)
    assert compiled.runs == []
    assert len(jitted.prepared) == 1


def test_a_rehearsal_asks_for_each_variant_once(jitted: Jitted) -> None:
    for _ in range(2):
        with rehearsal():
            for tokens in range(3):
                call(jitted, tokens=tokens)
            call(jitted, width=64)
    assert [args[1] for _, args, _ in jitted.prepared] == [48, 64]


def test_a_rehearsal_asks_each_time_for_an_address_off_16_bytes(jitted: Jitted) -> None:
    with rehearsal():
        for offset in (0, 1, 1):
            call(jitted, x=halves(offset))
    assert len(jitted.prepared) == 3


def test_what_a_rehearsal_compiles_is_made_ready_on_its_card_by_the_thread_that_compiled_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards, bound = {}, []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: cards.update({get_ident(): device}))

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> None:
            bound.append(get_ident())

    kernel, kept = Kernel(), []
    with rehearsal():
        mode = active_mode.get()
        assert mode is not None
        mode.submit("key", lambda: kernel, kept.append)
    assert kept == [kernel]
    assert [cards[thread] for thread in bound] == [3]
    assert get_ident() not in cards


def test_a_rehearsal_is_its_own_threads_alone(jitted: Jitted) -> None:
    with rehearsal(), ThreadPoolExecutor() as other:
        other.submit(call, jitted).result()
    assert len(jitted.bound) == 1
    assert jitted.prepared == []


def test_a_rehearsal_that_fails_is_over(jitted: Jitted) -> None:
    with pytest.raises(ValueError, match="no such step"), rehearsal():
        raise ValueError("no such step")
    call(jitted)
    assert len(jitted.bound) == 1


def test_an_aligned_launch_is_rehearsed_behind_one_off_16_bytes(jitted: Jitted) -> None:
    with rehearsal():
        for offset in (1, 0, 0):
            call(jitted, x=halves(offset))
    assert len(jitted.prepared) == 2


def test_after_a_compilation_that_failed_all_is_rehearsed_anew(jitted: Jitted) -> None:
    def fails() -> None:
        raise RuntimeError("no ptxas")

    def rehearsed() -> None:
        with rehearsal():
            call(jitted)
            mode = active_mode.get()
            assert mode is not None
            mode.submit("key", fails, lambda kernel: None)

    with pytest.raises(RuntimeError, match="no ptxas"):
        rehearsed()
    assert active_mode.get() is None
    with rehearsal():
        call(jitted)
    assert len(jitted.prepared) == 2


def test_a_kernel_that_triton_keeps_as_a_future_is_launched_as_what_it_became(
    jitted: Jitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, done = Compiled(), Future[Compiled]()
    done.set_result(compiled)
    kept = FutureKernel(lambda kernel: None, done)
    monkeypatch.setattr(Jitted, "__getitem__", lambda jitted, grid: lambda *args, **named: kept)
    call(jitted)  # binds
    call(jitted)
    assert len(compiled.runs) == 1
