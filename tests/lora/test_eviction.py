"""The rule of eviction."""

import pytest

from aiolora.lora.eviction import FROM_DISK, worth


def test_at_equal_cost_the_least_recently_used_is_worth_least() -> None:
    assert worth(1, age=9) < worth(1, age=2) < worth(1, age=1)


def test_at_equal_age_the_cheapest_to_bring_back_is_worth_least() -> None:
    assert worth(1, age=5) < worth(FROM_DISK, age=5)


@pytest.mark.parametrize("times", [2, 8, 100])
def test_what_costs_k_times_as_much_outlasts_k_times_as_many_uses_of_others_and_no_more(times: int) -> None:
    assert worth(times, age=3 * times - 1) > worth(1, age=3) > worth(times, age=3 * times + 1)
