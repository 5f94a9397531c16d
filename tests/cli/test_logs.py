"""The log for machines: an object a line, the fields of a request in it."""

import json
import logging

import pytest

from aiolora.cli.logs import _Json


def formatted(**more: object) -> dict[str, object]:
    record = logging.LogRecord("aiolora.x", logging.INFO, __file__, 1, "hello %s", ("you",), None)
    record.__dict__.update(more)
    said: dict[str, object] = json.loads(_Json().format(record))
    return said


def test_a_line_is_an_object_with_time_level_and_message() -> None:
    said = formatted()
    assert {"level": "info", "logger": "aiolora.x", "message": "hello you"}.items() <= said.items()
    assert str(said["time"]).endswith("+00:00")


def test_a_requests_fields_stand_in_place_of_its_message() -> None:
    said = formatted(fields={"path": "/x", "status": 200})
    assert {"path": "/x", "status": 200}.items() <= said.items()
    assert "message" not in said


def test_an_exception_is_told(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        said = formatted(exc_info=(ValueError, error, error.__traceback__))
    assert "ValueError: broken" in str(said["exception"])
