"""Clients as they are, each against a real server with adapters as models. What is not installed is skipped.

Their versions of common packages differ from ours: `make clients` gives them an environment of their own.
"""

from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.api.conftest import Server, server

__all__ = ["server"]

HI: list[Any] = [{"role": "user", "content": "Anna is 31 years old and lives in Rome."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "warm": {"type": "boolean"}},
            "required": ["city", "warm"],
            "additionalProperties": False,
        },
    },
}


class Flag(BaseModel):
    """Whether it is on, and how much."""

    on: bool
    level: Literal["low", "high"]  # a small model may never end a number


@pytest.fixture(scope="session")
def url(server: Server) -> str:
    return f"{server.url}/v1"
