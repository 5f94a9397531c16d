"""The walks are worth something: each planted bug is found by them. `test_engine_property` shows the engine clean."""

import pytest

from tests.engine.mutants import MUTANTS
from tests.engine.walk import NUM_SEEDS, trials


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for trial, run in trials(NUM_SEEDS):
        try:
            run()
        except AssertionError as found:
            print(f"{name}: {trial}: {found}")
            return
    pytest.fail(f"{NUM_SEEDS} seeds do not find {name}")
