"""The two resolvers that come along, and the choice among them and those of plugins."""

import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import anyio.to_thread
from anyio import CapacityLimiter

from aiolora.config import Environment
from aiolora.errors import ConfigError
from aiolora.hub import fetch
from aiolora.lora.loader import CONFIG, FILES
from aiolora.lora.resolver import LoRAResolver, may_be_resolved
from aiolora.types import LoRARequest

FILESYSTEM, HUB = "lora_filesystem_resolver", "lora_hf_hub_resolver"
_PLUGINS = "aiolora.general_plugins"
_THREADS = 4  # of each resolver's own: a disk or hub that hangs takes none from those who read adapters


class FilesystemResolver(LoRAResolver):
    """`folder`/NAME, where that holds an adapter. Nothing whose real place is outside `folder` is ever found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = CapacityLimiter(_THREADS)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        return await anyio.to_thread.run_sync(self._find, lora_name, abandon_on_cancel=True, limiter=self._threads)

    def _find(self, name: str) -> LoRARequest | None:
        if not may_be_resolved(name):
            return None
        root = Path(os.path.realpath(self._folder))
        place = Path(os.path.realpath(root / name))
        files = [place, *(place / file for file in FILES)]
        inside = all(Path(os.path.realpath(file)).is_relative_to(root) for file in files)
        if not inside or place == root or not os.path.isfile(place / CONFIG):
            return None
        return LoRARequest(name, _id_of(name), str(place))


class HubResolver(LoRAResolver):
    """`org/repo` or `org/repo/sub/path` of the repositories listed, and no others. Fetches an adapter's two files."""

    def __init__(self, repositories: Sequence[str]) -> None:
        self._repositories = sorted(repositories, key=len, reverse=True)
        self._threads = CapacityLimiter(_THREADS)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Raises `FileNotFoundError` where a listed repository cannot be had."""
        repository = next((name for name in self._repositories if f"{lora_name}/".startswith(f"{name}/")), None)
        if repository is None or not may_be_resolved(lora_name) or any(char in lora_name for char in "*?["):
            return None  # the hub's client reads patterns: a star would fetch the whole repository
        below = lora_name[len(repository) :].lstrip("/")
        folder = await anyio.to_thread.run_sync(
            _fetch, repository, below, abandon_on_cancel=True, limiter=self._threads
        )
        return None if folder is None else LoRARequest(lora_name, _id_of(lora_name), str(folder))


def choose_resolvers(environment: Environment) -> dict[str, LoRAResolver]:
    """What `AIOLORA_PLUGINS` chooses, in its order. Others' plugins are called here and register theirs themselves.

    Raises `ConfigError` for a plugin that is unknown, fails or lacks its variable. Blocks: plugins are imported.
    """
    chosen: dict[str, LoRAResolver] = {}
    for name in environment.plugins:
        if name == FILESYSTEM:
            folder = environment.resolver_cache_dir
            if folder is None or not folder.is_dir():
                raise ConfigError(f"{name} needs AIOLORA_LORA_RESOLVER_CACHE_DIR to be a folder, it is '{folder}'")
            chosen[name] = FilesystemResolver(folder)
        elif name == HUB:
            if not environment.resolver_hf_repos:
                raise ConfigError(f"{name} needs AIOLORA_LORA_RESOLVER_HF_REPO_LIST=org/repo1,org/repo2")
            chosen[name] = HubResolver(environment.resolver_hf_repos)
        else:
            _call_plugin(name)
    return chosen


def _call_plugin(name: str) -> None:
    found = {point.name: point for point in entry_points(group=_PLUGINS)}
    if name not in found:
        known = ", ".join([FILESYSTEM, HUB, *found])
        raise ConfigError(f"AIOLORA_PLUGINS names {name!r}, which is not installed; known are: {known}")
    try:
        found[name].load()()
    except Exception as error:
        raise ConfigError(f"the plugin {name!r} ({found[name].value}) failed: {error!r}") from error


def _fetch(repository: str, below: str) -> Path | None:
    prefix = f"{below}/" if below else ""
    folder = fetch(repository, [prefix + file for file in FILES]) / below
    return folder if os.path.isfile(folder / CONFIG) else None


def _id_of(name: str) -> int:
    """The same id for a name in every process; 63 bits, so that two names meet in one of 10**18 cases."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % (2**63 - 1) + 1
