"""What the tensors of an adapter are, as PEFT names them: low-rank factors, whole weights, rows of trained tokens.

The embedding's factors are named apart (`lora_embedding_A` [r, V], `lora_embedding_B` [H, r]). A weight is saved whole
for `modules_to_save`, and as it was (`base_layer`, or plainly) where PEFT saves embeddings beside factors or tokens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from aiolora.errors import AdapterFormatError
from aiolora.lora.layout import EMBED_TOKENS, Layout
from aiolora.lora.tensorfile import Entry

_PREFIX = r"(?:base_model\.model\.)?(?P<module>[\w.]+?)"
_FACTOR = re.compile(_PREFIX + r"\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<weight>\.weight)?")
_WHOLE = re.compile(
    _PREFIX + r"(?P<kept>(?:\.token_adapter)?\.base_layer|\.original_module|\.modules_to_save)?\.weight"
)
_TOKENS = re.compile(_PREFIX + r"\.token_adapter\.trainable_tokens_delta")


class Factor(NamedTuple):
    """Which of a module's two factors a tensor is."""

    module: str
    letter: str  # A or B


def factor_of(key: str) -> Factor | None:
    """What the tensor `key` is if it is a low-rank factor."""
    match = _FACTOR.fullmatch(key)
    if match is None:
        return None
    of_embedding = stands_for_embedding(match["module"])
    if bool(match["embedding"]) != of_embedding or bool(match["weight"]) == of_embedding:
        return None
    return Factor(match["module"], match["factor"])


def stands_for_embedding(module: str) -> bool:
    return module == EMBED_TOKENS or module.endswith("." + EMBED_TOKENS.rpartition(".")[2])


def module_of(key: str, layout: Layout) -> str | None:
    """The module of the base that the tensor `key` belongs to, if it is one that an adapter may bring."""
    factor = factor_of(key)
    if factor is not None:
        return factor.module if factor.module in layout.targets else None
    match = _TOKENS.fullmatch(key) or _WHOLE.fullmatch(key)
    if match is None or not any(match["module"] in weight.rows for weight in layout.weights):
        return None
    return match["module"]


@dataclass(frozen=True)
class Contents:
    """An adapter's tensors by what they are."""

    factors: dict[str, dict[str, Entry]] = field(default_factory=dict)  # module -> letter -> tensor
    trained: dict[str, Entry] = field(default_factory=dict)  # module -> its weight, saved under the module's own name
    kept: dict[str, Entry] = field(default_factory=dict)  # module -> the weight below its factors or tokens
    tokens: dict[str, Entry] = field(default_factory=dict)  # module -> rows of trained tokens
    strange: list[str] = field(default_factory=list)  # none of these


def sort(adapter: str, entries: Iterable[Entry], layout: Layout) -> Contents:
    """Raises `AdapterFormatError` for what is no floats, and for a tensor that is there twice."""
    contents = Contents()
    for entry in entries:
        factor, tokens, whole = factor_of(entry.name), _TOKENS.fullmatch(entry.name), _WHOLE.fullmatch(entry.name)
        if not entry.dtype.is_floating_point:
            raise AdapterFormatError(adapter, f"{entry.name} holds {entry.dtype}, no floats")
        if factor is not None:
            place, key, what = contents.factors.setdefault(factor.module, {}), factor.letter, f"lora_{factor.letter}"
            module = factor.module
        elif tokens is not None and module_of(entry.name, layout):
            place, key, what, module = contents.tokens, tokens["module"], "trained tokens", tokens["module"]
        elif whole is not None and module_of(entry.name, layout):
            if whole["kept"] == ".modules_to_save":
                continue  # a second copy of what stands under the module's own name
            place = contents.kept if whole["kept"] else contents.trained
            key, what, module = whole["module"], "the weight", whole["module"]
        else:
            contents.strange.append(entry.name)
            continue
        if key in place:
            raise AdapterFormatError(adapter, f"{entry.name} names {what} of {module} a second time")
        place[key] = entry
    return contents
