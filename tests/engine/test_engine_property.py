"""The engine's books under random load: every answer as if alone, every page and lease accounted for, nobody starves.

`AIOLORA_WALKS=5000` walks longer than CI does.
"""

import os

import pytest

from tests.engine.walk import NUM_SEEDS, PATIENCE_S, second_turns, slow_read, starvation, unwanted_arrival, walk

SEEDS = range(int(os.environ.get("AIOLORA_WALKS", 2 * NUM_SEEDS)))
modes = pytest.mark.parametrize("overlaps", [False, True], ids=["one step at a time", "steps overlap"])


@modes
def test_random_walks_keep_every_invariant_and_every_answer_is_the_one_it_would_get_alone(overlaps: bool) -> None:
    for seed in SEEDS:
        try:
            walk(seed, overlaps=overlaps)
        except Exception as error:
            error.add_note(f"walk(seed={seed}, overlaps={overlaps})")
            raise


@modes
@pytest.mark.parametrize("max_loras", [1, 2])
def test_a_cold_adapter_is_served_in_time_while_hot_ones_keep_coming(max_loras: int, overlaps: bool) -> None:
    waited_s = starvation(max_loras=max_loras, overlaps=overlaps)
    assert waited_s >= PATIENCE_S, "the scenario does not press: the cold adapter got in by luck"


@modes
def test_a_read_that_hangs_holds_up_nobody_else(overlaps: bool) -> None:
    slow_read(overlaps=overlaps)


@modes
def test_an_adapter_given_up_while_it_is_copied_harms_nobody(overlaps: bool) -> None:
    unwanted_arrival(overlaps=overlaps)


@modes
def test_an_invocation_in_an_answer_counts_from_the_next_turn_on(overlaps: bool) -> None:
    second_turns(overlaps=overlaps)
