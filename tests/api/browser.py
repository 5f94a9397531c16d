"""Headless Chromium by its DevTools protocol: open a page, ask it things, take a picture."""

import asyncio
import base64
import itertools
import shutil
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1440,1000")


class Page:
    """One tab. Keeps the URL of every request that it sends and every error that it logs."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.ensure_future(self._read())
        self.requested: list[str] = []
        self.errors: list[str] = []

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        said = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, script: str, timeout_s: float = 60) -> Any:
        """The expression's first true value."""
        async with asyncio.timeout(timeout_s):
            while not (value := await self.evaluate(script)):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return value

    async def picture(self, file: Path) -> None:
        said = await self.send("Page.captureScreenshot", format="png")
        await asyncio.to_thread(_write, file, base64.b64decode(said["data"]))

    async def leave(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def send(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(msgspec.json.encode({"id": number, "method": method, "params": params}).decode())
        said = await asyncio.wait_for(answer, 60)
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def _read(self) -> None:
        async for text in self._socket:
            said = msgspec.json.decode(text)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requested.append(said["params"]["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.errors.append(str(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.errors.append(said["params"]["entry"]["text"])


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


@asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A tab of a browser whose profile lives in `folder`. Skips where there is no browser."""
    websockets = pytest.importorskip("websockets.asyncio.client")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *_FLAGS,
        f"--user-data-dir={folder}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port_file = folder / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not (port_file.exists() and port_file.read_text().strip()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        port = int(port_file.read_text().splitlines()[0])
        listed = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/json").read())
        target = next(one for one in msgspec.json.decode(listed) if one["type"] == "page")
        async with websockets.connect(target["webSocketDebuggerUrl"], max_size=1 << 26) as socket:
            page = Page(socket)
            try:
                yield page
            finally:
                await page.leave()
    finally:
        process.terminate()
        await process.wait()
