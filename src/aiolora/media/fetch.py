"""Files behind http(s) URLs, only from hosts that the operator named."""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin, urlsplit

import anyio

from aiolora.errors import MissingExtraError, RequestError
from aiolora.media.addresses import Addresses, is_public
from aiolora.media.room import Room

if TYPE_CHECKING:
    import httpx  # of an extra

MAX_NBYTES = 20 << 20  # of a file
MAX_TOTAL = 64 << 20  # of the files of a request
ROOM = 512 << 20  # for the files of all requests
MAX_WAITING = 256  # requests of an owner
_MAX_REDIRECTS = 3
_TIMEOUT_S = 10.0  # for all that a request needs, from the first name that is looked up to the last byte
_SIDE_BY_SIDE = 4  # files of a request
ANY = "*"  # every host with a public address


class _Target(NamedTuple):
    """A host, and the URL with the address that was checked in its stead: nobody resolves it a second time."""

    host: str
    netloc: str  # with the port, as the URL has it
    url: str


class Fetcher:
    """Brings what may be fetched, and so much of it. It waits on the loop: a slow host holds nothing that others need.

    `domains`: hosts; "*": all with a public address. `room`: bytes held for all requests together. Owned by the loop.
    Raises `MissingExtraError`.
    """

    def __init__(
        self,
        domains: tuple[str, ...] = (),
        *,
        max_nbytes: int = MAX_NBYTES,
        max_total: int = MAX_TOTAL,
        timeout_s: float = _TIMEOUT_S,
        room: int = ROOM,
    ) -> None:
        self._domains = domains
        self.max_nbytes = max_nbytes
        self._max_total = max_total
        self._timeout_s = timeout_s
        self._room = Room(room, most_waiting=MAX_WAITING)
        self._addresses = Addresses([domain for domain in domains if domain != ANY])
        if domains:
            try:
                import httpx
            except ImportError as error:
                raise MissingExtraError("fetching a URL", "media") from error
            self._tls = httpx.create_ssl_context(trust_env=False)  # 20 ms, hence once

    @asynccontextmanager
    async def files(self, urls: Mapping[str, str], owner: str = "") -> AsyncIterator[dict[str, bytes]]:
        """The files at `urls`, each with the field that it came in; leave when they are no longer needed.

        `owner`: behind whose requests this one waits for room. Raises `MediaBusyError`, and `RequestError`, which tells
        nothing of a host's answer but its status, at the latest after the timeout, which counts no waiting.
        """
        for url, param in urls.items():
            self._named(url, param)
        if not urls:
            yield {}
            return
        most = min(len(urls) * self.max_nbytes, self._max_total)
        with (await self._room.take(owner, most, param=next(iter(urls.values())))).held() as part:
            files = await self._fetched(urls)
            part.keep(sum(map(len, files.values())))
            yield files

    async def _fetched(self, urls: Mapping[str, str]) -> dict[str, bytes]:
        import httpx

        deadline = asyncio.get_running_loop().time() + self._timeout_s
        bodies = {url: io.BytesIO() for url in urls}  # hands out what was written without a copy
        turns = asyncio.Semaphore(_SIDE_BY_SIDE)
        failures: list[
            Exception
        ] = []  # and no group of errors: that leads to itself, and to all that the request holds

        async def bring(client: httpx.AsyncClient, url: str, param: str) -> None:
            try:
                async with asyncio.timeout_at(deadline), turns:
                    await self._bring(client, url, param, bodies)
            except TimeoutError:
                failures.append(RequestError(f"{_shown(url)} took over {self._timeout_s:g} s", param=param))
                group.cancel_scope.cancel()
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()

        # no connection is used twice: two hosts at one address have certificates of their own
        limits = httpx.Limits(max_keepalive_connections=0)
        async with (
            httpx.AsyncClient(timeout=None, trust_env=False, verify=self._tls, limits=limits) as client,
            anyio.create_task_group() as group,
        ):
            for url, param in urls.items():
                group.start_soon(bring, client, url, param)
        if failures:
            try:
                raise failures[0]
            finally:
                failures.clear()  # the error leads to this frame, which must not lead to the error
        return {url: body.getvalue() for url, body in bodies.items()}

    async def _bring(
        self, client: "httpx.AsyncClient", given: str, param: str, bodies: Mapping[str, io.BytesIO]
    ) -> None:
        """Into its place in `bodies`."""
        import httpx

        url, body = given, bodies[given]
        for hop in range(_MAX_REDIRECTS + 1):
            target = await self._target(url, param, first=hop == 0)
            headers = {"Host": target.netloc, "Accept-Encoding": "identity"}
            try:
                async with client.stream(
                    "GET", target.url, headers=headers, extensions={"sni_hostname": target.host}
                ) as response:
                    if response.has_redirect_location:
                        url = urljoin(url, response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise RequestError(f"{_shown(url)} answers {response.status_code}", param=param)
                    async for chunk in response.aiter_raw():  # nothing is unpacked, so nothing bursts
                        body.write(chunk)
                        self._check(body, bodies, param)
                    return
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                if isinstance(error, RequestError):
                    raise
                raise RequestError(f"{_shown(url)} cannot be fetched: {type(error).__name__}", param=param) from None
        raise RequestError(f"{_shown(given)} redirects more than {_MAX_REDIRECTS} times", param=param)

    def _check(self, body: io.BytesIO, bodies: Mapping[str, io.BytesIO], param: str) -> None:
        if body.tell() > self.max_nbytes:
            raise RequestError(f"the file is over {self.max_nbytes} bytes; send a smaller one", param=param)
        if sum(one.tell() for one in bodies.values()) > self._max_total:
            raise RequestError(f"the files of the request are over {self._max_total} bytes; send fewer", param=param)

    def _named(self, url: str, param: str) -> tuple[str, bool]:
        """The host of `url`, and whether the operator named it. Raises `RequestError` where nobody may fetch from."""
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise RequestError("the URL is malformed", param=param) from None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise RequestError("give an http(s) URL without a user, or a data URL", param=param)
        named = host in self._domains
        if not named and ANY not in self._domains:
            raise RequestError(
                f"{host[:200]!r} is no host that may be fetched from; send the file as a data URL, or start with "
                "--allowed-media-domains",
                param=param,
            )
        return host, named

    async def _target(self, url: str, param: str, *, first: bool) -> _Target:
        """What `url` comes to. Raises `RequestError` where nobody may fetch from."""
        host, named = self._named(url, param)
        try:
            address = await self._addresses.of(host)
        except (OSError, UnicodeError):
            raise RequestError(f"{host[:200]!r} cannot be found", param=param) from None
        if not is_public(address) and not (first and named):
            raise RequestError(f"{host[:200]!r} has an address that is not public", param=param)
        parts = urlsplit(url)
        shown = f"[{address}]" if ":" in address else address
        netloc = shown if parts.port is None else f"{shown}:{parts.port}"
        return _Target(host, parts.netloc, parts._replace(netloc=netloc, fragment="").geturl())


def _shown(url: str) -> str:
    return repr(url[:200])
