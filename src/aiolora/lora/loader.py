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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from aiolora.lora.adapter import PeftConfig, parse_config, stands_for, weight_of
from aiolora.lora.layout import Layout, Target
from aiolora.lora.memory import HeldTensors, InMemory
from aiolora.lora.paging import Module, fill
from aiolora.lora.tensorfile import Entry, TensorFile, Tensors
from aiolora.lora.vectors import Factors, Vectors, vector_pages
from aiolora.ops.linear import RANKS_PER_PAGE
from aiolora.types import AdapterVersion, AnnouncedAdapter, LoRARequest, SitePages

logger = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_HEADS = ("lm_head", "embed_tokens")
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>[\w.]+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|(?:base_layer\.)?bias)"
)
_A, _B = "lora_A.weight", "lora_B.weight"
_VECTORS = _MAGNITUDE, _FACTOR_BIAS, _BIAS = "lora_magnitude_vector", "lora_B.bias", "bias"
_MAX_SCALE = 1e4  # alpha / r is of order 1; float32 and bfloat16 hold products with it
MAX_CONFIG = 1 << 20

_ids = itertools.count(1)


@dataclass(frozen=True)
class AdapterWeights:
    """One version's pages in host memory, ready to be copied page by page."""

    version: AdapterVersion
    a: dict[int, list[Tensor]]  # kind -> pages [L, S, 8, K]
    b: dict[int, list[Tensor]]  # kind -> pages [L, 8, N]
    vectors: dict[int, Tensor]  # kind -> vector page [L, 2, N] float32


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""

    max_rank: int
    pages: int  # rank pages of each kind on the device
    base_model: str  # the served base, to warn of an adapter made for another name
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
        return _build(name, config, file, layout, limits, request)


def check_adapter(request: LoRARequest, layout: Layout, limits: Limits) -> AnnouncedAdapter:
    """All that the config and the header of the tensors say of the adapter at `request.lora_path`. Blocks.

    What only the tensors' bytes can tell (digest, values that are not finite) `load_adapter` finds. Raises as it.
    """
    name = request.lora_name
    folder = locate(name, request.lora_path)
    config = parse_config(name, read_file(name, folder / CONFIG, MAX_CONFIG))
    with open_tensors(name, folder) as file:
        outline = _outline(name, config, file.entries, layout, limits)
    return AnnouncedAdapter(
        request=request, rank=outline.rank, nbytes=layout.pages_nbytes(outline.pages), announced_at=time.time()
    )


def _warn_of_base(name: str, config: PeftConfig, limits: Limits) -> None:
    if config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, limits.base_model):
        logger.warning(
            "adapter %r was made for %r and is served on %r", name, config.base_model_name_or_path, limits.base_model
        )


class _Outline(NamedTuple):
    """What an adapter will be, before any tensor is read."""

    parts: dict[str, dict[str, Entry]]  # the tensors of every module
    modules: list[Module]
    pages: dict[int, int]  # kind -> count
    kind_scales: dict[int, float]
    scales: dict[str, float]  # of each module
    rank: int  # the largest


def _outline(name: str, config: PeftConfig, entries: dict[str, Entry], layout: Layout, limits: Limits) -> _Outline:
    parts = _parts(name, config, entries, layout)
    factors = {module: (own[_A], own[_B]) for module, own in parts.items() if _A in own}
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
    if max(pages.values()) > limits.pages:
        raise AdapterMemoryError(
            name,
            f"needs {max(pages.values())} rank pages of one kind, the room for adapters has {limits.pages}; "
            "raise --lora-memory",
        )
    kind_scales = _kind_scales(name, scales, layout)
    modules = [
        Module(*pair, layout.targets[module], scales[module] / (kind_scales[layout.targets[module].kind] or 1.0))
        for module, pair in factors.items()
    ]
    return _Outline(parts, modules, pages, kind_scales, scales, max(ranks.values()))


def _build(
    name: str, config: PeftConfig, file: Tensors, layout: Layout, limits: Limits, request: LoRARequest | InMemory
) -> AdapterWeights:
    parts, modules, pages, kind_scales, scales, rank = _outline(name, config, file.entries, layout, limits)
    a_pages, b_pages, contents = fill(file, modules, pages, layout, pinned=limits.pinned)
    trained = [
        Vectors(module, layout.targets[module], scales.get(module, 0.0), *map(own.get, _VECTORS))
        for module, own in parts.items()
        if own.keys() & _VECTORS
    ]
    served = Factors(a_pages, b_pages, kind_scales)
    vectors, more = vector_pages(file, trained, served, layout, pinned=limits.pinned)
    pages |= {layout.vectors_of(kind): 1 for kind in sorted(vectors)}
    invocation = tuple(config.alora_invocation_tokens or ())
    version = AdapterVersion(
        id=next(_ids),
        name=name,
        digest=_digest(file.entries, contents | more, scales, invocation),
        source=None if isinstance(request, InMemory) else request.lora_path,
        rank=rank,
        pages=tuple(SitePages(kind, count, kind_scales.get(kind, 1.0)) for kind, count in pages.items()),
        nbytes=layout.pages_nbytes(pages),
        base_model_name=request.base_model_name,
        loaded_at=time.time(),
        additive=not (vectors or invocation),
        invocation=invocation,
    )
    return AdapterWeights(version, a_pages, b_pages, vectors)


def locate(name: str, path: str) -> Path:
    """The folder of the adapter at `path`, fetched where it is a repository. Raises `AdapterNotFoundError`."""
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):  # unlike Path.is_dir it never raises, however strange the path
        try:
            folder = fetch(path, (CONFIG, TENSORS))
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


def _parts(name: str, config: PeftConfig, entries: dict[str, Entry], layout: Layout) -> dict[str, dict[str, Entry]]:
    """The tensors of every module by their part; every tensor must be one of them, no part and no target missing."""
    beside = [part for part, trained in ((_MAGNITUDE, config.use_dora), (_FACTOR_BIAS, config.lora_bias)) if trained]
    known = [_A, _B, *beside, *([_BIAS] if config.bias != "none" else [])]
    found: dict[str, dict[str, Entry]] = {}
    strange = []
    for key, entry in entries.items():
        match = TENSOR.fullmatch(key)
        part = match["part"].removeprefix("base_layer.") if match else None
        if match is None or part not in known:
            strange.append(key)
            continue
        if not entry.dtype.is_floating_point:
            raise AdapterFormatError(name, f"{key} holds {entry.dtype}, no floats")
        own = found.setdefault(match["module"], {})
        if part in own:
            raise AdapterFormatError(name, f"{key} names {_told(part)} of {match['module']} a second time")
        own[part] = entry
    if heads := [head for head in _HEADS if any(f".{head}." in f".{key}" for key in entries)]:
        raise AdapterUnsupportedError(
            name,
            f"tensors of {' and '.join(heads)} are not served; retrain without them in target_modules, or save with "
            "save_embedding_layers=False",
        )
    if strange:
        raise AdapterUnsupportedError(
            name, f"{len(strange)} tensors are no lora_A/lora_B of a linear module and not served: {strange[:3]}"
        )
    adapted = {module: own for module, own in found.items() if own.keys() != {_BIAS}}
    if not adapted:
        raise AdapterFormatError(name, f"{TENSORS} holds no LoRA tensors")
    for module, own in sorted(adapted.items()):
        if not {_A, _B} <= own.keys():
            alone = min(part for part in own if part != _BIAS)
            raise AdapterFormatError(name, f"{module} has {_told(alone)} alone, without its pair")
        if missing := [part for part in beside if part not in own]:
            raise AdapterFormatError(name, f"{module} has no {missing[0]}, and {CONFIG} says that it was trained")
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
            if bare := [module for module in meant if module not in adapted and not config.spares(module)]:
                raise AdapterFormatError(
                    name,
                    f"target_modules names {wanted!r}, but no tensor belongs to it in {len(bare)} of {len(meant)} "
                    f"modules: {bare[:3]}",
                )
    for wanted in config.target_parameters or ():
        if bare := [
            module for module in layout.targets if stands_for(wanted, weight_of(module)) and module not in adapted
        ]:
            raise AdapterFormatError(
                name,
                f"target_parameters names {wanted!r}, but no tensor belongs to it in {len(bare)} modules: {bare[:3]}",
            )
    for module, own in found.items():
        _check_vectors(name, config, module, own, layout.targets[module])
    return dict(sorted(found.items()))


def _told(part: str) -> str:
    return part.removesuffix(".weight")


def _check_vectors(name: str, config: PeftConfig, module: str, own: dict[str, Entry], target: Target) -> None:
    """What the module has beside lora_A and lora_B must be of the base model's shape."""
    for part in own.keys() & _VECTORS:
        if own[part].shape != (target.outputs,):
            raise AdapterMismatchError(
                name,
                f"{module} has {_told(part)} {list(own[part].shape)}, the base model needs [{target.outputs}]; it was "
                f"made for {config.base_model_name_or_path!r}",
            )
    if _BIAS in own and target.bias is None:
        raise AdapterMismatchError(
            name,
            f"{module} has a bias, the base model's has none; it was made for {config.base_model_name_or_path!r}",
        )


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


def _digest(
    entries: dict[str, Entry], contents: dict[Entry, str], scales: dict[str, float], invocation: tuple[int, ...]
) -> str:
    """sha256 over every tensor's own sha256 and what the config adds: two configs with one set of tensors differ."""
    total = hashlib.sha256()
    for key, entry in sorted(entries.items()):
        total.update(f"{key} {entry.dtype} {list(entry.shape)} {contents[entry]}\n".encode())
    for module in sorted(scales):
        total.update(f"{module} {scales[module]!r}\n".encode())
    if invocation:
        total.update(f"invocation {invocation}\n".encode())
    return total.hexdigest()


def _same_base(made_for: str, served: str) -> bool:
    """Whether both names may mean one model: equal last components, however they are spelled."""

    def core(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", Path(name).name.lower())

    return core(made_for).startswith(core(served)) or core(served).startswith(core(made_for))
