"""The bytes behind a URL: of a data URL by decoding, of http(s) only from hosts that the operator named."""

import base64
import binascii
import ipaddress
import socket
import time
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from msgspec import Struct

from aiolora.errors import MissingExtraError, RequestError

MAX_NBYTES = 20 << 20  # of a file
_MAX_REDIRECTS = 3
_TIMEOUT_S = 10.0  # for the whole of it
_MAX_HEAD = 256  # characters of a data URL before its comma
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
ANY = "*"  # every host with a public address


class _Target(NamedTuple):
    """A host, and the URL with the address that was checked in its stead: nobody resolves it a second time."""

    host: str
    netloc: str  # with the port, as the URL has it
    url: str


class Fetcher(Struct, frozen=True):
    """What may be fetched, and how much of it. Any thread."""

    domains: tuple[str, ...] = ()  # hosts; "*": all with a public address
    max_nbytes: int = MAX_NBYTES
    timeout_s: float = _TIMEOUT_S

    def bytes_of(self, url: str, param: str) -> bytes:
        """The file at `url`; blocks. Raises `RequestError`, which tells nothing of a host's answer but its status."""
        if url[:5].lower() == "data:":
            return self._decoded(url, param)
        return self._fetched(url, param)

    def _decoded(self, url: str, param: str) -> bytes:
        comma = url.find(",", 0, _MAX_HEAD)
        if comma < 0:
            raise RequestError(f"the data URL has no comma in its first {_MAX_HEAD} characters", param=param)
        head, rest = url[:comma], url[comma + 1 :]
        if len(rest) > self.max_nbytes * 4 // 3 + 4:
            raise self._too_large(param)
        try:
            if head.lower().endswith(";base64"):
                return base64.b64decode(rest, validate=True)
            return unquote_to_bytes(rest)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"the data URL is no base64: {error}", param=param) from None

    def _fetched(self, url: str, param: str) -> bytes:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("fetching a URL", "media") from error
        deadline = time.monotonic() + self.timeout_s
        for hop in range(_MAX_REDIRECTS + 1):
            target = self._target(url, param, first=hop == 0)
            try:
                with (
                    httpx.Client(timeout=self.timeout_s, trust_env=False) as client,
                    client.stream(
                        "GET",
                        target.url,
                        headers={"Host": target.netloc, "Accept-Encoding": "identity"},
                        extensions={"sni_hostname": target.host},
                    ) as response,
                ):
                    if response.has_redirect_location:
                        url = urljoin(url, response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise RequestError(f"{_shown(url)} answers {response.status_code}", param=param)
                    body = bytearray()
                    for chunk in response.iter_raw():  # nothing is unpacked, so nothing bursts
                        body += chunk
                        if len(body) > self.max_nbytes:
                            raise self._too_large(param)
                        if time.monotonic() > deadline:
                            raise RequestError(f"{_shown(url)} took over {self.timeout_s:g} s", param=param)
                    return bytes(body)
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                if isinstance(error, RequestError):
                    raise
                raise RequestError(f"{_shown(url)} cannot be fetched: {type(error).__name__}", param=param) from None
        raise RequestError(f"{_shown(url)} redirects more than {_MAX_REDIRECTS} times", param=param)

    def _target(self, url: str, param: str, *, first: bool) -> "_Target":
        """What `url` comes to. Raises `RequestError` where nobody may fetch from."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise RequestError("the URL is malformed", param=param) from None
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.password:
            raise RequestError("give an http(s) URL without a user, or a data URL", param=param)
        named = host in self.domains
        if not named and ANY not in self.domains:
            raise RequestError(
                f"{host[:200]!r} is no host that may be fetched from; send the file as a data URL, or start with "
                "--allowed-media-domains",
                param=param,
            )
        address = self._address(host, port or (443 if parts.scheme == "https" else 80), param)
        if not _is_public(address) and not (first and named):
            raise RequestError(f"{host[:200]!r} has an address that is not public", param=param)
        shown = f"[{address}]" if ":" in address else address
        netloc = shown if port is None else f"{shown}:{port}"
        return _Target(host, parts.netloc, parts._replace(netloc=netloc, fragment="").geturl())

    def _address(self, host: str, port: int, param: str) -> str:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise RequestError(f"{host[:200]!r} cannot be found", param=param) from None
        return str(found[0][4][0]).partition("%")[0]

    def _too_large(self, param: str) -> RequestError:
        return RequestError(f"the file is over {self.max_nbytes} bytes; send a smaller one", param=param)


def _is_public(address: str) -> bool:
    """Not of the own machine or network, however it is written (an IPv6 address may carry one of IPv4)."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in _NAT64:
            embedded.append(ipaddress.IPv4Address(parsed.packed[-4:]))
        if any(one is not None and not one.is_global for one in embedded):
            return False
    return parsed.is_global and not parsed.is_multicast


def _shown(url: str) -> str:
    return repr(url[:200])
