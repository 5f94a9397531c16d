import pytest

from aiolora.lora import registry
from aiolora.lora.registry import nearest


def test_among_few_the_nearest_is_found_wherever_it_differs() -> None:
    assert nearest("slq", ["json", "sql"]) == "sql"
    assert nearest("xpirate", ["json", "pirate"]) == "pirate"
    assert nearest("nothing", ["json", "sql"]) is None
    assert nearest("slq", ["json", "sql"], lambda name: name != "sql") is None


def test_among_thousands_few_are_compared_and_a_long_name_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, match = [], registry.difflib.get_close_matches

    def matches(name: str, names: object, n: int) -> list[str]:
        found = list(names)  # type: ignore[call-overload]
        compared.append((len(name), len(found)))
        return match(name, found, n)

    monkeypatch.setattr(registry.difflib, "get_close_matches", matches)
    names = [f"{kind}-{number}" for number in range(5000) for kind in ("sql", "json")]
    assert nearest("sqll-7", names) == "sql-7"
    assert nearest("json" * 1_000_000, names) is None
    assert nearest("other", names) is None
    assert all(length <= 200 and count <= 32 for length, count in compared)
    assert len(compared) == 3
