"""Frozen values that refuse what cannot be."""

import pytest

from aiolora.errors import RequestError
from aiolora.types import AdapterVersion, Mix


def version(name: str, *, additive: bool = True) -> AdapterVersion:
    return AdapterVersion(1, name, "0" * 64, "folder", 8, (), 0, additive=additive)


def test_an_adapter_that_is_no_sum_is_served_alone_and_without_a_weight() -> None:
    plain, dora = version("plain"), version("dora", additive=False)
    for parts in [((dora, 1.0),), ((plain, 0.5),), ((plain, 1.0), (version("other"), 0.5))]:
        assert Mix(parts).parts == parts
    for parts in [((dora, 0.5),), ((plain, 1.0), (dora, 1.0))]:
        with pytest.raises(RequestError, match="'dora' is more than a low-rank sum") as caught:
            Mix(parts)
        assert caught.value.param == "lora"
