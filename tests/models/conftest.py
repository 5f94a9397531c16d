"""Many engines start here."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def soon_started(few_graphs: None) -> None:
    """See `few_graphs`."""
