"""Python's settings while engines run, and as they were afterwards."""

import gc
import math
import sys
import weakref
from collections.abc import Iterator

import pytest

from aiolora import LLM, AsyncLLMEngine, EngineArgs, SamplingParams
from aiolora import llm as llm_module
from aiolora.engine import bridge
from aiolora.engine.interpreter import SWITCH_INTERVAL, Interpreter
from tests.conftest import ModelOf


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Python as it starts, whatever engines other tests have left running."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    gc.unfreeze()
    yield
    sys.setswitchinterval(before)
    gc.unfreeze()


def test_the_last_engine_that_ends_leaves_python_as_the_first_found_it() -> None:
    interpreter, found = Interpreter(), sys.getswitchinterval()
    interpreter.engine_starts()
    interpreter.engine_starts()
    interpreter.engine_ends()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL, rel=0.1)
    interpreter.engine_ends()
    assert sys.getswitchinterval() == found
    assert gc.get_freeze_count() == 0


def test_an_engine_that_ends_beside_another_can_be_collected() -> None:
    interpreter, first = Interpreter(), Circle()
    interpreter.engine_starts()
    interpreter.engine_starts()
    gone = weakref.ref(first)
    del first
    interpreter.engine_ends()
    gc.collect()
    assert gone() is None
    interpreter.engine_ends()


class Circle:
    """What only a collection takes away."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_that_has_grown_old_is_collected_while_an_engine_runs() -> None:
    """A full collection comes with as many new objects as Python's thresholds say, however much the engine holds."""
    interpreter, engine = Interpreter(), [[] for _ in range(1_000_000)]  # type: ignore[var-annotated]
    interpreter.engine_starts()
    circle = Circle()
    gc.collect(1)  # now it is old
    gone = weakref.ref(circle)
    del circle
    several = math.prod(gc.get_threshold()) * 3
    kept = [[] for _ in range(several)]  # type: ignore[var-annotated]
    assert len(kept) < len(engine) / 4, "Python waits for a quarter of what it has counted"
    assert gone() is None
    interpreter.engine_ends()


def test_a_blocking_call_beside_an_engine_keeps_no_garbage() -> None:
    interpreter = Interpreter()
    interpreter.engine_starts()
    circle = Circle()
    gone = weakref.ref(circle)
    del circle
    with interpreter.call():
        gc.collect()
    assert gone() is None
    interpreter.engine_ends()


def test_a_shorter_interval_of_the_application_stays() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL / 4)
    interpreter = Interpreter()
    interpreter.engine_starts()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL / 4, rel=0.1)
    interpreter.engine_ends()


async def test_an_engine_with_a_thread_of_its_own_sets_python_up_and_leaves_it_as_it_was(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "INTERPRETER", Interpreter())
    found = sys.getswitchinterval()
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model=str(model_of("llama")), max_model_len=64)):
        assert sys.getswitchinterval() <= SWITCH_INTERVAL * 1.01
        assert gc.get_freeze_count() > 0
    assert sys.getswitchinterval() == found
    assert gc.get_freeze_count() == 0


def test_a_blocking_call_leaves_out_what_was_alive_before_and_gives_it_back(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_module, "INTERPRETER", Interpreter())
    llm, counts = LLM(str(model_of("llama")), max_model_len=64), []
    advance = llm.engine.advance
    llm.engine.advance = lambda: (counts.append(gc.get_freeze_count()), advance())[1]  # type: ignore[method-assign]
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    assert counts
    assert min(counts) > 10_000, "torch alone has more objects"
    assert gc.get_freeze_count() == 0


def test_a_blocking_call_beside_an_engine_takes_nothing_from_it() -> None:
    interpreter = Interpreter()
    interpreter.engine_starts()
    with interpreter.call():
        pass
    assert gc.get_freeze_count() > 0
    interpreter.engine_ends()
    assert gc.get_freeze_count() == 0
