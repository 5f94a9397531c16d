"""The walks are worth something: each planted bug is found by them. `test_engine_property` shows the engine clean."""

import pytest

from tests.engine.mutants import MUTANTS
from tests.engine.walk import trials

MOST_SEEDS = 1000  # most bugs are found by a few walks; that weights are no part of a prefix key by a hundred or so


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for trial, run in trials(MOST_SEEDS):
        try:
            run()
        except AssertionError as found:
            print(f"{name}: {trial}: {found}")
            return
    pytest.fail(f"{MOST_SEEDS} seeds do not find {name}")
