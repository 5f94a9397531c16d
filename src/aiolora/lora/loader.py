"""From a PEFT folder to rank pages in host memory: read once, checked whole, never partly applied.

Everything here runs in a worker thread (or in the caller's, for the blocking faces). What the names and shapes say is
checked before any tensor is read (`lora/outline.py`); `paging.py`, `vectors.py` and `rows.py` read them.
"""

import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from aiolora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnsupportedError
from aiolora.hub import fetch
from aiolora.lora.adapter import PeftConfig, parse_config
from aiolora.lora.experts import fill_fused
from aiolora.lora.layout import EMBEDDING, HEAD, Layout
from aiolora.lora.memory import HeldTensors, InMemory
from aiolora.lora.outline import Limits, Outline
from aiolora.lora.outlines import Outlines
from aiolora.lora.paging import fill, threads
from aiolora.lora.rows import Block, read_blocks, spans_of
from aiolora.lora.tensorfile import TensorFile, Tensors
from aiolora.lora.tokenizers import FILES as TOKENIZER_FILES
from aiolora.lora.vectors import Factors, vector_pages
from aiolora.types import AdapterVersion, AnnouncedAdapter, LoRARequest, SitePages

logger = logging.getLogger(__name__)

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, TENSORS, *TOKENIZER_FILES)  # of a repository
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
MAX_CONFIG = 1 << 20

_ids = itertools.count(1)


@dataclass(frozen=True)
class AdapterWeights:
    """One version's pages in host memory, ready to be copied page by page."""

    version: AdapterVersion
    a: dict[int, list[Tensor]]  # kind -> pages [L, S, 8, K]
    b: dict[int, list[Tensor]]  # kind -> pages [L, 8, N]
    vectors: dict[int, Tensor]  # kind of site -> vector page [L, 2, N] float32
    blocks: list[Block] = field(default_factory=list)  # in the order of the version's
    folder: Path | None = None  # that it was read from


def load_adapter(request: LoRARequest | InMemory, outlines: Outlines) -> AdapterWeights:
    """Read, check and convert the adapter at `request.lora_path` (a folder or a hub repository), or in memory. Blocks.

    Raises an `AdapterError` that names the culprit; nothing is kept then.
    """
    name = request.lora_name
    if isinstance(request, InMemory):
        config = parse_config(name, request.config_json())
        _warn_of_base(name, config, outlines.limits)
        return _build(name, config, HeldTensors(request), outlines, request)
    folder = locate(name, request.lora_path)
    config = parse_config(name, read_file(name, folder / CONFIG, MAX_CONFIG))
    _warn_of_base(name, config, outlines.limits)
    with open_tensors(name, folder) as file:
        return replace(_build(name, config, file, outlines, request), folder=folder)


def check_adapter(request: LoRARequest, outlines: Outlines) -> AnnouncedAdapter:
    """All that the config and the header of the tensors say of the adapter at `request.lora_path`. Blocks.

    What only the tensors' bytes can tell (digest, values that are not finite) `load_adapter` finds. Raises as it.
    """
    name = request.lora_name
    folder = locate(name, request.lora_path)
    config = parse_config(name, read_file(name, folder / CONFIG, MAX_CONFIG))
    with open_tensors(name, folder) as file:
        found = outlines.of(name, config, file)
    nbytes = outlines.layout.pages_nbytes(found.pages)
    return AnnouncedAdapter(request=request, rank=found.rank, nbytes=nbytes, announced_at=time.time())


def _warn_of_base(name: str, config: PeftConfig, limits: Limits) -> None:
    if config.base_model_name_or_path and not _same_base(config.base_model_name_or_path, limits.base_model):
        logger.warning(
            "adapter %r was made for %r and is served on %r", name, config.base_model_name_or_path, limits.base_model
        )


def _build(
    name: str, config: PeftConfig, file: Tensors, outlines: Outlines, request: LoRARequest | InMemory
) -> AdapterWeights:
    layout, limits = outlines.layout, outlines.limits
    plan = outlines.of(name, config, file)
    kinds, pinned = layout.page_kinds, limits.pinned
    a_pages, b_pages, contents = fill(file, plan.filling, pinned=pinned)
    contents |= fill_fused(file, plan.fused, a_pages, b_pages, layout, threads())
    vectors, more = vector_pages(file, plan.vectors, Factors(a_pages, b_pages, plan.kind_scales), layout, pinned=pinned)
    contents |= more
    blocks, more = read_blocks(file, plan.brought, layout, limits.room.blocks, _enough(layout, limits), pinned=pinned)
    contents |= more
    _check_blocks(name, plan, blocks, layout)
    pages = plan.pages | ({kinds.blocks: len(blocks)} if blocks else {})
    version = AdapterVersion(
        id=next(_ids),
        name=name,
        digest=_digest(contents, plan),
        source=None if isinstance(request, InMemory) else request.lora_path,
        rank=plan.rank,
        pages=tuple(SitePages(kind, count, plan.kind_scales.get(kind, 1.0)) for kind, count in pages.items()),
        nbytes=layout.pages_nbytes(pages),
        base_model_name=request.base_model_name,
        loaded_at=time.time(),
        additive=not (vectors or plan.invocation or blocks or plan.vocabulary),
        invocation=plan.invocation,
        vocabulary=plan.vocabulary,
        blocks=spans_of(blocks),
    )
    return AdapterWeights(version, a_pages, b_pages, vectors, blocks)


def _enough(layout: Layout, limits: Limits) -> Callable[[int], int]:
    """What --lora-ends-memory must be for so many blocks, and all rank pages of the ends."""
    kinds = layout.page_kinds
    ranks = dict.fromkeys(kinds.ends, limits.full_ends)
    return lambda blocks: layout.pages_nbytes({**ranks, kinds.blocks: blocks})


def _check_blocks(name: str, plan: Outline, blocks: list[Block], layout: Layout) -> None:
    """What cannot be served beside rows that differ from the base's. Of a base on "meta" nobody knows which do."""
    over = {block.weight for block in blocks if not layout.weights[block.weight].base.is_meta}
    if over and plan.invocation:
        raise AdapterUnsupportedError(
            name,
            "alora_invocation_tokens with rows of its own, which in PEFT act on what is before the invocation, too; "
            "save it with save_embedding_layers=False",
        )
    ends = {layout.embed_tokens: EMBEDDING, layout.lm_head: HEAD}
    norms = [one.module for one in plan.vectors if one.magnitude is not None and ends.get(one.module) in over]
    if norms:
        raise AdapterUnsupportedError(
            name,
            f"{norms[0]} has DoRA over a weight that is not the base model's; serve that model as the base, or "
            "retrain without use_dora",
        )


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


def _digest(contents: dict[str, str], outline: Outline) -> str:
    """sha256 over every tensor's own and what the config adds."""
    lines = [f"{said}{contents[name]}\n" for name, said in outline.said.items() if name in contents]
    return hashlib.sha256(("".join(lines) + outline.added).encode()).hexdigest()


def _same_base(made_for: str, served: str) -> bool:
    """Whether both names may mean one model: equal last components, however they are spelled."""

    def core(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", Path(name).name.lower())

    return core(made_for).startswith(core(served)) or core(served).startswith(core(made_for))
