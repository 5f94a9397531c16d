"""One real server for the folder: uvicorn on a free port in a thread of its own, so that clients can leave for real."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from litestar import Litestar
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from aiolora.api import create_app
from aiolora.config import EngineArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest
from tests.tiny import make_adapter

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
BASE = "smollm"
FOLDERS = {name: ADAPTERS / name for name in ("sql", "json", "pirate")}
FOLDERS["e-r1"] = Path(__file__).parents[1] / "data" / "adapters" / "e-r1"
LOADED = tuple(FOLDERS)
TLS = httpx.create_ssl_context(verify=False)  # nobody needs it, and each client would read all certificates anew
_HELLO = [{"role": "user", "content": "hello"}]
GENERATING: dict[str, dict[str, object]] = {  # route -> the least that asks it for three tokens
    "/v1/completions": {"prompt": "hello", "max_tokens": 3, "ignore_eos": True},
    "/v1/chat/completions": {"messages": _HELLO, "max_tokens": 3, "ignore_eos": True},
    "/v1/responses": {"input": "hello", "max_output_tokens": 3, "ignore_eos": True},
}
NAMING = GENERATING | {  # those that take the name of a model
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [5]},
}


class Standing(AsyncLLMEngine):
    """An engine without a model: what a server does to its life, and what it says of its death."""

    def __init__(self, *, started: bool, death: BaseException | None = None) -> None:
        super().__init__(EngineArgs(model="none"))
        self.calls: list[str] = []
        self._is_started, self._is_dead = started, death

    @property
    def started(self) -> bool:
        return self._is_started

    @property
    def death(self) -> BaseException | None:
        return self._is_dead

    async def start(self) -> None:
        self.calls.append("start")
        self._is_started = True

    async def stop(self) -> None:
        self.calls.append("stop")

    def reserve(self, name: str) -> None:
        assert name == "none"


@asynccontextmanager
async def inside(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app` in this very loop, while its lifespan runs. It sees a response when it is whole."""
    up, down = asyncio.Event(), asyncio.Event()

    async def live() -> None:  # in one task, which a fixture's two halves are not
        async with app.lifespan():
            up.set()
            await down.wait()

    life = asyncio.ensure_future(live())
    await asyncio.wait((life, asyncio.ensure_future(up.wait())), return_when=asyncio.FIRST_COMPLETED)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60, verify=TLS) as client:
            yield client
    finally:
        down.set()
        await life


@dataclass(frozen=True)
class Server:
    """Where it listens, and the engine behind it (only its snapshot may be read from here)."""

    url: str
    engine: AsyncLLMEngine


@pytest.fixture(scope="session")
def server(one_thread: None) -> Iterator[Server]:
    args = EngineArgs(
        model="smollm2-135m",
        dtype="float32",
        device="cpu",
        enable_lora=True,
        max_loras=4,
        max_model_len=1024,
        max_num_seqs=64,
        kv_cache_memory=512 << 20,
    )
    engine = AsyncLLMEngine.from_engine_args(args)
    modules = [LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(FOLDERS.items(), start=1)]
    app = create_app(engine, lora_modules=modules, served_model_name=BASE)
    config = uvicorn.Config(app, port=0, http="h11", ws="none", log_level="warning", timeout_graceful_shutdown=5)
    uv = uvicorn.Server(config)
    thread = threading.Thread(target=uv.run, name="server")
    thread.start()
    try:
        while not uv.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        port = uv.servers[0].sockets[0].getsockname()[1]
        yield Server(f"http://127.0.0.1:{port}", engine)
    finally:
        uv.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def three_adapters(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    """Adapters `alpha`, `beta` and `gamma` for `byte_model`."""
    folder = tmp_path_factory.mktemp("three")
    names = ("alpha", "beta", "gamma")
    made = [make_adapter(byte_model, folder / name, seed=seed) for seed, name in enumerate(names)]
    return [LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(zip(names, made), start=1)]


@pytest.fixture
def byte_engine(talking_model: Path) -> AsyncLLMEngine:
    """One that is not started, quick to start, over the bytes of text."""
    return AsyncLLMEngine.from_engine_args(EngineArgs(model=str(talking_model), dtype="float32", enable_lora=True))


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=TLS) as client:
        yield client


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    http = DefaultAsyncHttpxClient(verify=TLS)
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=http
    ) as client:
        yield client
