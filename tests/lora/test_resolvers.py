"""The two resolvers that come along: a folder of adapters that nothing leads out of, and listed repositories."""

import os
from pathlib import Path

import pytest

from aiolora.config import Environment
from aiolora.errors import ConfigError
from aiolora.lora.resolver import LoRAResolver
from aiolora.lora.resolvers import FilesystemResolver, HubResolver, choose_resolvers
from tests import HUB


def make(folder: Path) -> Path:
    """What looks like an adapter."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


async def path_of(resolver: LoRAResolver, name: str) -> str | None:
    request = await resolver.resolve_lora("base", name)
    assert request is None or request.lora_name == name
    return request and request.lora_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder of adapters, with one that is none of it beside it."""
    make(tmp_path / "outside")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


async def test_an_adapter_is_found_by_its_folders_name_however_deep(cache: Path) -> None:
    flat, deep = make(cache / "sql"), make(cache / "base-model-name" / "sql-task")
    (cache / "empty").mkdir()
    resolver = FilesystemResolver(cache)
    assert await path_of(resolver, "sql") == str(flat)
    assert await path_of(resolver, "base-model-name/sql-task") == str(deep)
    for name in ("base-model-name", "empty", "missing", "sql/adapter_config.json", "sql" * 80):
        assert await path_of(resolver, name) is None


async def test_a_name_has_one_id_and_names_have_different_ones(cache: Path) -> None:
    make(cache / "a"), make(cache / "b")
    requests = [await FilesystemResolver(cache).resolve_lora("base", name) for name in ("a", "b", "a")]
    ids = [request.lora_int_id for request in requests if request]
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("name", ["../outside", "sql/../../outside", "{}/outside", ".", "", "sql/..", "sql\0", "~/x"])
async def test_names_do_not_lead_out_of_the_folder(cache: Path, name: str) -> None:
    make(cache / "sql")
    assert await path_of(FilesystemResolver(cache), name.format(cache.parent)) is None


async def test_symlinks_do_not_lead_out_of_the_folder_but_may_lead_around_in_it(cache: Path) -> None:
    inside, outside = make(cache / "sql"), cache.parent / "outside"
    (cache / "link").symlink_to(outside)
    (cache / "parent").symlink_to(cache.parent)
    (cache / "alias").symlink_to(inside)
    (cache / "loop").symlink_to(cache / "loop")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        mixed = make(cache / f"mixed-{file}")
        (mixed / file).unlink()
        (mixed / file).symlink_to(outside / file)
    resolver = FilesystemResolver(cache)
    for name in ("link", "parent/outside", "loop", "mixed-adapter_config.json", "mixed-adapter_model.safetensors"):
        assert await path_of(resolver, name) is None, name
    assert await path_of(resolver, "alias") == str(inside)


async def test_the_folder_itself_may_be_a_symlink(cache: Path) -> None:
    inside = make(cache / "sql")
    (cache.parent / "current").symlink_to(cache)
    assert await path_of(FilesystemResolver(cache.parent / "current"), "sql") == str(inside)


async def test_a_listed_repository_or_a_folder_in_it_is_fetched_without_its_other_files(tmp_path: Path) -> None:
    HUB.repositories["listed/loras"] = make(tmp_path / "loras")
    make(tmp_path / "loras" / "tasks" / "sql")
    (tmp_path / "loras" / "tasks" / "sql" / "optimizer.pt").write_bytes(b"never fetched")
    HUB.requests.clear()
    resolver = HubResolver(["listed/loras"])
    found = await path_of(resolver, "listed/loras/tasks/sql")
    assert found
    assert set(os.listdir(found)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum("/resolve/" in path for path in HUB.requests) >= 2
    assert not any("optimizer" in path for path in HUB.requests if "/resolve/" in path)
    assert await path_of(resolver, "listed/loras")
    assert await path_of(resolver, "listed/loras/tasks") is None
    assert await path_of(resolver, "listed/loras/no/such") is None


@pytest.mark.parametrize(
    "name",
    ["other/loras", "listed/lorasx", "listed", "x/listed/loras", "listed/loras/*", "listed/loras/../../other/loras"],
)
async def test_what_is_in_no_listed_repository_is_never_asked_of_the_hub(tmp_path: Path, name: str) -> None:
    HUB.repositories |= {"listed/loras": make(tmp_path / "a"), "other/loras": make(tmp_path / "b")}
    HUB.requests.clear()
    assert await path_of(HubResolver(["listed/loras"]), name) is None
    assert HUB.requests == []


async def test_a_listed_repository_that_cannot_be_had_is_a_failure_not_an_unknown_name() -> None:
    with pytest.raises(FileNotFoundError, match="listed/gone"):
        await HubResolver(["listed/gone"]).resolve_lora("base", "listed/gone")


def said(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Environment:
    for variable, value in variables.items():
        monkeypatch.setenv(f"AIOLORA_{variable}", value)
    return Environment.read()


def test_resolvers_are_chosen_in_the_order_that_is_said(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    settings = {"LORA_RESOLVER_CACHE_DIR": str(cache), "LORA_RESOLVER_HF_REPO_LIST": "org/a, org/b,"}
    assert choose_resolvers(said(monkeypatch, **settings)) == {}
    environment = said(monkeypatch, PLUGINS="lora_hf_hub_resolver,lora_filesystem_resolver")
    assert environment.resolver_hf_repos == ("org/a", "org/b")
    assert list(choose_resolvers(environment)) == ["lora_hf_hub_resolver", "lora_filesystem_resolver"]


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        ("lora_filesystem_resolver", "AIOLORA_LORA_RESOLVER_CACHE_DIR"),
        ("lora_hf_hub_resolver", "AIOLORA_LORA_RESOLVER_HF_REPO_LIST"),
        ("no_such_plugin", "known are: lora_filesystem_resolver, lora_hf_hub_resolver"),
    ],
)
def test_a_choice_that_cannot_work_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, plugin: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        choose_resolvers(said(monkeypatch, PLUGINS=plugin))


def test_plugins_of_others_are_called_when_they_are_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "loras_by_mail-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: loras-by-mail\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[aiolora.general_plugins]\nmail = loras_by_mail:register\nbad = loras_by_mail:nothing\n"
    )
    (tmp_path / "loras_by_mail.py").write_text("calls = []\n\ndef register():\n    calls.append(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_resolvers(said(monkeypatch, PLUGINS="mail")) == {}
    import loras_by_mail  # type: ignore[import-not-found]

    assert loras_by_mail.calls == [1]
    with pytest.raises(ConfigError, match=r"'bad'.*nothing"):
        choose_resolvers(said(monkeypatch, PLUGINS="bad"))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, seconds: str) -> None:
    with pytest.raises(ConfigError, match="AIOLORA_LORA_RESOLVER_TIMEOUT_S"):
        said(monkeypatch, LORA_RESOLVER_TIMEOUT_S=seconds)
