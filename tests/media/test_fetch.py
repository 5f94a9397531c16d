import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from aiolora.errors import RequestError
from aiolora.media.fetch import ANY, Fetcher

FILE = b"a file of some bytes"


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


def refused(fetcher: Fetcher, url: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        fetcher.bytes_of(url, "messages[0].content[0]")
    assert caught.value.param == "messages[0].content[0]"


def test_data_urls_need_nobodys_leave() -> None:
    for url in ("data:image/png;base64,aGk=", "DATA:;base64,aGk=", "data:,hi", "data:text/plain;charset=utf-8,h%69"):
        assert Fetcher().bytes_of(url, "p") == b"hi"
    for url in ("data:", "data:image/png;base64", "data:;base64,a", "data:;base64,a b="):
        refused(Fetcher(), url, "data URL")
    refused(Fetcher(), "data:" + ";" * 1_000_000 + ",", "first 256 characters")
    refused(Fetcher(max_nbytes=3), "data:;base64," + "aGlo" * 9, "over 3 bytes")


def test_a_host_that_is_named_is_fetched_from_under_its_own_name(site: str) -> None:
    port = site.partition(":")[2]
    assert Fetcher(("127.0.0.1",)).bytes_of(f"http://{site}/a", "p") == FILE
    assert Fetcher(("localhost",)).bytes_of(f"http://localhost:{port}/host", "p") == f"localhost:{port}".encode()


def test_no_other_host_is(site: str) -> None:
    refused(Fetcher(), f"http://{site}/a", "may be fetched")
    refused(Fetcher(("example.com",)), f"http://{site}/a", "--allowed-media-domains")
    refused(Fetcher(("example.com",)), f"http://example.com@{site}/a", "without a user")
    refused(Fetcher(("127.0.0.1",)), f"ftp://{site}/a", "http")
    refused(Fetcher(("127.0.0.1",)), "file:///etc/passwd", "http")
    refused(Fetcher(("127.0.0.1",)), "http://127.0.0.1:99999/", "malformed")
    refused(Fetcher(("127.0.0.1",)), "http://[::1/", "malformed")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "169.254.169.254", "10.0.0.1", "2130706433"]
)
def test_where_all_hosts_are_allowed_those_within_are_not(site: str, host: str) -> None:
    refused(Fetcher((ANY,)), f"http://{host}:{site.partition(':')[2]}/a", "not public|cannot be found")


def test_a_redirect_goes_no_further_than_the_first_request_could_and_never_within(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = Fetcher(("127.0.0.1",))
    refused(fetcher, f"http://{site}/to/http://{site}/a", "not public")
    refused(fetcher, f"http://{site}/to//a", "not public|cannot be found|may be fetched")
    refused(fetcher, f"http://{site}/to/http://example.com/a", "'example.com' is no host")
    refused(fetcher, f"http://{site}/to/file:///etc/passwd", "http")


def test_a_name_that_is_resolved_to_an_address_within_is_refused(monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    port = int(site.partition(":")[2])

    def to_loopback(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", to_loopback)
    refused(Fetcher((ANY,)), f"http://images.example.com:{port}/a", "not public")


def test_a_redirect_to_a_public_address_is_followed_and_not_for_ever(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiolora.media.fetch._is_public", lambda address: True)
    fetcher = Fetcher(("127.0.0.1",))
    assert fetcher.bytes_of(f"http://{site}/to//to/http://{site}/a", "p") == FILE
    refused(fetcher, f"http://{site}/to//to//to//to//to//a", "redirects more than 3 times")


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
def test_an_address_within_is_known_in_every_spelling(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 80))])
    refused(Fetcher((ANY,)), "http://images.example.com/a", "not public")


def test_size_time_and_status_are_bounded(site: str) -> None:
    refused(Fetcher(("127.0.0.1",), max_nbytes=5), f"http://{site}/a", "over 5 bytes")
    refused(Fetcher(("127.0.0.1",), timeout_s=0.2), f"http://{site}/slow", "took over 0.2 s")
    refused(Fetcher(("127.0.0.1",)), f"http://{site}/missing", "answers 404")
    refused(Fetcher(("127.0.0.1",)), "http://127.0.0.1:1/a", "cannot be fetched: ConnectError")
