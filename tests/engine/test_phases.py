import time

import pytest

from aiolora.engine.phases import Phases


def test_phases_follow_each_other_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((10.0, 11.5, 15.0, 15.25))
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    phases = Phases()
    phases.over("kernels")
    phases.over("weights")
    phases.over("kernels")
    assert phases.took == {"kernels": 1.75, "weights": 3.5}
    assert str(phases) == "5.2 s: kernels 1.8, weights 3.5"
