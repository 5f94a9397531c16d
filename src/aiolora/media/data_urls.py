"""Data URLs: bytes that a request brings itself."""

import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from aiolora.errors import RequestError

_MAX_HEAD = 256  # characters before the comma
_PIECE = 1 << 16  # characters decoded at a time, a multiple of 4: C code keeps the interpreter from others meanwhile


def is_data_url(url: str) -> bool:
    """Whether `url` holds what it stands for."""
    return url[:5].lower() == "data:"


def decoded(url: str, max_nbytes: int, param: str) -> bytes:
    """The bytes that a data URL holds. Raises `RequestError`."""
    comma = url.find(",", 0, _MAX_HEAD)
    if comma < 0:
        raise RequestError(f"the data URL has no comma in its first {_MAX_HEAD} characters", param=param)
    begin = comma + 1
    if len(url) - begin > max_nbytes * 4 // 3 + 4:
        raise RequestError(f"the file is over {max_nbytes} bytes; send a smaller one", param=param)
    pieces = _base64 if url[:comma].lower().endswith(";base64") else _escaped
    try:
        return b"".join(pieces(url, begin))
    except ValueError as error:
        raise RequestError(f"the data URL is no base64: {error}", param=param) from None


def _base64(url: str, begin: int) -> Iterator[bytes]:
    """Raises `ValueError`, also for padding before the end."""
    for at in range(begin, len(url), _PIECE):
        piece = url[at : at + _PIECE]
        if at + _PIECE < len(url) and "=" in piece[-2:]:
            raise binascii.Error("padding before the end")
        yield binascii.a2b_base64(piece, strict_mode=True)


def _escaped(url: str, begin: int) -> Iterator[bytes]:
    while begin < len(url):
        end = begin + _PIECE
        torn = url.find("%", end - 2, end)
        end = end if torn < 0 else torn
        yield unquote_to_bytes(url[begin:end])
        begin = end
