"""Flags of every engine face, made from the one declaration in `EngineArgs`, and `--lora-modules` in both its forms."""

import argparse
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import fields

from aiolora.config import EngineArgs, ServerArgs
from aiolora.errors import ConfigError
from aiolora.types import AdapterPolicy, LoRARequest


class _Module(Struct, forbid_unknown_fields=True):
    """The JSON form of `--lora-modules`."""

    name: str
    path: str
    base_model_name: str | None = None
    policy: AdapterPolicy | None = None


# the fields of `EngineArgs` as --help shows them; those named nowhere come last, with the machine
_GROUPS = {
    "model": ("model", "tokenizer", "dtype", "load_format", "model_impl", "max_model_len", "seed"),
    "adapters": (
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "max_cpu_loras",
        "lora_dtype",
        "lora_memory",
        "lora_ends_memory",
        "lora_target_modules",
    ),
    "images and recordings": ("default_mm_loras", "allowed_media_domains", "max_image_pixels", "media_memory"),
}


def add_engine_flags(parser: argparse.ArgumentParser, *, model: str | None = None) -> None:
    """MODEL (optional where `model` is its default), a flag for each other field of `EngineArgs`, and `--config`."""
    parser.add_argument("model", nargs="?" if model else None, default=model, help=_help(EngineArgs, "model"))
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with flags' names as keys; variables such as AIOLORA_MAX_LORAS win over it, typed flags over both",
    )
    rest = [field.name for field in fields(EngineArgs) if field.name not in sum(_GROUPS.values(), ())]
    for title, names in {**_GROUPS, "machine": rest}.items():
        group = parser.add_argument_group(title)
        add_flags(group, EngineArgs, [name for name in names if name != "model"])
        if title == "adapters":
            _add_lora_modules(group)


def add_flags(group: argparse._ArgumentGroup, shape: type[Struct], names: Iterable[str]) -> None:
    """A flag for each of those fields of `shape`."""
    known = {field.name: field for field in fields(shape)}
    for name in names:
        field = known[name]
        flag = "--" + field.name.replace("_", "-")
        kind, choices, several = _shape(field.type)
        default = None if field.default in (None, ()) else field.default
        shown = f"{_help(shape, name)} (default: {default})" if default is not None else _help(shape, name)
        if kind is bool:
            group.add_argument(flag, default=field.default, action=argparse.BooleanOptionalAction, help=shown)
        elif kind is dict:
            group.add_argument(flag, default=field.default, type=_mapping, metavar="JSON", help=shown)
        elif several:
            one = "NAME" if name.endswith("modules") else name.split("_")[-1].upper()
            several_of: dict[str, Any] = {"nargs": "+", "action": "extend"}
            start = [] if field.default == () else field.default
            group.add_argument(flag, default=start, type=kind, metavar=one, help=shown, **several_of)
        else:
            metavar = None if choices else kind.__name__.upper()
            group.add_argument(flag, default=field.default, type=kind, choices=choices, metavar=metavar, help=shown)


def _add_lora_modules(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODULE",
        help='adapters to load at start: name=path or {"name": ..., "path": ..., "base_model_name": ..., '
        '"policy": {"weight": ..., "max_concurrency": ..., "tokens_per_minute": ...}}',
    )


def engine_args(args: argparse.Namespace) -> EngineArgs:
    """What was said, checked. Raises `ConfigError`."""
    given = {field.name: getattr(args, field.name) for field in fields(EngineArgs)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    given["enable_lora"] = given["enable_lora"] or bool(args.lora_modules)
    return EngineArgs(**given)


def server_args(args: argparse.Namespace) -> ServerArgs:
    """The same for the server."""
    given: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(ServerArgs)}
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    return ServerArgs(**given)


def lora_modules(items: Iterable[str]) -> list[LoRARequest]:
    """The adapters that `--lora-modules` names, with ids from 1 on. Raises `ConfigError`."""
    modules = [_module(item) for item in items if item]
    names = [module.name for module in modules]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--lora-modules names {sorted(twice)} twice; give each adapter its own name")
    return [
        LoRARequest(module.name, number, module.path, module.base_model_name)
        for number, module in enumerate(modules, start=1)
    ]


def lora_policies(items: Iterable[str]) -> dict[str, AdapterPolicy]:
    """What `--lora-modules` lets its adapters take, by name. Raises `ConfigError`."""
    modules = [_module(item) for item in items if item]
    return {module.name: module.policy for module in modules if module.policy is not None}


def _module(item: str) -> _Module:
    try:
        if item.lstrip().startswith("{"):
            module = msgspec.json.decode(item, type=_Module)
        else:
            name, equals, path = item.partition("=")
            if not equals:
                raise ValueError("there is no '='")
            module = _Module(name, path)
        if not module.name or not module.path:
            raise ValueError("name and path must not be empty")
    except (ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"--lora-modules {item!r}: {error}; write name=path or "
            '{"name": "...", "path": "...", "base_model_name": "...", "policy": {...}}'
        ) from None
    return module


def _mapping(said: str) -> dict[str, str]:
    try:
        return msgspec.json.decode(said, type=dict[str, str])
    except msgspec.MsgspecError as error:
        raise argparse.ArgumentTypeError(f"{said!r} is no JSON object of strings: {error}") from None


def _help(shape: type[Struct], name: str) -> str:
    info = msgspec.json.schema(shape)["$defs"][shape.__name__]["properties"][name]
    return str(info.get("description", "")).replace("%", "%%")


def _shape(annotation: object) -> tuple[type, tuple[str, ...] | None, bool]:
    """(Python type of one value, its choices, whether it takes several) of an `EngineArgs` annotation."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _shape(get_args(annotation)[0])
    origin = get_origin(annotation)
    if origin is Literal:
        return str, get_args(annotation), False
    if origin is dict:
        return dict, None, False
    if origin is tuple:
        return _shape(get_args(annotation)[0])[0], None, True
    inner = [part for part in get_args(annotation) if part is not type(None)]
    if inner:
        return _shape(inner[0])
    assert isinstance(annotation, type)
    return annotation, None, False
