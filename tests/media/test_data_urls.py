import base64
from urllib.parse import quote_from_bytes

import pytest

from aiolora.errors import RequestError
from aiolora.media.data_urls import _PIECE, decoded


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,aGk=", "DATA:;base64,aGk=", "data:,hi", "data:text/plain;charset=utf-8,h%69"]
)
def test_data_urls_are_decoded(url: str) -> None:
    assert decoded(url, 100, "p") == b"hi"


@pytest.mark.parametrize("nbytes", [0, 1, _PIECE // 4 * 3 - 1, _PIECE // 4 * 3, _PIECE, 3 * _PIECE + 5])
def test_long_ones_are_decoded_piece_by_piece(nbytes: int) -> None:
    data = bytes(range(256)) * (nbytes // 256 + 1)
    data = data[:nbytes]
    assert decoded("data:;base64," + base64.b64encode(data).decode(), 1 << 20, "p") == data
    for at in range(3):
        escaped = "data:," + "x" * at + quote_from_bytes(data)
        assert decoded(escaped, 1 << 20, "p") == b"x" * at + data


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:", "data URL"),
        ("data:image/png;base64", "data URL"),
        ("data:;base64,a", "no base64"),
        ("data:;base64,a b=", "no base64"),
        ("data:;base64," + "A" * (_PIECE - 2) + "==" + "aGk=", "no base64"),
        ("data:" + ";" * 1_000_000 + ",", "first 256 characters"),
        ("data:;base64," + "aGlo" * (1 << 18), "over 102400 bytes"),
    ],
)
def test_what_is_none_is_refused(url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        decoded(url, 100 << 10, "messages[0].content[0]")
    assert caught.value.param == "messages[0].content[0]"
