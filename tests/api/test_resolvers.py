"""An unknown `model` over HTTP: resolved where the operator allows it, and a plain 404 where not."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fsspec.asyn import AsyncFileSystem

from aiolora import AsyncLLMEngine, EngineArgs, SamplingParams
from aiolora.api import create_app
from aiolora.errors import UnknownModelError
from aiolora.lora.request import LoRARequest
from aiolora.lora.resolver import LoRAResolver, LoRAResolverRegistry
from tests import HUB
from tests.api.conftest import inside
from tests.tiny import make_adapter

BASE = "org/bytes"


class S3FileSystem(AsyncFileSystem):
    """A bucket in memory, with the asynchronous faces of s3fs."""

    protocol = "s3"
    cachable = False

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(asynchronous=True)
        self.files = files

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        found = {
            f"{path}/{name.removeprefix(path + '/').split('/')[0]}"
            for name in self.files
            if name.startswith(path + "/")
        }
        infos = [await self._info(name) for name in sorted(found)]
        return infos if detail else [info["name"] for info in infos]

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file"}
        if any(name.startswith(path + "/") for name in self.files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        await asyncio.sleep(0)
        path = self._strip_protocol(rpath)
        if path in self.files:
            _write(Path(lpath), self.files[path])


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


class S3LoRAResolver(LoRAResolver):
    """As users write it."""

    def __init__(self, s3: S3FileSystem, folder: Path) -> None:
        self.s3 = s3
        self.folder = folder
        self.asked: list[str] = []

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        self.asked.append(lora_name)
        s3_path = f"s3://my-bucket/loras/{base_model_name}/{lora_name}"
        local_path = f"{self.folder}/loras/{lora_name}"
        await self.s3._get(s3_path, local_path, recursive=True)
        return LoRARequest(lora_name=lora_name, lora_path=local_path, lora_int_id=abs(hash(lora_name)))


@pytest.fixture(scope="module")
def adapter(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(byte_model, tmp_path_factory.mktemp("adapters") / "adapter", strength=2.0)


@pytest.fixture
def resolver(adapter: Path, tmp_path: Path) -> Any:
    files = {f"my-bucket/loras/{BASE}/sql/{file.name}": file.read_bytes() for file in adapter.iterdir()}
    s3_resolver = S3LoRAResolver(S3FileSystem(files), tmp_path)
    LoRAResolverRegistry.register_resolver("s3_resolver", s3_resolver)
    yield s3_resolver
    LoRAResolverRegistry.remove_resolver("s3_resolver")


@asynccontextmanager
async def serving(byte_model: Path) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncLLMEngine]]:
    HUB.repositories[BASE] = byte_model
    args = EngineArgs(model=BASE, dtype="float32", device="cpu", enable_lora=True, kv_cache_memory=4 << 20)
    engine = AsyncLLMEngine.from_engine_args(args)
    app = create_app(engine)
    async with inside(app) as client:
        yield client, engine


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "True")
    return monkeypatch


async def complete(client: httpx.AsyncClient, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return await client.post("/v1/completions", json=body)


async def test_a_custom_resolver_brings_adapters_for_http_and_for_streams(
    byte_model: Path, allowed: pytest.MonkeyPatch, resolver: S3LoRAResolver
) -> None:
    async with serving(byte_model) as (client, _):
        answers = await asyncio.gather(*(complete(client, "sql") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert resolver.asked == ["sql"]
        assert answers[0].headers["x-aiolora-adapter"].startswith("sql@")
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == [BASE, "sql"]
        assert answers[0].json()["choices"] != (await complete(client, BASE)).json()["choices"]


async def test_a_stream_of_the_library_resolves_as_well(
    byte_model: Path, allowed: pytest.MonkeyPatch, resolver: S3LoRAResolver
) -> None:
    async with serving(byte_model) as (_, engine):
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        assert len([token async for token in engine.stream("Hi", params, lora="sql")]) == 2
        assert len([token async for token in engine.stream("Hi", params, lora={"sql": 0.5})]) == 2
        assert resolver.asked == ["sql"]


async def test_a_resolver_that_fails_is_502_and_hurts_nobody(
    byte_model: Path, allowed: pytest.MonkeyPatch, resolver: S3LoRAResolver
) -> None:
    async with serving(byte_model) as (client, _):
        answer = await complete(client, "not-in-the-bucket")
        assert answer.status_code == 502
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "adapter_not_resolved")
        assert "my-bucket" not in error["message"]
        assert "'s3_resolver' (FileNotFoundError)" in error["message"]
        assert (await complete(client, "sql")).status_code == 200


async def test_without_the_switch_an_unknown_model_is_404_and_no_resolver_is_asked(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, resolver: S3LoRAResolver
) -> None:
    monkeypatch.setenv("AIOLORA_PLUGINS", "no_such_plugin")  # not even looked at
    async with serving(byte_model) as (client, engine):
        answer = await complete(client, "sql")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        with pytest.raises(UnknownModelError):
            await engine.generate("Hi", lora="sql")
    assert resolver.asked == []


async def test_the_filesystem_resolver_serves_a_folder_and_nothing_beside_it(
    byte_model: Path, allowed: pytest.MonkeyPatch, adapter: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(adapter, cache / "base-model-name" / "sql-task")
    (cache / "link").symlink_to(adapter)
    allowed.setenv("AIOLORA_PLUGINS", "lora_filesystem_resolver")
    allowed.setenv("AIOLORA_LORA_RESOLVER_CACHE_DIR", str(cache))
    async with serving(byte_model) as (client, _):
        assert (await complete(client, "base-model-name/sql-task")).status_code == 200
        for name in (
            "link",
            str(adapter),
            f"../{adapter.name}",
            "base-model-name/../link",
            "base-model-name%2fsql-task",
            "%2e%2e/adapter",
            "base-model-name/sql-task\0",
        ):
            answer = await complete(client, name)
            assert answer.status_code == 404, name
            assert answer.json()["error"]["param"] == "model"
        hint = (await complete(client, "base-model-name/sql-tusk")).json()["error"]["message"]
        assert "did you mean 'base-model-name/sql-task'?" in hint


async def test_the_hub_resolver_serves_a_folder_of_a_listed_repository(
    byte_model: Path, allowed: pytest.MonkeyPatch, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "tasks" / "sql")
    HUB.repositories |= {"org/repo1": tmp_path, "org/unlisted": adapter}
    allowed.setenv("AIOLORA_PLUGINS", "lora_hf_hub_resolver")
    allowed.setenv("AIOLORA_LORA_RESOLVER_HF_REPO_LIST", "org/repo1,org/repo2")
    async with serving(byte_model) as (client, _):
        assert (await complete(client, "org/repo1/tasks/sql")).status_code == 200
        assert (await complete(client, "org/repo1/tasks")).status_code == 404
        assert (await complete(client, "org/unlisted")).status_code == 404
        assert (await complete(client, "org/repo2/sql")).status_code == 502, "listed, and not there"
