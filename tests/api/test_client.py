"""The command line's own client against the real server: `chat --url` and `bench serve`."""

import asyncio
import builtins
import csv
from pathlib import Path

import msgspec
import pytest

from aiolora.cli import main
from aiolora.cli.client import Server as Client
from aiolora.cli.client import ServerError
from tests.api.conftest import BASE, LOADED, Server


async def test_models_are_listed(server: Server) -> None:
    assert await Client(server.url).models() == [BASE, *LOADED]


async def test_a_stream_is_the_servers_events(server: Server) -> None:
    body = {"model": BASE, "prompt": "Once", "max_tokens": 5, "ignore_eos": True, "stream": True, "temperature": 0}
    events = [msgspec.json.decode(event) async for event in Client(server.url).stream("/v1/completions", body)]
    assert len(events) == 5
    assert {event["object"] for event in events} == {"text_completion"}


async def test_a_refusal_has_the_servers_words(server: Server) -> None:
    with pytest.raises(ServerError, match="404: the model 'sqll' does not exist; did you mean 'sql'"):
        async for _ in Client(server.url).stream("/v1/completions", {"model": "sqll", "prompt": "x", "stream": True}):
            pass


async def test_a_server_that_breaks_off_is_told() -> None:
    async def breaking(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\ndata:")
        writer.close()

    listening = await asyncio.start_server(breaking, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(ServerError, match="broke off"):
            async for _ in Client(f"http://127.0.0.1:{port}").stream("/", {}):
                pass


def test_chat_talks_to_a_server(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/adapter pirate", "Tell me about a cat.", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    assert main(["chat", "--url", server.url, "--max-tokens", "12", "--temperature", "0"]) == 0
    answer = capsys.readouterr().out
    assert "tokens/s]" in answer
    assert len(answer) > 20


def test_bench_serve_measures_a_server(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    argv = ["bench", "serve", "--url", server.url, "--num-requests", "6", "--input-len", "8", "--output-len", "4"]
    assert main([*argv, "--rate", "100", "--popularity", "distinct", "--csv", str(out)]) == 0
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == set(LOADED)
    assert [row["tokens"] for row in rows] == ["4"] * 6
