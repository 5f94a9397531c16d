"""From a PEFT folder to rank pages in host memory: read once, checked whole, never partly applied.

Everything here runs in a worker thread (or in the caller's, for the blocking faces). What the names and shapes say is
checked before any tensor is read; `lora/paging.py` reads them.
"""

import hashlib
import itertools
import logging
import math
import os
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from aiolora.errors import (
    AdapterFormatError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterRankError,
    AdapterUnsupportedError,
)
from aiolora.hub import fetch
from aiolora.lora.adapter import PeftConfig, parse_config, stands_for
from aiolora.lora.brought import Brought, brought
from aiolora.lora.contents import Contents, sort
from aiolora.lora.layout import EMBED_TOKENS, LM_HEAD, Layout, Room
from aiolora.lora.memory import HeldTensors, InMemory
from aiolora.lora.paging import Module, fill
from aiolora.lora.rows import Block, read_blocks, spans_of
from aiolora.lora.tensorfile import Entry, TensorFile, Tensors
from aiolora.lora.tokenizers import FILES as TOKENIZER_FILES
from aiolora.ops.linear import RANKS_PER_PAGE
from aiolora.types import AdapterVersion, LoRARequest, SitePages

logger = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, TENSORS, *TOKENIZER_FILES)  # of a repository
_HEADS = (LM_HEAD, EMBED_TOKENS.rpartition(".")[2])
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_MAX_SCALE = 1e4  # alpha / r is of order 1; float32 and bfloat16 hold products with it
MAX_CONFIG = 1 << 20

_ids = itertools.count(1)


@dataclass(frozen=True)
class AdapterWeights:
    """One version's rank pages in host memory, ready to be copied page by page."""

    version: AdapterVersion
    a: dict[int, list[Tensor]]  # kind -> pages [L, S, 8, K]
    b: dict[int, list[Tensor]]  # kind -> pages [L, 8, N]
    blocks: list[Block] = field(default_factory=list)  # in the order of the version's
    folder: Path | None = None  # that it was read from


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""

    max_rank: int
    room: Room  # pages on the device
    base_model: str  # the served base, to warn of an adapter made for another name
    full_ends: int = 0  # rank pages of embedding and head that there are where --lora-ends-memory is large enough
    pinned: bool = False  # pages in page-locked memory, from where a GPU copies while it computes


def load_adapter(request: LoRARequest | InMemory, layout: Layout, limits: Limits) -> AdapterWeights:
    """Read, check and convert the adapter at `request.lora_path` (a folder or a hub repository), or in memory. Blocks.

    Raises an `AdapterError` that names the culprit; nothing is kept then.
    """
    name = request.lora_name
    if isinstance(request, InMemory):
        config = parse_config(name, request.config_json())
        _warn_of_base(name, config, limits)
        return _build(name, config, HeldTensors(request), layout, limits, request)
    folder = locate(name, request.lora_path)
    config = parse_config(name, read_file(name, folder / CONFIG, MAX_CONFIG))
    _warn_of_base(name, config, limits)
    with open_tensors(name, folder) as file:
        return replace(_build(name, config, file, layout, limits, request), folder=folder)


def _warn_of_base(name: str, config: PeftConfig, limits: Limits) -> None:
    if config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, limits.base_model):
        logger.warning(
            "adapter %r was made for %r and is served on %r", name, config.base_model_name_or_path, limits.base_model
        )


def _build(
    name: str, config: PeftConfig, file: Tensors, layout: Layout, limits: Limits, request: LoRARequest | InMemory
) -> AdapterWeights:
    found = sort(name, file.entries.values(), layout)
    factors = _factors(name, config, found, layout)
    vocabulary, own = brought(name, config, found, layout)
    ranks: dict[int, int] = {}
    scales: dict[str, float] = {}
    for module, (a, b) in factors.items():
        target = layout.targets[module]
        rank = _checked_rank(name, config, module, a, b, target.inputs, target.outputs)
        if rank > limits.max_rank:
            raise AdapterRankError(
                name,
                f"rank {rank} of {module} exceeds max_lora_rank={limits.max_rank}; start with --max-lora-rank {rank}",
            )
        scales[module] = config.scale(module, rank)
        ranks[target.kind] = max(ranks.get(target.kind, 0), rank)
    pages = {kind: -(-rank // RANKS_PER_PAGE) for kind, rank in sorted(ranks.items())}
    for kind, there in enumerate(layout.pages(limits.room)[:-1]):
        if pages.get(kind, 0) > there:
            half = layout.ends_nbytes(pages[kind], 0)
            raise AdapterMemoryError(
                name,
                f"needs {pages[kind]} rank pages of {layout.kinds[kind].name}, the room for adapters has {there}; "
                + (f"start with --lora-ends-memory {2 * half}" if layout.is_end(kind) else "raise --lora-memory"),
            )
    kind_scales = _kind_scales(name, scales, layout)
    modules = [
        Module(*pair, layout.targets[module], scales[module] / (kind_scales[layout.targets[module].kind] or 1.0))
        for module, pair in factors.items()
    ]
    a_pages, b_pages, contents = fill(file, modules, pages, layout, pinned=limits.pinned)
    enough = partial(layout.ends_nbytes, limits.full_ends)
    blocks, more = read_blocks(file, own, layout, limits.room.blocks, enough, pinned=limits.pinned)
    version = AdapterVersion(
        id=next(_ids),
        name=name,
        digest=_digest(contents | more, scales, own),
        source=None if isinstance(request, InMemory) else request.lora_path,
        rank=max(ranks.values()),
        pages=(
            *(SitePages(kind, count, kind_scales[kind]) for kind, count in pages.items()),
            *([SitePages(layout.ends.blocks, len(blocks), 1.0)] if blocks else []),
        ),
        nbytes=layout.pages_nbytes(pages) + len(blocks) * layout.block_nbytes,
        base_model_name=request.base_model_name,
        loaded_at=time.time(),
        additive=not blocks and not vocabulary,
        vocabulary=vocabulary,
        blocks=spans_of(blocks),
    )
    return AdapterWeights(version, a_pages, b_pages, blocks)


def locate(name: str, path: str) -> Path:
    """The folder of the adapter at `path`, fetched where it is a repository. Raises `AdapterNotFoundError`."""
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):  # unlike Path.is_dir it never raises, however strange the path
        try:
            folder = fetch(path, FILES)
        except FileNotFoundError as error:
            raise AdapterNotFoundError(name, f"no adapter found at {path!r}: {error}") from error
    if not os.path.isfile(folder / CONFIG):
        raise AdapterNotFoundError(name, f"no adapter found at {path!r}: it holds no {CONFIG}")
    return folder


def read_file(name: str, file: Path, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes. Raises `AdapterFormatError`."""
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise AdapterFormatError(name, f"{file.name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise AdapterFormatError(name, f"{file.name} is over {limit} bytes")
    return data


def open_tensors(name: str, folder: Path) -> TensorFile:
    """The adapter's tensors, none of them read yet. Raises `AdapterFormatError`, also where there are only pickles."""
    file = folder / TENSORS
    if not file.is_file():
        pickled = next((pickle for pickle in _PICKLES if (folder / pickle).exists()), None)
        if pickled:
            raise AdapterFormatError(
                name, f"{pickled} is a pickle, which is never read; save it with safe_serialization=True ({TENSORS})"
            )
        raise AdapterFormatError(name, f"holds no {TENSORS}")
    return TensorFile.open(name, file)


def _factors(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> dict[str, tuple[Entry, Entry]]:
    """(A, B) of every module; every tensor must be served, every pair complete, every target present."""
    found, strange = contents.factors, contents.strange
    if biases := [key for key in strange if config.bias != "none" and key.endswith(".bias")]:
        raise AdapterUnsupportedError(
            name, f"bias={config.bias!r} trained {len(biases)} biases, which are not served; retrain with bias='none'"
        )
    if saved := [key for key in strange if config.saves(key.removesuffix(".weight"))]:
        raise AdapterUnsupportedError(
            name,
            f"modules_to_save trained {len(saved)} modules whole that are no embedding, head or norm of the residual "
            f"stream: {saved[:2]}; retrain without them in modules_to_save",
        )
    if strange:
        raise AdapterUnsupportedError(
            name, f"{len(strange)} tensors are no lora_A/lora_B of a linear module and not served: {strange[:3]}"
        )
    if not found:
        raise AdapterFormatError(name, f"{TENSORS} holds no LoRA tensors")
    if halves := sorted(module for module, pair in found.items() if len(pair) == 1):
        raise AdapterFormatError(name, f"{halves[0]} has lora_{next(iter(found[halves[0]]))} alone, without its pair")
    if outside := sorted(module for module in found if module not in layout.targets):
        raise AdapterMismatchError(
            name,
            f"{len(outside)} modules are not in the base model or take no adapters (--lora-target-modules): "
            f"{outside[:3]}; it was made for {config.base_model_name_or_path!r}",
        )
    if isinstance(config.target_modules, list):
        for wanted in config.target_modules:
            meant = [module for module in layout.targets if stands_for(wanted, module)]
            if not meant and wanted.rpartition(".")[2] in _HEADS and not config.spares(wanted):
                raise AdapterFormatError(name, f"target_modules names {wanted!r}, but no tensor belongs to it")
            # any other name that stands for nothing is of another model: PEFT passes it by
            if bare := [module for module in meant if module not in found and not config.spares(module)]:
                raise AdapterFormatError(
                    name,
                    f"target_modules names {wanted!r}, but no tensor belongs to it in {len(bare)} of {len(meant)} "
                    f"modules: {bare[:3]}",
                )
    return {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)}


def _checked_rank(name: str, config: PeftConfig, module: str, a: Entry, b: Entry, inputs: int, outputs: int) -> int:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != inputs or b.shape[0] != outputs:
        raise AdapterMismatchError(
            name,
            f"{module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, the base model needs [r, {inputs}] and "
            f"[{outputs}, r]; it was made for {config.base_model_name_or_path!r}",
        )
    rank = a.shape[0]
    if rank == 0 or b.shape[1] != rank:
        raise AdapterFormatError(name, f"{module} has rank {rank} in lora_A and {b.shape[1]} in lora_B")
    if rank != config.rank(module):
        raise AdapterFormatError(name, f"{module} has rank {rank}, {CONFIG} says {config.rank(module)}")
    return rank


def _kind_scales(name: str, scales: dict[str, float], layout: Layout) -> dict[int, float]:
    """The one scale of each kind: the largest of its modules'. The others have the ratio folded into B."""
    kind_scales: dict[int, float] = {}
    for module, scale in scales.items():
        kind = layout.targets[module].kind
        if not math.isfinite(scale) or abs(scale) > _MAX_SCALE:
            raise AdapterFormatError(name, f"{module} has the scale {scale}; the limit is {_MAX_SCALE:g}")
        if abs(scale) >= abs(kind_scales.get(kind, 0.0)):
            kind_scales[kind] = scale
    return kind_scales


def _digest(contents: dict[Entry, str], scales: dict[str, float], own: list[Brought]) -> str:
    """sha256 over every tensor's own, every module's scale and where rows belong: two configs of one file differ."""
    total = hashlib.sha256()
    for entry in sorted(contents):
        total.update(f"{entry.name} {entry.dtype} {list(entry.shape)} {contents[entry]}\n".encode())
    for module in sorted(scales):
        total.update(f"{module} {scales[module]!r}\n".encode())
    for one in own:
        if one.tokens is not None:
            total.update(f"{one.weight} {one.tokens.name} {list(one.rows)}\n".encode())
    return total.hexdigest()


def _same_base(made_for: str, served: str) -> bool:
    """Whether both names may mean one model: equal last components, however they are spelled."""

    def core(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", Path(name).name.lower())

    return core(made_for).startswith(core(served)) or core(served).startswith(core(made_for))
