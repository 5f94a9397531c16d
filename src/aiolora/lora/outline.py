"""What an adapter will be, as its config and its tensors' names and shapes say: checked before any of them is read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from aiolora.errors import (
    AdapterFormatError,
    AdapterMemoryError,
    AdapterMismatchError,
    AdapterRankError,
    AdapterUnsupportedError,
)
from aiolora.lora.adapter import PeftConfig, stands_for, weight_of
from aiolora.lora.brought import Brought, brought
from aiolora.lora.contents import BIAS, VECTORS, A, B, Contents, sort, stands_for_embedding, trained_vectors
from aiolora.lora.experts import AllExperts, take_fused
from aiolora.lora.kinds import Room
from aiolora.lora.layout import Layout, Place, Target
from aiolora.lora.paging import Filling, Module
from aiolora.lora.tensorfile import Entry
from aiolora.lora.vectors import Vectors
from aiolora.ops.linear import RANKS_PER_PAGE

_MAX_SCALE = 1e4  # alpha / r is of order 1; float32 and bfloat16 hold products with it


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""

    max_rank: int
    room: Room  # pages on the device
    base_model: str  # the served base, to warn of an adapter made for another name
    full_ends: int = 0  # rank pages of embedding and head that there are where --lora-ends-memory is large enough
    pinned: bool = False  # pages in page-locked memory, from where a GPU copies while it computes


@dataclass(frozen=True)
class Outline:
    """All of it but the values, and which of its rows are the base's. Nobody writes it: it is of all that are alike."""

    entries: dict[str, Entry]
    filling: Filling
    fused: list[AllExperts]
    vectors: list[Vectors]
    scales: dict[str, float]  # of each module
    kind_scales: dict[int, float]
    pages: dict[int, int]  # kind of pages -> count, without blocks
    rank: int  # the largest
    vocabulary: int  # 0: the base's
    brought: list[Brought]
    invocation: tuple[int, ...]

    @cached_property
    def said(self) -> dict[str, str]:
        """What the digest says of each tensor beside its own, by name, in order."""
        entries = sorted(self.entries.values())
        return {entry.name: f"{entry.name} {entry.dtype} {list(entry.shape)} " for entry in entries}

    @cached_property
    def added(self) -> str:
        """What the digest says beside the tensors: two configs with one set of tensors differ."""
        lines = [f"{module} {scale!r}\n" for module, scale in sorted(self.scales.items())]
        lines += [f"{one.weight} {one.tokens.name} {list(one.rows)}\n" for one in self.brought if one.tokens]
        if self.invocation:
            lines.append(f"invocation {self.invocation}\n")
        return "".join(lines)


def outline(name: str, config: PeftConfig, entries: dict[str, Entry], layout: Layout, limits: Limits) -> Outline:
    """Raises an `AdapterError` for whatever can be told from these."""
    found = sort(name, config, entries.values(), layout)
    fused = take_fused(name, config, found, layout)
    _check_parts(name, config, found, fused, layout)
    vocabulary, rows = brought(name, config, found, layout)
    invocation = tuple(config.alora_invocation_tokens or ())
    if invocation:
        _check_activated(name, config, found, layout)
    ranks: dict[int, int] = {}
    scales: dict[str, float] = {}
    adapted = dict(sorted(found.adapted.items()))
    kinds = {module: layout.targets[module].kind for module in adapted}
    kinds |= {parameter: one.target.kind for parameter, one in fused.items()}
    for module, kind in kinds.items():
        written = found.written[module]  # what patterns were written for
        if module in fused:
            rank = fused[module].rank
        else:
            rank = _checked_rank(name, config, written, adapted[module], layout.targets[module])
        if rank > limits.max_rank:
            raise AdapterRankError(
                name,
                f"rank {rank} of {module} exceeds max_lora_rank={limits.max_rank}; start with --max-lora-rank {rank}",
            )
        scales[module] = config.scale(written, rank)
        ranks[kind] = max(ranks.get(kind, 0), rank)
    pages = {kind: -(-rank // RANKS_PER_PAGE) for kind, rank in sorted(ranks.items())}
    _check_room(name, pages, layout, limits)
    kind_scales = _kind_scales(name, scales, kinds)
    ratios = {module: scales[module] / (kind_scales[kind] or 1.0) for module, kind in kinds.items()}
    modules = [Module(own[A], own[B], layout.targets[module], ratios[module]) for module, own in adapted.items()]
    whole = [one._replace(ratio=ratios[parameter]) for parameter, one in fused.items()]
    vectors = [
        Vectors(module, layout.targets[module], scales.get(module, 0.0), *map(own.get, VECTORS))
        for module, own in sorted(found.parts.items())
        if own.keys() & set(VECTORS)
    ]
    pages |= dict.fromkeys(sorted({layout.page_kinds.vectors_of(one.target.kind) for one in vectors}), 1)
    rank = max(ranks.values())
    later = frozenset(place for one in whole for place in one.places(layout))
    sites = {kind: count for kind, count in pages.items() if kind < layout.page_kinds.sites}
    filling = Filling(layout, modules, sites, later)
    return Outline(entries, filling, whole, vectors, scales, kind_scales, pages, rank, vocabulary, rows, invocation)


def _check_parts(
    name: str, config: PeftConfig, contents: Contents, fused: Mapping[str, AllExperts], layout: Layout
) -> None:
    """Every tensor must be served, no part of a module missing, every target there."""
    found, adapted, strange = contents.parts, contents.adapted, contents.strange
    beside = [part for part in trained_vectors(config) if part != BIAS]
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
    if not adapted and not fused:
        raise AdapterFormatError(name, "adapter_model.safetensors holds no LoRA tensors")
    for module, own in sorted(adapted.items()):
        if not {A, B} <= own.keys():
            alone = min(part for part in own if part != BIAS)
            raise AdapterFormatError(name, f"{module} has {alone} alone, without its pair")
        if missing := [part for part in beside if part not in own]:
            raise AdapterFormatError(
                name, f"{module} has no {missing[0]}, and adapter_config.json says that it was trained"
            )
    if outside := sorted(module for module in found if module not in layout.targets):
        raise AdapterMismatchError(
            name,
            f"{len(outside)} modules are not in the base model or take no adapters (--lora-target-modules): "
            f"{outside[:3]}; it was made for {config.base_model_name_or_path!r}",
        )
    served = _check_once(name, contents, fused, layout)
    if isinstance(config.target_modules, list):
        targets = _modules(adapted, layout)
        heads = [end.rpartition(".")[2] for end in (layout.embed_tokens, layout.lm_head)]
        for wanted in config.target_modules:
            ends = layout.meant(wanted)
            meant = [module for module in targets if any(stands_for(end, module) for end in ends)]
            if not meant and wanted.rpartition(".")[2] in heads and not config.spares(wanted):
                raise AdapterFormatError(name, f"target_modules names {wanted!r}, but no tensor belongs to it")
            # any other name that stands for nothing is of another model: PEFT passes it by
            if bare := [
                module for module in meant if targets[module].place not in served and not config.spares(module)
            ]:
                raise AdapterFormatError(
                    name,
                    f"target_modules names {wanted!r}, but no tensor belongs to it in {len(bare)} of {len(meant)} "
                    f"modules: {bare[:3]}",
                )
    for wanted in config.target_parameters or ():
        if bare := [
            module
            for module in layout.targets
            if any(stands_for(end, weight_of(module)) for end in layout.meant(wanted))
            and layout.targets[module].place not in served
        ]:
            raise AdapterFormatError(
                name,
                f"target_parameters names {wanted!r}, but no tensor belongs to it in {len(bare)} modules: {bare[:3]}",
            )
    for module, own in sorted(found.items()):
        _check_vectors(name, config, module, own, layout)


def _modules(adapted: Iterable[str], layout: Layout) -> dict[str, Target]:
    """What target_modules can mean: no routed experts where the adapter's model has each layer's in one parameter."""

    def of_expert(target: Target) -> bool:
        return layout.kinds[target.kind].experts > 0

    apart = any(of_expert(layout.targets[module]) for module in adapted)
    return {module: target for module, target in layout.targets.items() if apart or not of_expert(target)}


def _check_once(name: str, contents: Contents, fused: Mapping[str, AllExperts], layout: Layout) -> dict[Place, str]:
    """What of the pages is served, and by which name of the file. No two may mean the same."""
    served: dict[Place, str] = {}
    places = {module: [layout.targets[module].place] for module in contents.adapted}
    places |= {parameter: list(one.places(layout)) for parameter, one in fused.items()}
    for module, own in places.items():
        for place in own:
            if (other := served.setdefault(place, module)) != module:
                raise AdapterFormatError(name, f"{module} and {other} are one module of the base model")
    return served


def _check_activated(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> None:
    """What an aLoRA may not have, for PEFT puts only low-rank factors of linear modules to sleep."""
    towers = layout.page_kinds.of_towers
    if early := [module for module in contents.adapted if layout.targets[module].kind in towers]:
        raise AdapterUnsupportedError(
            name,
            f"alora_invocation_tokens with factors of {early[0]}, which acts before there are tokens to invoke it; "
            "retrain with target_modules of the language model only",
        )
    awake = [module for module in contents.adapted if stands_for_embedding(module)]
    awake += [f"{module}.bias" for module, own in contents.parts.items() if BIAS in own]
    awake += contents.tokens
    awake += [module for module in contents.trained if config.saves(module)]
    if awake:
        raise AdapterUnsupportedError(
            name,
            f"alora_invocation_tokens with trained {sorted(awake)[:2]}, which in PEFT act on what is before the "
            "invocation, too; retrain with low-rank factors of linear modules only",
        )


def _check_vectors(name: str, config: PeftConfig, module: str, own: dict[str, Entry], layout: Layout) -> None:
    """What the module has beside lora_A and lora_B must be of the base model's shape."""
    target = layout.targets[module]
    if layout.kinds[target.kind].experts and (more := own.keys() & set(VECTORS)):
        raise AdapterUnsupportedError(
            name, f"{module}, a routed expert, has {min(more)}; retrain with low-rank factors only"
        )
    for part in own.keys() & set(VECTORS):
        if own[part].shape != (target.outputs,):
            raise AdapterMismatchError(
                name,
                f"{module} has {part} {list(own[part].shape)}, the base model needs [{target.outputs}]; it was "
                f"made for {config.base_model_name_or_path!r}",
            )
    if BIAS in own and target.bias is None:
        raise AdapterMismatchError(
            name,
            f"{module} has a bias, the base model's has none; it was made for {config.base_model_name_or_path!r}",
        )


def _check_room(name: str, pages: dict[int, int], layout: Layout, limits: Limits) -> None:
    """Each kind must have room for so many rank pages (kind -> count)."""
    kinds = layout.page_kinds
    there = limits.room.pages(kinds)
    for kind, count in pages.items():
        if count > there[kind]:
            half = count * sum(layout.page_nbytes(end) for end in kinds.ends)
            way_out = f"start with --lora-ends-memory {2 * half}" if kind in kinds.ends else "raise --lora-memory"
            if kind in kinds.experts:
                whole = count * sum(map(layout.page_nbytes, range(kinds.layers)))
                way_out = f"start with --lora-memory {whole} or more"
            raise AdapterMemoryError(
                name,
                f"needs {count} rank pages of {layout.kinds[kind].name}, the room for adapters has {there[kind]}; "
                + way_out,
            )


def _checked_rank(name: str, config: PeftConfig, module: str, own: dict[str, Entry], target: Target) -> int:
    a, b, inputs, outputs = own[A], own[B], target.inputs, target.outputs
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
        raise AdapterFormatError(name, f"{module} has rank {rank}, adapter_config.json says {config.rank(module)}")
    return rank


def _kind_scales(name: str, scales: dict[str, float], kinds: dict[str, int]) -> dict[int, float]:
    """The one scale of each kind: the largest of its modules'. The others have the ratio folded into B."""
    kind_scales: dict[int, float] = {}
    for module, scale in scales.items():
        kind = kinds[module]
        if not math.isfinite(scale) or abs(scale) > _MAX_SCALE:
            raise AdapterFormatError(name, f"{module} has the scale {scale}; the limit is {_MAX_SCALE:g}")
        if abs(scale) >= abs(kind_scales.get(kind, 0.0)):
            kind_scales[kind] = scale
    return kind_scales
