import asyncio
import contextlib
import gc
import http.server
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from aiolora.errors import RequestError
from aiolora.media.addresses import LOOK_UPS, Addresses
from aiolora.media.fetch import ANY, Fetcher

FILE = b"a file of some bytes"
RAN_DRY: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = 200, {}, FILE
        if self.path.startswith("/to/"):
            status, headers, body = 302, {"location": self.path[4:]}, b""
        elif self.path == "/missing":
            status = 404
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
            return
        elif self.path == "/drip":
            for number in range(100):
                self.wfile.write(b"HTTP/1.0 200 OK\r\n" if not number else b"x: y\r\n")
                time.sleep(0.05)
            RAN_DRY.append(self.path)
        elif self.path == "/host":
            body = self.headers["Host"].encode()
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked has gone
            super().handle()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def fetched(fetcher: Fetcher, url: str, owner: str = "") -> bytes:
    async with fetcher.files({url: "p"}, owner) as files:
        return files[url]


async def refused(fetcher: Fetcher, url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        async with fetcher.files({url: "messages[0].content[0]"}):
            pass
    assert caught.value.param == "messages[0].content[0]"


async def test_a_host_that_is_named_is_fetched_from_under_its_own_name(site: str) -> None:
    port = site.partition(":")[2]
    assert await fetched(Fetcher(("127.0.0.1",)), f"http://{site}/a") == FILE
    assert await fetched(Fetcher(("localhost",)), f"http://localhost:{port}/host") == f"localhost:{port}".encode()


async def test_no_other_host_is(site: str) -> None:
    await refused(Fetcher(), f"http://{site}/a", "may be fetched")
    await refused(Fetcher(("example.com",)), f"http://{site}/a", "--allowed-media-domains")
    await refused(Fetcher(("example.com",)), f"http://example.com@{site}/a", "without a user")
    await refused(Fetcher(("127.0.0.1",)), f"ftp://{site}/a", "http")
    await refused(Fetcher(("127.0.0.1",)), "file:///etc/passwd", "http")
    await refused(Fetcher(("127.0.0.1",)), "http://127.0.0.1:99999/", "malformed")
    await refused(Fetcher(("127.0.0.1",)), "http://[::1/", "malformed")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "169.254.169.254", "10.0.0.1", "2130706433"]
)
async def test_where_all_hosts_are_allowed_those_within_are_not(site: str, host: str) -> None:
    await refused(Fetcher((ANY,)), f"http://{host}:{site.partition(':')[2]}/a", "not public|cannot be found")


async def test_a_redirect_goes_no_further_than_the_first_request_could_and_never_within(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = Fetcher(("127.0.0.1",))
    await refused(fetcher, f"http://{site}/to/http://{site}/a", "not public")
    await refused(fetcher, f"http://{site}/to//a", "not public|cannot be found|may be fetched")
    await refused(fetcher, f"http://{site}/to/http://example.com/a", "'example.com' is no host")
    await refused(fetcher, f"http://{site}/to/file:///etc/passwd", "http")


async def test_a_name_that_is_resolved_to_an_address_within_is_refused(
    monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    port = int(site.partition(":")[2])

    def to_loopback(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", to_loopback)
    await refused(Fetcher((ANY,)), f"http://images.example.com:{port}/a", "not public")


async def test_a_redirect_to_a_public_address_is_followed_and_not_for_ever(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiolora.media.fetch.is_public", lambda address: True)
    fetcher = Fetcher(("127.0.0.1",))
    assert await fetched(fetcher, f"http://{site}/to//to/http://{site}/a") == FILE
    await refused(fetcher, f"http://{site}/to//to//to//to//to//a", "redirects more than 3 times")


@pytest.mark.parametrize(
    "address",
    [
        "::ffff:127.0.0.1",
        "::ffff:10.1.2.3",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "fe80::1",
        "fd00::1",
        "::",
        "224.0.0.1",
    ],
)
async def test_an_address_within_is_known_in_every_spelling(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 80))])
    await refused(Fetcher((ANY,)), "http://images.example.com/a", "not public")


async def test_size_time_and_status_are_bounded(site: str) -> None:
    await refused(Fetcher(("127.0.0.1",), max_nbytes=5), f"http://{site}/a", "over 5 bytes")
    await refused(Fetcher(("127.0.0.1",)), f"http://{site}/missing", "answers 404")
    await refused(Fetcher(("127.0.0.1",)), "http://127.0.0.1:1/a", "cannot be fetched: ConnectError")
    two = {f"http://{site}/a": "p", f"http://{site}/b": "p"}
    async with Fetcher(("127.0.0.1",)).files(two) as files:
        assert list(files.values()) == [FILE, FILE]
    with pytest.raises(RequestError, match="files of the request are over 39 bytes"):
        async with Fetcher(("127.0.0.1",), max_total=2 * len(FILE) - 1).files(two):
            pass


@pytest.mark.parametrize("path", ["slow", "drip"])
async def test_one_deadline_holds_for_headers_and_body_however_steadily_they_come(site: str, path: str) -> None:
    await refused(Fetcher(("127.0.0.1",), timeout_s=0.2), f"http://{site}/{path}", "took over 0.2 s")
    assert not RAN_DRY


async def test_a_silent_name_server_is_waited_for_until_the_deadline_and_holds_one_thread_a_host(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer, port = [], threading.Event(), int(site.partition(":")[2])

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        if host != "localhost":
            answer.wait()
        return [(0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    fetcher = Fetcher(("localhost", ANY), timeout_s=0.2, room=1 << 40)
    urls = [f"http://silent.example.com:{port + number}/a" for number in range(3)]
    try:
        await asyncio.gather(*(refused(fetcher, url, "took over 0.2 s") for url in urls))
        assert asked == ["silent.example.com"]
        others = [asyncio.ensure_future(fetched(fetcher, f"http://h{n}.example.com/")) for n in range(2 * LOOK_UPS)]
        assert await fetched(fetcher, f"http://localhost:{port}/a") == FILE, "a host that is named waits for no other"
        for other in others:
            with pytest.raises(RequestError, match="took over"):
                await other
        assert len(asked) <= 2 + LOOK_UPS
    finally:
        answer.set()


@pytest.mark.parametrize("path", ["missing", "host"])
async def test_an_error_keeps_nobody_alive_who_has_got_it(site: str, path: str) -> None:
    """It leads to the frames of who waited, so to their requests: nothing of it may wait for a collection."""

    async def failing() -> "weakref.ref[Exception]":
        try:
            await fetched(Fetcher(["127.0.0.1"], max_nbytes=2), f"http://{site}/{path}")
        except RequestError as error:
            return weakref.ref(error)
        raise AssertionError("it is fetched")

    gc.disable()
    try:
        error = await failing()
        for _ in range(10):
            await asyncio.sleep(0)
        assert error() is None
    finally:
        gc.enable()


async def test_requests_hold_no_more_than_there_is_room_for_until_their_files_are_done_with(site: str) -> None:
    url, held = f"http://{site}/a", asyncio.Event()
    fetcher = Fetcher(("127.0.0.1",), max_nbytes=len(FILE), room=2 * len(FILE))

    async def hold() -> None:
        async with fetcher.files({url: "p"}, "one"):
            held.set()
            await asyncio.sleep(60)

    holding = asyncio.ensure_future(hold())
    await held.wait()
    second = asyncio.ensure_future(fetched(fetcher, url, "one"))
    assert await fetched(fetcher, url, "other") == FILE
    assert not second.done()
    holding.cancel()
    assert await second == FILE
    await refused(fetcher, f"http://{site}/missing", "answers 404")
    assert await asyncio.gather(*(fetched(fetcher, url) for _ in range(3))) == [FILE] * 3


async def test_what_a_file_does_not_take_is_free_once_it_is_there(site: str) -> None:
    url = f"http://{site}/a"
    fetcher = Fetcher(("127.0.0.1",), max_nbytes=100, room=200 + len(FILE))
    async with fetcher.files({url: "p"}, "one"), fetcher.files({url: "p"}, "other"):
        assert await fetched(fetcher, url, "a third") == FILE


async def test_a_look_up_that_nobody_waits_for_any_more_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = [], threading.Event()

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        answer.wait(60)
        return [(0, 0, 0, "", ("192.0.2.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    addresses = Addresses([])
    silent = [asyncio.ensure_future(addresses.of(f"silent{number}")) for number in range(LOOK_UPS)]
    queued = [asyncio.ensure_future(addresses.of(host)) for host in ("left", "left", "shared", "shared")]
    while len(asked) < LOOK_UPS:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for task in (*silent[1:], *queued[:3]):
        task.cancel()
    await asyncio.sleep(0.01)
    again = asyncio.ensure_future(addresses.of("silent1"))
    answer.set()
    assert await asyncio.gather(silent[0], queued[3], again) == ["192.0.2.1"] * 3
    assert sorted(asked) == sorted([*(f"silent{number}" for number in range(LOOK_UPS)), "shared"])
    assert await addresses.of("left") == "192.0.2.1", "who asks anew is answered"
