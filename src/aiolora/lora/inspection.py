"""What an adapter holds and whether a base model can serve it, without loading the base's weights."""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from aiolora.errors import AdapterError
from aiolora.lora.adapter import PeftConfig, parse_config, stands_for
from aiolora.lora.contents import A, module_of, part_of
from aiolora.lora.kinds import Room
from aiolora.lora.layout import Layout, layout_of
from aiolora.lora.loader import CONFIG, MAX_CONFIG, load_adapter, locate, open_tensors, read_file
from aiolora.lora.outline import Limits
from aiolora.lora.outlines import Outlines
from aiolora.lora.tensorfile import Entry
from aiolora.models import weights
from aiolora.models.loading import outline
from aiolora.types import AdapterVersion, LoRARequest


@dataclass(frozen=True)
class Content:
    """The tensors of one module, over all layers."""

    module: str  # without what stands before the layer's number
    num_tensors: int
    ranks: tuple[int, ...]  # empty: no lora_A among them
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Coverage:
    """How the tensors and the base model's modules meet. Serving takes an adapter whole or not at all."""

    applied: int  # tensors
    ignored: tuple[str, ...]  # tensors for which the base has no place
    missing: tuple[str, ...]  # modules that target_modules names and no tensor belongs to


@dataclass(frozen=True)
class Report:
    """All that could be found out."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json; empty where it is no JSON object
    contents: tuple[Content, ...] = ()
    coverage: Coverage | None = None  # None: no base was named, or the files could not be read
    version: AdapterVersion | None = None  # as it would be served on the base that was named
    refusal: AdapterError | None = None


def inspect_adapter(path: str, *, model: str | None = None, max_rank: int) -> Report:
    """Look at the adapter at `path` (a folder or hub repository); with `model`, load it as that base's server would.

    Of the model only the config is read. Blocks. Raises `AdapterNotFoundError` or a `ModelError`.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1] or path
    folder = locate(name, path)
    layout = None
    if model is not None:
        decoder, encoder = outline(weights.locate(model, only=("*.json",)))
        layout = layout_of(decoder, decoder.embed.weight.dtype, encoder=encoder)
    raw: dict[str, Any] = {}
    contents: tuple[Content, ...] = ()
    coverage = version = None
    try:
        data = read_file(name, folder / CONFIG, MAX_CONFIG)
        raw = _object(data)
        with open_tensors(name, folder) as file:
            contents = _contents(file.entries.values())
            if layout is not None:
                coverage = _coverage(raw, file.entries, layout)
        parse_config(name, data)
        if layout is not None and model is not None:
            room = Room(*[sys.maxsize] * len(Room._fields))  # the server's, and not known here
            limits = Limits(max_rank, room, model)
            version = load_adapter(LoRARequest(name, 1, str(folder)), Outlines(layout, limits)).version
    except AdapterError as error:
        return Report(folder, raw, contents, coverage, refusal=error)
    return Report(folder, raw, contents, coverage, version)


def _object(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}  # parse_config says it better


def _contents(entries: Iterable[Entry]) -> tuple[Content, ...]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        part = part_of(entry.name)
        module = part.module if part else entry.name.removeprefix("base_model.model.")
        groups.setdefault(re.sub(r"^.*?\.\d+\.", "", module), []).append(entry)
    return tuple(
        Content(
            module,
            len(group),
            tuple(sorted({entry.shape[0] for entry in group if _is_a(entry) and entry.shape})),
            tuple(sorted({str(entry.dtype).removeprefix("torch.") for entry in group})),
            sum(entry.nbytes for entry in group),
        )
        for module, group in sorted(groups.items())
    )


def _is_a(entry: Entry) -> bool:
    part = part_of(entry.name)
    return part is not None and part.name == A


def _coverage(raw: dict[str, Any], entries: Iterable[str], layout: Layout) -> Coverage:
    placed = {key: module for key in entries if (module := module_of(key, layout))}
    missing: list[str] = []
    try:
        config = msgspec.convert(raw, PeftConfig)
    except msgspec.ValidationError:
        config = PeftConfig()
    if isinstance(config.target_modules, list) and not isinstance(config.exclude_modules, str):
        wanted = {name: layout.meant(name) for name in config.target_modules}
        meant = [
            module for module in layout.targets if any(stands_for(end, module) for end in set().union(*wanted.values()))
        ]
        missing = [module for module in meant if module not in placed.values() and not config.spares(module)]
        missing += [
            name
            for name, ends in wanted.items()
            if not any(stands_for(end, module) for end in ends for module in layout.targets)
        ]
    return Coverage(len(placed), tuple(key for key in entries if key not in placed), tuple(missing))
