"""What the tensors of an adapter are, as PEFT names them: low-rank factors, vectors, whole weights, trained tokens.

The embedding's factors are named apart (`lora_embedding_A` [r, V], `lora_embedding_B` [H, r]). A weight is saved whole
for `modules_to_save`, and as it was (`base_layer`, or plainly) where PEFT saves embeddings beside factors or tokens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from aiolora.errors import AdapterFormatError
from aiolora.lora.adapter import PeftConfig
from aiolora.lora.layout import Layout
from aiolora.lora.tensorfile import Entry

_PREFIX = r"(?:base_model\.model\.)?(?P<module>[\w.]+?)"
_PART = re.compile(
    _PREFIX + r"\.(?:(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<vector>lora_magnitude_vector|lora_B\.bias)|(?:base_layer\.)?(?P<bias>bias))"
)
_WHOLE = re.compile(
    _PREFIX + r"(?P<kept>(?:\.token_adapter)?\.base_layer|\.original_module|\.modules_to_save)?\.weight"
)
_TOKENS = re.compile(_PREFIX + r"\.token_adapter\.trainable_tokens_delta")


_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")  # what models call the one of their tokens

A, B = "lora_A", "lora_B"
VECTORS = MAGNITUDE, FACTOR_BIAS, BIAS = "lora_magnitude_vector", "lora_B.bias", "bias"  # beside them, [N] each


class Part(NamedTuple):
    """Which part of a module a tensor is."""

    module: str
    name: str  # A, B or one of VECTORS


def part_of(key: str) -> Part | None:
    """What the tensor `key` is if it is one of a module's low-rank factors, or a vector beside them."""
    match = _PART.fullmatch(key)
    if match is None:
        return None
    of_embedding = stands_for_embedding(match["module"])
    if (match["embedding"] and not of_embedding) or (match["factor"] and of_embedding):
        return None
    letter = match["embedding"]
    return Part(match["module"], f"lora_{letter}" if letter else match["factor"] or match["vector"] or match["bias"])


def trained_vectors(config: PeftConfig) -> list[str]:
    """Those of VECTORS that `config` says were trained."""
    said = (config.use_dora, config.lora_bias, config.bias != "none")
    return [name for name, trained in zip(VECTORS, said) if trained]


def stands_for_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS


def module_of(key: str, layout: Layout) -> str | None:
    """The module of the base that the tensor `key` belongs to, if it is one that an adapter may bring."""
    part = part_of(key)
    if part is not None:
        module = layout.named(part.module)
        known = module in layout.targets or module.removesuffix(".base_layer") in layout.fused
        return module if known else None
    match = _TOKENS.fullmatch(key) or _WHOLE.fullmatch(key)
    if match is None:
        return None
    module = layout.named(match["module"])
    return module if any(module in weight.rows for weight in layout.weights) else None


@dataclass(frozen=True)
class Contents:
    """An adapter's tensors by what they are."""

    parts: dict[str, dict[str, Entry]] = field(default_factory=dict)  # module -> part -> tensor
    trained: dict[str, Entry] = field(default_factory=dict)  # module -> its weight, saved under the module's own name
    kept: dict[str, Entry] = field(default_factory=dict)  # module -> the weight below its factors or tokens
    tokens: dict[str, Entry] = field(default_factory=dict)  # module -> rows of trained tokens
    strange: list[str] = field(default_factory=list)  # none of these
    written: dict[str, str] = field(default_factory=dict)  # module, or parameter -> the name that the file has for it

    @property
    def adapted(self) -> dict[str, dict[str, Entry]]:
        """Parts of the modules of which more than the bias was trained."""
        return {module: own for module, own in self.parts.items() if own.keys() != {BIAS}}


def sort(adapter: str, config: PeftConfig, entries: Iterable[Entry], layout: Layout) -> Contents:
    """Vectors that the config says nothing of are strange.

    Raises `AdapterFormatError` for what is no floats, and for a tensor that is there twice.
    """
    known = {A, B, *trained_vectors(config)}
    contents = Contents()
    for entry in entries:
        part, tokens, whole = part_of(entry.name), None, None
        if part is None or part.name not in known:  # some hundred others are not matched against what they are not
            tokens, whole = _TOKENS.fullmatch(entry.name), _WHOLE.fullmatch(entry.name)
        if part is not None:
            named = layout.named(part.module)
            if (other := contents.written.setdefault(named, part.module)) != part.module:
                raise AdapterFormatError(adapter, f"{part.module} and {other} are one module of the base model")
            part = part._replace(module=named)
        if part is not None and part.name in known:
            place, key, what, module = contents.parts.setdefault(part.module, {}), part.name, part.name, part.module
        elif tokens is not None and (base := module_of(entry.name, layout)):
            place, key, what, module = contents.tokens, base, "trained tokens", base
        elif whole is not None and (base := module_of(entry.name, layout)):
            if whole["kept"] == ".modules_to_save":
                continue  # a second copy of what stands under the module's own name
            place = contents.kept if whole["kept"] else contents.trained
            key, what, module = base, "the weight", base
        else:
            contents.strange.append(entry.name)
            continue
        if not entry.dtype.is_floating_point:
            raise AdapterFormatError(adapter, f"{entry.name} holds {entry.dtype}, no floats")
        if key in place:
            raise AdapterFormatError(adapter, f"{entry.name} names {what} of {module} a second time")
        place[key] = entry
    return contents
