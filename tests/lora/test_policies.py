"""Tokens a minute: a bucket of a minute's worth that fills evenly."""

import pytest

from aiolora.errors import AdapterBusyError, RequestError
from aiolora.lora.policies import Policies
from aiolora.types import AdapterPolicy, AdapterVersion, Mix


class Book:
    """Policies under a clock of their own."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.policies = Policies(lambda: self.now_s)


def mix(*names: str) -> Mix:
    return Mix(tuple((AdapterVersion(n, name, "d", "folder", 8, (), 0), 1.0) for n, name in enumerate(names)))


def test_without_a_policy_everything_is_let_in() -> None:
    policies = Book().policies
    for each in (None, mix("sql")):
        policies.charge(each, 10**9)
        policies.check(each)
    assert policies.get("sql") == AdapterPolicy()


def test_requests_are_let_in_while_something_is_left_and_refused_until_it_is_filled_again() -> None:
    book = Book()
    book.policies.put("sql", AdapterPolicy(tokens_per_minute=60))
    book.policies.charge(mix("sql"), 59)
    book.policies.check(mix("sql"))
    book.policies.charge(mix("sql"), 21)
    with pytest.raises(AdapterBusyError, match="'sql': has used its 60 tokens a minute; ask again in 21 s") as refused:
        book.policies.check(mix("sql"))
    assert refused.value.retry_after_s == 21
    book.now_s += 20
    with pytest.raises(AdapterBusyError):
        book.policies.check(mix("sql"))
    book.now_s += 1
    book.policies.check(mix("sql"))


def test_what_is_not_used_is_saved_for_a_minute_only() -> None:
    book = Book()
    book.policies.put("sql", AdapterPolicy(tokens_per_minute=60))
    book.now_s += 3600
    book.policies.charge(mix("sql"), 60)
    with pytest.raises(AdapterBusyError):
        book.policies.check(mix("sql"))


def test_a_mix_is_charged_to_each_of_its_adapters_and_to_no_other() -> None:
    book = Book()
    for name in ("sql", "style", "other"):
        book.policies.put(name, AdapterPolicy(tokens_per_minute=10))
    book.policies.charge(mix("sql", "style"), 10)
    for name in ("sql", "style"):
        with pytest.raises(AdapterBusyError, match=name):
            book.policies.check(mix(name, "other"))
    book.policies.check(mix("other"))


def test_a_new_policy_keeps_what_was_used_and_a_forgotten_name_does_not() -> None:
    book = Book()
    book.policies.put("sql", AdapterPolicy(tokens_per_minute=60))
    book.policies.charge(mix("sql"), 100)
    book.policies.put("sql", AdapterPolicy(tokens_per_minute=120))
    with pytest.raises(AdapterBusyError):
        book.policies.check(mix("sql"))
    book.policies.put("sql", AdapterPolicy(weight=2.0))
    book.policies.check(mix("sql"))
    book.policies.forget("sql")
    assert book.policies.get("sql") == AdapterPolicy()


@pytest.mark.parametrize(
    "wrong", [{"weight": 0}, {"weight": float("nan")}, {"max_concurrency": 0}, {"tokens_per_minute": -1}]
)
def test_a_policy_names_the_field_that_is_out_of_bounds(wrong: dict[str, float]) -> None:
    (field,) = wrong
    with pytest.raises(RequestError, match=f"policy: {field}="):
        AdapterPolicy(**wrong)  # type: ignore[arg-type]
