"""Adapters over HTTP, row by row: who may load what, what each refusal says, and that nobody else feels any of it."""

import asyncio
import gc
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from aiolora.api import create_app
from aiolora.engine.core import Engine
from aiolora.lora.loader import AdapterWeights
from tests.api.conftest import inside
from tests.conftest import ModelOf
from tests.malformed import TENSORS, malformed
from tests.tiny import make_adapter

PROMPT = {"prompt": [5, 6, 7, 8], "temperature": 0, "ignore_eos": True}
Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def folders(model_of: ModelOf, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(model_of("llama"), folder / f"a{seed}", seed=seed, strength=2.0) for seed in range(4)]


@pytest.fixture
def engine(model_of: ModelOf) -> AsyncLLMEngine:
    room = {"max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 8}
    args = EngineArgs(model=str(model_of("llama")), dtype="float32", device="cpu", enable_lora=True, **room)  # type: ignore[arg-type]
    return AsyncLLMEngine.from_engine_args(args)


@pytest.fixture
async def http(engine: AsyncLLMEngine, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A server that allows it, with the adapter `a0`."""
    monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", "True")
    app = create_app(engine, lora_modules=[LoRARequest("a0", 1, str(folders[0]))], served_model_name="base")
    async with inside(app) as client:
        yield client


async def load(http: Client, name: str, path: Path | str, **fields: object) -> httpx.Response:
    return await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path), **fields})


async def unload(http: Client, name: str) -> httpx.Response:
    return await http.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def complete(http: Client, model: str, max_tokens: int = 8) -> httpx.Response:
    answer = await http.post("/v1/completions", json=PROMPT | {"model": model, "max_tokens": max_tokens})
    assert answer.status_code == 200, answer.text
    return answer


async def text(http: Client, model: str, max_tokens: int = 8) -> str:
    said: str = (await complete(http, model, max_tokens)).json()["choices"][0]["text"]
    return said


async def cards(http: Client) -> dict[str, dict[str, Any]]:
    return {card["version"]: card for card in (await http.get("/v1/lora_adapters")).json()["data"]}


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(5000):
        if holds():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it never came to hold")


def refusal(answer: httpx.Response) -> tuple[int, str | None, str]:
    """Status, param and code of an error in OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["code"]


async def test_an_adapter_is_loaded_served_and_unloaded(http: Client, folders: list[Path]) -> None:
    answer = await load(http, "org/a1", folders[1])
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'org/a1' added successfully")
    assert answer.headers["content-type"].startswith("text/plain")
    assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["base", "a0", "org/a1"]
    assert await text(http, "org/a1") != await text(http, "a0")
    answer = await unload(http, "org/a1")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'org/a1' removed successfully")
    assert refusal(await unload(http, "org/a1")) == (404, None, "adapter_not_found")
    gone = await http.post("/v1/completions", json=PROMPT | {"model": "org/a1"})
    assert refusal(gone) == (404, "model", "model_not_found")
    assert [card["id"] for card in (await cards(http)).values()] == ["a0"]


async def test_its_files_may_vanish_once_it_is_loaded(http: Client, folders: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[1], tmp_path / "a1"))
    assert (await load(http, "a1", folder)).status_code == 200
    shutil.rmtree(folder)
    assert await text(http, "a1")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"lora_path": "x"}, (400, "lora_name", "invalid_value")),
        ({"lora_name": "x"}, (400, "lora_path", "invalid_value")),
        ({"lora_name": "", "lora_path": "x"}, (400, "lora_name", "invalid_value")),
        ({"lora_name": "x", "lora_path": " "}, (400, "lora_path", "invalid_value")),
        ({"lora_name": 5, "lora_path": "x"}, (400, "lora_name", "invalid_value")),
        ({"lora_name": "x", "lora_path": "x", "load_inplace": "yes"}, (400, "load_inplace", "invalid_value")),
        ({"lora_name": "base", "lora_path": "A1"}, (400, None, "adapter_conflict")),
        ({"lora_name": "a0", "lora_path": "A0"}, (400, None, "adapter_conflict")),
        ({"lora_name": "x", "lora_path": "/nowhere/at all"}, (404, None, "adapter_not_found")),
        ({"lora_name": "x", "lora_path": "org/repo"}, (404, None, "adapter_not_found")),
        ({"lora_name": "x", "lora_path": "a\0b"}, (404, None, "adapter_not_found")),
    ],
)
async def test_what_cannot_be_loaded_is_refused_by_its_field(
    http: Client, folders: list[Path], body: dict[str, object], expected: tuple[int, str | None, str]
) -> None:
    places = {"A0": str(folders[0]), "A1": str(folders[1])}
    body = {key: places.get(value, value) if isinstance(value, str) else value for key, value in body.items()}
    answer = await http.post("/v1/load_lora_adapter", json=body)
    assert refusal(answer) == expected
    assert "/nowhere" not in answer.text
    assert [card["id"] for card in (await cards(http)).values()] == ["a0"]


async def test_who_loads_a_name_twice_is_told_of_load_inplace(http: Client, folders: list[Path]) -> None:
    assert "load_inplace" in (await load(http, "a0", folders[0])).json()["error"]["message"]


async def test_a_body_that_is_no_json_is_refused(http: Client) -> None:
    for route in ("load", "unload"):
        answer = await http.post(f"/v1/{route}_lora_adapter", content=b"{")
        assert refusal(answer) == (400, None, "invalid_json")


# ---- broken folders ----


async def test_a_stream_beside_malformed_adapters_says_what_it_says_alone(
    http: Client, folders: list[Path], tmp_path: Path
) -> None:
    alone = await text(http, "a0", 200)
    canary = asyncio.create_task(text(http, "a0", 200))
    answers = {}
    for number, one in enumerate(malformed()):
        folder = Path(shutil.copytree(folders[1], tmp_path / "secret-place" / str(number)))
        one.spoil(folder)
        answers[one.name] = await load(http, f"broken {number}", folder)
        shutil.rmtree(folder)
        if canary.done():
            assert canary.result() == alone
            canary = asyncio.create_task(text(http, "a0", 200))
    assert await canary == alone
    assert len(answers) == len(malformed()) >= 40, "no two have one name"
    for number, one in enumerate(malformed()):
        code = "adapter_not_found" if one.status == 404 else "adapter_unusable"
        assert refusal(answers[one.name]) == (one.status, None, code), one.name
        message = answers[one.name].json()["error"]["message"]
        assert [said for said in (f"'broken {number}'", *one.said) if said not in message] == [], (one.name, message)
        assert "secret-place" not in message
    assert [card["id"] for card in (await cards(http)).values()] == ["a0"]
    assert (await load(http, "broken 0", folders[1])).status_code == 200, "nothing was kept of it"


# ---- in place ----


LONG_PROMPT = [5 + number % 80 for number in range(40)]  # two whole pages for the prefix cache


async def versed(http: Client, model: str) -> tuple[str, str, list[float]]:
    """Digest of the version that answered, what it said, and the log-probabilities of it."""
    answer = await http.post(
        "/v1/completions", json=PROMPT | {"model": model, "prompt": LONG_PROMPT, "max_tokens": 12, "logprobs": 0}
    )
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return answer.headers["x-aiolora-adapter"].split("@")[1], choice["text"], choice["logprobs"]["token_logprobs"]


async def held(engine: AsyncLLMEngine) -> dict[str, object]:
    """All that adapters and requests take, once nothing is under way."""

    def count(core: Engine) -> dict[str, object]:
        adapters, pool = core.adapters, core.scheduler.pool
        residency = adapters._residency
        core.scheduler.check()
        return {
            "host": sorted((version.name, version.nbytes) for version, _ in residency._host.values()),
            "device pages": [kind.num_pages - kind.num_available for kind in residency._pools],
            "KV pages": pool.num_pages - pool.num_available,
            "leases": dict(residency._leases),
            "pinned, retired, arriving": (dict(residency._pinned), set(residency._retired), set(residency._arriving)),
            "going, held, barred": (dict(adapters._going), dict(adapters._holds), set(adapters._barred)),
            "sequences": dict(core._sequences),
        }

    await until_async(lambda: _none_draining(engine))
    gc.collect()
    registry = engine.intake.registry
    return await engine._across.ask(count) | {
        "names": [version.name for version in registry.versions()],
        "ids": sorted(registry._ids) + sorted(registry._name_of_id.values()),
        "streams": (
            dict(engine._streaming._mailboxes),
            dict(engine._streaming._tickets),
            dict(engine._adapters._loading),
        ),
        "weights alive": sum(type(thing) is AdapterWeights for thing in gc.get_objects()),
    }


async def _none_draining(engine: AsyncLLMEngine) -> bool:
    gc.collect()  # requests that nobody holds
    return not any(standing.draining for standing in await engine.lora_standing())


async def until_async(holds: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(500):
        if await holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def test_one_version_answers_all_prompts_of_a_request(
    http: Client, engine: AsyncLLMEngine, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, prepare, mixes = tmp_path / "live", engine.prepare, []
    shutil.copytree(folders[1], place)
    assert (await load(http, "live", place)).status_code == 200
    shutil.copytree(folders[2], place, dirs_exist_ok=True)

    async def prepared(*args: Any, **fields: Any) -> Any:
        request = await prepare(*args, **fields)
        mixes.append(request.mix)
        if len(mixes) == 1:  # another version, between two prompts of one request
            assert (await load(http, "live", place, load_inplace=True)).status_code == 200
        return request

    monkeypatch.setattr(engine, "prepare", prepared)
    answer = await http.post("/v1/completions", json=PROMPT | {"model": "live", "prompt": [[5, 6], [7, 8]]})
    old, *others = (mix.parts[0][0].digest for mix in mixes)
    assert old != engine.intake.registry.find("live").digest
    assert others == [old]
    assert old.startswith(answer.headers["x-aiolora-adapter"].removeprefix("live@"))


async def test_a_hundred_reloads_under_load_never_mix_versions_and_leave_nothing(
    http: Client, engine: AsyncLLMEngine, folders: list[Path], tmp_path: Path
) -> None:
    solo: dict[str, tuple[str, list[float]]] = {}
    for number, folder in enumerate(folders):  # each version alone, under a name of its own, nothing cached
        assert (await load(http, f"solo{number}", folder)).status_code == 200
        digest, said, logprobs = await versed(http, f"solo{number}")
        solo[digest] = said, logprobs
        await unload(http, f"solo{number}")
    assert len({said for said, _ in solo.values()}) == len(folders)

    place = tmp_path / "live"
    for folder in (
        folders[-1],
        folders[0],
    ):  # an earlier version is kept, before and after
        shutil.copytree(folder, place, dirs_exist_ok=True)
        assert (await load(http, "live", place, load_inplace=True)).status_code == 200
    published = {(await versed(http, "live"))[0]}
    await text(http, "a0")
    before, before_mb = await held(engine), resident_mb()
    cached = engine.snapshot().cached_tokens
    seen: list[str] = []
    reloading = True

    async def ask() -> None:
        while reloading:
            digest, said, logprobs = await versed(http, "live")
            assert digest in published
            assert said == solo[digest][0]
            assert logprobs == pytest.approx(solo[digest][1], abs=1e-3), "keys and values of another version"
            seen.append(digest)

    askers = [asyncio.create_task(ask()) for _ in range(4)]
    for number in range(1, 101):
        folder = folders[number % len(folders)]
        shutil.copytree(folder, place, dirs_exist_ok=True)
        published.add(list(solo)[number % len(folders)])  # it may answer before the load says so
        answer = await load(http, "live", place, load_inplace=True)
        assert answer.status_code == 200, answer.text
        assert (await versed(http, "live"))[0] == list(solo)[number % len(folders)], "who asks later gets the new one"
        if number % 5 == 0:
            mark = len(seen) + 4
            await until(lambda mark=mark: len(seen) > mark or any(asker.done() for asker in askers))
    reloading = False
    await asyncio.gather(*askers)
    assert set(seen) == set(solo)
    await versed(http, "live")
    await text(http, "a0")
    assert engine.snapshot().cached_tokens > cached, "the prefix cache was at work"
    assert await held(engine) == before
    assert resident_mb() - before_mb < 32


async def test_a_reload_that_fails_leaves_the_old_version_inside(
    http: Client, folders: list[Path], tmp_path: Path
) -> None:
    before = await complete(http, "a0")
    folder = Path(shutil.copytree(folders[1], tmp_path / "x"))
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    assert refusal(await load(http, "a0", folder, load_inplace=True))[0] == 422
    assert refusal(await load(http, "a0", tmp_path / "none", load_inplace=True))[0] == 404
    after = await complete(http, "a0")
    assert after.headers["x-aiolora-adapter"] == before.headers["x-aiolora-adapter"]
    assert after.json()["choices"] == before.json()["choices"]


# ---- where they are, and pins ----


async def test_modules_of_the_start_are_read_when_a_request_names_them(http: Client, folders: list[Path]) -> None:
    (card,) = (await http.get("/v1/lora_adapters")).json()["data"]
    assert (card["id"], card["digest"], card["version"], card["residency"]) == ("a0", None, None, "disk")
    assert (card["rank"], card["requests"], card["draining"]) == (8, 0, False)
    assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["base", "a0"]
    assert (await http.get("/v1/models/a0")).json()["root"] == str(folders[0])
    assert refusal(await load(http, "a0", folders[1])) == (400, None, "adapter_conflict")
    nbytes = card["bytes"]
    answer = await complete(http, "a0")
    (card,) = (await http.get("/v1/lora_adapters")).json()["data"]
    assert (card["version"], card["residency"]) == (answer.headers["x-aiolora-adapter"], "gpu")
    assert card["bytes"] == nbytes
    assert (await unload(http, "a0")).status_code == 200
    assert (await http.get("/v1/lora_adapters")).json()["data"] == []


async def test_the_list_says_where_an_adapter_is_and_who_needs_it(http: Client, folders: list[Path]) -> None:
    assert (await load(http, "a1", folders[1], pinned=True)).status_code == 200
    await text(http, "a0")
    first, second = (await cards(http)).values()
    assert (first["id"], first["residency"], first["pinned"]) == ("a0", "gpu", False)
    assert (second["id"], second["residency"], second["pinned"]) == ("a1", "cpu", True)
    assert second["version"] == f"a1@{second['digest'][:12]}"
    assert (second["rank"], second["requests"], second["in_use"], second["draining"]) == (8, 0, False, False)
    assert second["bytes"] > 0


async def test_pins_are_set_and_taken_back_by_name(http: Client, folders: list[Path]) -> None:
    assert (await load(http, "org/a1", folders[1])).status_code == 200
    assert (await http.post("/v1/lora_adapters/org/a1/pin")).status_code == 200
    assert [card["pinned"] for card in (await cards(http)).values()] == [False, True]
    refused = await load(http, "a2", folders[2], pinned=True)
    assert refusal(refused) == (422, None, "adapter_unusable")
    assert [card["id"] for card in (await cards(http)).values()] == ["a0", "org/a1"], "it was not kept"
    assert (await http.post("/v1/lora_adapters/org/a1/unpin")).status_code == 200
    assert [card["pinned"] for card in (await cards(http)).values()] == [False, False]
    assert refusal(await http.post("/v1/lora_adapters/nobody/pin")) == (404, None, "adapter_not_found")
    assert (await http.post("/v1/lora_adapters/a0/paint")).status_code == 404


# ---- the switch ----


@pytest.mark.parametrize("said", [None, "0", "false", ""])
async def test_without_the_switch_nothing_changes_and_the_way_to_switch_it_on_is_told(
    engine: AsyncLLMEngine, folders: list[Path], monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    monkeypatch.delenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", raising=False)
    if said is not None:
        monkeypatch.setenv("AIOLORA_ALLOW_RUNTIME_LORA_UPDATING", said)
    app = create_app(engine, lora_modules=[LoRARequest("a0", 1, str(folders[0]))], served_model_name="base")
    async with inside(app) as http:
        for answer in (
            await load(http, "a1", folders[1]),
            await unload(http, "a0"),
            await http.post("/v1/lora_adapters/a0/pin"),
        ):
            assert refusal(answer) == (404, None, "switched_off")
            assert "AIOLORA_ALLOW_RUNTIME_LORA_UPDATING=1" in json.loads(answer.content)["error"]["message"]
        assert [(card["id"], card["pinned"]) for card in (await cards(http)).values()] == [("a0", False)]
