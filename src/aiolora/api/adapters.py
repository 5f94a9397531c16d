"""Adapters come and go over HTTP, where the operator allows it, and where each of them is."""

import os
from typing import Literal, TypeAlias

import anyio.to_thread
from litestar import MediaType, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from msgspec import Struct

from aiolora.api.access import ADMIN
from aiolora.api.decode import parse
from aiolora.api.errors import HTTPRequest, SwitchedOffError
from aiolora.api.serving import Served
from aiolora.config import Environment
from aiolora.engine.adapters import AdapterStanding
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.errors import AdapterConflictError, AdapterMemoryError, AdapterNotFoundError, RequestError
from aiolora.types import AdapterPolicy, AnnouncedAdapter, LoRARequest

_DONE = {"pin": "pinned", "unpin": "unpinned", "alias": "", "rollback": "", "policy": "limited"}  # verb -> its success

Allowed: TypeAlias = NamedDependency[Environment]  # what the operator switched on when the app was made


class LoadAdapter(Struct, frozen=True):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str  # a folder of the server; a hub repository where the operator allows those
    load_inplace: bool = False
    pinned: bool = False
    policy: AdapterPolicy | None = None


class UnloadAdapter(Struct, frozen=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class Alias(Struct, frozen=True):
    """POST /v1/lora_adapters/NAME/alias."""

    alias: str


class RollBack(Struct, frozen=True):
    """POST /v1/lora_adapters/NAME/rollback; a body is not needed."""

    digest: str | None = None  # or its beginning: to that version or not at all


class AdapterCard(Struct, frozen=True, kw_only=True):
    """One version: its name stands for it, or (draining) requests under way still run with it."""

    id: str
    digest: str | None  # None: never read so far
    version: str | None  # NAME@DIGEST12, as in the header of a response
    rank: int
    bytes: int  # of its pages on the device
    residency: Literal["gpu", "cpu", "disk"]
    pinned: bool
    in_use: bool
    requests: int
    draining: bool
    loaded_at: int
    earlier: str | None  # NAME@DIGEST12 that a roll-back would bring back
    aliases: list[str]
    policy: AdapterPolicy
    object: Literal["lora_adapter"] = "lora_adapter"


class AdapterList(Struct, frozen=True):
    """All cards."""

    data: list[AdapterCard]
    object: Literal["list"] = "list"


@post(
    "/v1/load_lora_adapter",
    status_code=200,
    operation_id="load_lora_adapter",
    tags=["adapters"],
    media_type=MediaType.TEXT,
    opt=ADMIN | {"reads": LoadAdapter, "fails": (404, 422)},
)
async def load_lora_adapter(request: HTTPRequest, serving: Served, environment: Allowed) -> Response[str]:
    """Read and check an adapter whole, then serve it. `load_inplace` replaces; what fails leaves the old one serving.

    A new adapter that cannot be pinned as `pinned` wishes is not kept; one that replaces is kept, and 422 says so.
    """
    _check_switch(environment)
    said = parse(LoadAdapter, await request.body())
    name, engine = _filled("lora_name", said.lora_name), serving.engine
    _filled("lora_path", said.lora_path)
    number = engine.intake.registry.number(name)
    engine.intake.registry.check(name, number)
    known = engine.intake.registry.named(name) is not None
    if known and not said.load_inplace:
        raise AdapterConflictError(name, "is already loaded; set load_inplace to true to replace it")
    if not environment.hub_adapters and not await anyio.to_thread.run_sync(_is_folder, said.lora_path):
        raise AdapterNotFoundError(name, f"no adapter found at {said.lora_path!r}: it is no folder of the server")
    lora = LoRARequest(name, number, said.lora_path, load_inplace=said.load_inplace)
    await engine.add_lora(lora, policy=said.policy)
    if said.pinned:
        try:
            await engine.pin_lora(name)
        except AdapterMemoryError:
            if not known:
                await engine.remove_lora(name)
            raise
    return Response(f"Success: LoRA adapter '{name}' added successfully", media_type=MediaType.TEXT)


@post(
    "/v1/unload_lora_adapter",
    status_code=200,
    operation_id="unload_lora_adapter",
    tags=["adapters"],
    media_type=MediaType.TEXT,
    opt=ADMIN | {"reads": UnloadAdapter, "fails": (404,)},
)
async def unload_lora_adapter(request: HTTPRequest, serving: Served, environment: Allowed) -> Response[str]:
    """Forget an adapter, or an alias. Requests under way finish on it, and what it takes is free after the last."""
    _check_switch(environment)
    name = _filled("lora_name", parse(UnloadAdapter, await request.body()).lora_name)
    if not await serving.engine.remove_lora(name):
        raise AdapterNotFoundError(name, "is not loaded; GET /v1/lora_adapters lists what is")
    return Response(f"Success: LoRA adapter '{name}' removed successfully", media_type=MediaType.TEXT)


@get("/v1/lora_adapters", operation_id="lora_adapters", tags=["adapters"])
async def lora_adapters(serving: Served) -> AdapterList:
    """Where every adapter is and who needs it; at the end those without a name that requests still run with."""
    engine = serving.engine
    known = engine.intake.registry.known()
    standing = {each.version.id: each for each in await engine.lora_standing()}
    cards = [
        _unread_card(engine, one) if isinstance(one, AnnouncedAdapter) else _card(engine, standing.pop(one.id))
        for one in known
    ]
    cards += [_card(engine, gone) for gone in standing.values()]
    return AdapterList([card for card in cards if serving.permits(card.id)])


@post(
    "/v1/lora_adapters/{name_and_verb:path}",
    status_code=200,
    operation_id="change_lora_adapter",
    tags=["adapters"],
    media_type=MediaType.TEXT,
    opt=ADMIN | {"reads": (Alias, AdapterPolicy, RollBack), "fails": (404, 422)},
)
async def change_lora_adapter(
    name_and_verb: FromPath[str], request: HTTPRequest, serving: Served, environment: Allowed
) -> Response[str]:
    """`NAME/VERB`; a name may hold slashes, and be an alias.

    `pin`: never evict it; `unpin`: it may be evicted again. `alias`: give it another name, `{"alias": ...}`.
    `rollback`: it stands again for what it stood for before it was replaced. `policy`: what it may take,
    `{"weight": ..., "max_concurrency": ..., "tokens_per_minute": ...}`.
    """
    _check_switch(environment)
    name, _, verb = name_and_verb.removeprefix("/").rpartition("/")
    if verb not in _DONE:
        raise NotFoundException
    engine, body = serving.engine, await request.body()
    if engine.intake.registry.named(name) is None:
        raise AdapterNotFoundError(name, "is not loaded; GET /v1/lora_adapters lists what is")
    done = _DONE[verb]
    if verb == "pin":
        await engine.pin_lora(name)
    elif verb == "unpin":
        await engine.unpin_lora(name)
    elif verb == "alias":
        alias = _filled("alias", parse(Alias, body).alias)
        await engine.alias_lora(alias, name)
        done = f"aliased as '{alias}'"
    elif verb == "rollback":
        version = await engine.rollback_lora(name, parse(RollBack, body or b"{}").digest)
        done = f"rolled back to {version.label}"
    else:
        await engine.set_lora_policy(name, parse(AdapterPolicy, body))
    return Response(f"Success: LoRA adapter '{name}' {done} successfully", media_type=MediaType.TEXT)


def _check_switch(environment: Environment) -> None:
    if not environment.runtime_lora_updating:
        raise SwitchedOffError(
            "adapters cannot be loaded, unloaded or pinned over HTTP here; the operator allows it by starting the "
            "server with AIOLORA_ALLOW_RUNTIME_LORA_UPDATING=1"
        )


def _filled(field: str, value: str) -> str:
    if not value.strip():
        raise RequestError(f"{field} is empty", param=field)
    return value


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _card(engine: AsyncLLMEngine, standing: AdapterStanding) -> AdapterCard:
    version = standing.version
    return AdapterCard(
        id=version.name,
        digest=version.digest,
        version=version.label,
        rank=version.rank,
        bytes=version.nbytes,
        residency=standing.residency,
        pinned=standing.pinned,
        in_use=standing.in_use,
        requests=standing.requests,
        draining=standing.draining,
        loaded_at=int(version.loaded_at),
        earlier=None if standing.earlier is None else standing.earlier.label,
        aliases=[] if standing.draining else _aliases(engine, version.name),
        policy=engine.intake.policies.get(version.name),
    )


def _unread_card(engine: AsyncLLMEngine, known: AnnouncedAdapter) -> AdapterCard:
    return AdapterCard(
        id=known.name,
        digest=None,
        version=None,
        rank=known.rank,
        bytes=known.nbytes,
        residency="disk",
        pinned=False,
        in_use=False,
        requests=0,
        draining=False,
        loaded_at=int(known.announced_at),
        earlier=None,
        aliases=_aliases(engine, known.name),
        policy=engine.intake.policies.get(known.name),
    )


def _aliases(engine: AsyncLLMEngine, name: str) -> list[str]:
    return [alias for alias, meant in engine.intake.registry.aliases().items() if meant == name]
