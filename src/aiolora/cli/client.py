"""A small HTTP/1.1 client for streams of events: cheap enough to load a server from the same machine.

A client that makes objects of each chunk costs more than the server, and a benchmark would measure that.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from aiolora.errors import AioloraError, ConfigError

_LIMIT = 16 << 20  # bytes of one line or event


class ServerError(AioloraError):
    """The server could not be reached, or refused."""


class Server(Struct, frozen=True):
    """Where an OpenAI-compatible server listens."""

    url: Annotated[str, Meta(description="of the server, such as http://localhost:8000")]
    key: str | None = None

    async def models(self) -> list[str]:
        """What can be asked for, the base first. Raises `ServerError`."""
        async with self._request("GET", "/v1/models", b"") as (status, body):
            data = b"".join([part async for part in body])
        said = _decoded(status, data)
        return [card["id"] for card in said["data"]]

    async def stream(self, path: str, body: object) -> AsyncGenerator[bytes, None]:
        """The data of each event that a POST of `body` as JSON brings, until `[DONE]`. Raises `ServerError`."""
        async with self._request("POST", path, msgspec.json.encode(body)) as (status, parts):
            if status != 200:
                _decoded(status, b"".join([part async for part in parts]))
            left = b""
            async for part in parts:
                *events, left = (left + part).split(b"\n\n")
                for event in events:
                    data = event.removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    if data.startswith(b'{"error"'):
                        _decoded(500, data)
                    yield data
            raise ServerError(f"{self.url}{path}: the stream broke off")

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        where = urlsplit(self.url)
        if where.scheme not in ("http", "https") or where.hostname is None:
            raise ConfigError(f"--url {self.url!r}: give one such as http://localhost:8000")
        secure = where.scheme == "https"
        port = where.port or (443 if secure else 80)
        try:
            reader, writer = await asyncio.open_connection(where.hostname, port, ssl=secure or None, limit=_LIMIT)
        except OSError as error:
            raise ServerError(f"{self.url}: nobody answers ({error}); is the server running?") from None
        key = "" if self.key is None else f"authorization: Bearer {self.key}\r\n"
        head = (
            f"{method} {where.path.rstrip('/')}{path} HTTP/1.1\r\nhost: {where.netloc}\r\nconnection: close\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            status, headers = await _head(reader)
            yield status, _body(reader, headers)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise ServerError(f"{self.url}{path}: the answer broke off ({error})") from None
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
    return int(head[0].split(" ")[1]), headers


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding") != "chunked":
        length = headers.get("content-length")
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _decoded(status: int, data: bytes) -> dict[str, list[dict[str, str]]]:
    """A body of JSON. Raises `ServerError` with the server's own words where it is no good answer."""
    try:
        said = msgspec.json.decode(data)
    except msgspec.DecodeError:
        said = None
    if status != 200 or not isinstance(said, dict):
        words = said["error"]["message"] if isinstance(said, dict) and "error" in said else data[:200].decode("latin-1")
        raise ServerError(f"the server answered {status}: {words}")
    return said
