"""From a PEFT folder to rank pages in host memory: read once, checked whole, never partly applied.

Everything here runs in a worker thread (or in the caller's, for the blocking faces). Files are read into our own bytes
first: a file truncated while it is mapped would kill the process.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
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
from aiolora.lora.layout import Layout
from aiolora.ops.linear import RANKS_PER_PAGE
from aiolora.types import AdapterVersion, LoRARequest, SitePages

logger = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_HEADS = ("lm_head", "embed_tokens")
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.]+)\.lora_(?P<factor>[AB])\.weight")
_MAX_SCALE = 1e4  # alpha / r is of order 1; float32 and bfloat16 hold products with it
_MAX_HEADER, _MAX_TENSORS, _MAX_CONFIG = 4 << 20, 20_000, 1 << 20

_ids = itertools.count(1)


@dataclass(frozen=True)
class AdapterWeights:
    """One version's rank pages in host memory, ready to be copied page by page."""

    version: AdapterVersion
    a: dict[int, Tensor]  # kind -> [pages, L, S, 8, K]
    b: dict[int, Tensor]  # kind -> [pages, L, 8, N]


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""

    max_rank: int
    pages: int  # rank pages of each kind on the device
    base_model: str  # the served base, to warn of an adapter made for another name


def load_adapter(request: LoRARequest, layout: Layout, limits: Limits) -> AdapterWeights:
    """Read, check and convert the adapter at `request.lora_path` (a folder or a hub repository). Blocks.

    Raises an `AdapterError` that names the culprit; nothing is kept then.
    """
    name = request.lora_name
    folder = _locate(name, request.lora_path)
    config = parse_config(name, _read(name, folder / CONFIG, _MAX_CONFIG))
    if config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, limits.base_model):
        logger.warning(
            "adapter %r was made for %r and is served on %r", name, config.base_model_name_or_path, limits.base_model
        )
    tensors = _tensors(name, folder)
    return build(
        name,
        config,
        tensors,
        layout,
        limits,
        source=request.lora_path,
        base_model_name=request.base_model_name,
    )


def build(
    name: str,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    layout: Layout,
    limits: Limits,
    *,
    source: str | None,
    base_model_name: str | None = None,
) -> AdapterWeights:
    """Rank pages from PEFT tensors (names as in adapter_model.safetensors, any float dtype)."""
    factors = _factors(name, config, tensors, layout)
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
    a_pages, b_pages, kind_scales = _paged(name, factors, scales, pages, layout)
    version = AdapterVersion(
        id=next(_ids),
        name=name,
        digest=_digest(tensors, scales),
        source=source,
        rank=max(ranks.values()),
        pages=tuple(SitePages(kind, count, kind_scales[kind]) for kind, count in pages.items()),
        nbytes=layout.pages_nbytes(pages),
        base_model_name=base_model_name,
        loaded_at=time.time(),
    )
    return AdapterWeights(version, a_pages, b_pages)


def _locate(name: str, path: str) -> Path:
    folder = Path(os.path.expanduser(path))
    if not os.path.isdir(folder):  # unlike Path.is_dir it never raises, however strange the path
        try:
            folder = fetch(path, (CONFIG, TENSORS))
        except FileNotFoundError as error:
            raise AdapterNotFoundError(name, f"no adapter found at {path!r}: {error}") from error
    if not os.path.isfile(folder / CONFIG):
        raise AdapterNotFoundError(name, f"no adapter found at {path!r}: it holds no {CONFIG}")
    return folder


def _read(name: str, file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise AdapterFormatError(name, f"{file.name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise AdapterFormatError(name, f"{file.name} is over {limit} bytes")
    return data


def _tensors(name: str, folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS
    if not file.is_file():
        pickled = next((pickle for pickle in _PICKLES if (folder / pickle).exists()), None)
        if pickled:
            raise AdapterFormatError(
                name, f"{pickled} is a pickle, which is never read; save it with safe_serialization=True ({TENSORS})"
            )
        raise AdapterFormatError(name, f"holds no {TENSORS}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise AdapterFormatError(name, f"{TENSORS} cannot be read: {error.strerror}") from error
    _check_header(name, data)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterFormatError(name, f"{TENSORS} is truncated or malformed: {error}") from None
    return tensors


def _check_header(name: str, data: bytes) -> None:
    """Bound what the safetensors header may ask for, before anything is built from it."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise AdapterFormatError(name, f"{TENSORS} is truncated: header of {length} bytes in a file of {len(data)}")
    if length > _MAX_HEADER:
        raise AdapterFormatError(name, f"{TENSORS} has a header of {length} bytes, the limit is {_MAX_HEADER}")
    try:
        pairs = json.loads(data[8 : 8 + length], object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(name, f"{TENSORS} has no JSON header: {error}") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise AdapterFormatError(name, f"{TENSORS} has a header that is no JSON object")
    if len(pairs) > _MAX_TENSORS:
        raise AdapterFormatError(name, f"{TENSORS} names over {_MAX_TENSORS} tensors")
    twice = [key for key, count in Counter(pair[0] for pair in pairs).items() if count > 1]
    if twice:
        raise AdapterFormatError(name, f"{TENSORS} names {twice[0]!r} twice")


def _factors(
    name: str, config: PeftConfig, tensors: dict[str, Tensor], layout: Layout
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every module; every tensor must be one of them, every pair complete, every target present."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        if not tensor.is_floating_point() or not torch.isfinite(tensor.to(layout.dtype)).all():
            raise AdapterFormatError(
                name, f"{key} ({tensor.dtype}) holds values that are not finite floats in {layout.dtype}"
            )
        pair = found.setdefault(match["module"], {})
        if match["factor"] in pair:
            raise AdapterFormatError(name, f"{key} names lora_{match['factor']} of {match['module']} a second time")
        pair[match["factor"]] = tensor
    if heads := [head for head in _HEADS if any(f".{head}." in f".{key}" for key in tensors)]:
        raise AdapterUnsupportedError(
            name, f"tensors of {' and '.join(heads)} are not served; retrain without them in target_modules"
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
            if not meant:
                raise AdapterFormatError(name, f"target_modules names {wanted!r}, but no tensor belongs to it")
            if bare := [module for module in meant if module not in found and not config.spares(module)]:
                raise AdapterFormatError(
                    name,
                    f"target_modules names {wanted!r}, but no tensor belongs to it in {len(bare)} of {len(meant)} "
                    f"modules: {bare[:3]}",
                )
    return {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)}


def _checked_rank(name: str, config: PeftConfig, module: str, a: Tensor, b: Tensor, inputs: int, outputs: int) -> int:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != inputs or b.shape[0] != outputs:
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


def _paged(
    name: str,
    factors: dict[str, tuple[Tensor, Tensor]],
    scales: dict[str, float],
    pages: dict[int, int],
    layout: Layout,
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, float]]:
    """Lay the factors out as pages.

    A kind has one scale, the largest of its modules'; a module with a smaller one has the ratio folded into B.
    """
    a_pages: dict[int, Tensor] = {}
    b_pages: dict[int, Tensor] = {}
    kind_scales: dict[int, float] = {}
    for kind, count in pages.items():
        shape = layout.kinds[kind]
        a_pages[kind] = torch.zeros(
            (count, shape.layers, shape.slices, RANKS_PER_PAGE, shape.inputs), dtype=layout.dtype
        )
        b_pages[kind] = torch.zeros((count, shape.layers, RANKS_PER_PAGE, shape.bounds[-1]), dtype=layout.dtype)
    for module, scale in scales.items():
        kind = layout.targets[module].kind
        if not math.isfinite(scale) or abs(scale) > _MAX_SCALE:
            raise AdapterFormatError(name, f"{module} has the scale {scale}; the limit is {_MAX_SCALE:g}")
        if abs(scale) >= abs(kind_scales.get(kind, 0.0)):
            kind_scales[kind] = scale
    for module, (a, b) in factors.items():
        target = layout.targets[module]
        largest = kind_scales[target.kind]
        if scales[module] != largest:
            b = b.float() * (scales[module] / largest)
        low, high = layout.kinds[target.kind].bounds[target.slice : target.slice + 2]
        for page, start in enumerate(range(0, a.shape[0], RANKS_PER_PAGE)):
            part = a[start : start + RANKS_PER_PAGE]
            a_pages[target.kind][page, target.layer, target.slice, : len(part)] = part
            b_pages[target.kind][page, target.layer, : len(part), low:high] = b[:, start : start + RANKS_PER_PAGE].T
    return a_pages, b_pages, kind_scales


def _digest(tensors: dict[str, Tensor], scales: dict[str, float]) -> str:
    """sha256 over every tensor's own sha256 and every module's scale: two configs with one set of tensors differ."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        content = hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()
        total.update(f"{key} {tensor.dtype} {list(tensor.shape)} {content}\n".encode())
    for module in sorted(scales):
        total.update(f"{module} {scales[module]!r}\n".encode())
    return total.hexdigest()


def _same_base(made_for: str, served: str) -> bool:
    """Whether both names may mean one model: equal last components, however they are spelled."""

    def core(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", Path(name).name.lower())

    return core(made_for).startswith(core(served)) or core(served).startswith(core(made_for))
