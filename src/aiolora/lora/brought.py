"""Which rows of the base's embedding, head and norms an adapter brings, by its config and its tensors.

PEFT's meaning: a weight in `modules_to_save` replaces the base's; one that was kept below factors or trained tokens is
the base's, which the file overwrites, and with a tied head that is one tensor for both ends. Trained tokens of an
embedding are the tied head's too, unless it has its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiolora.errors import AdapterFormatError, AdapterMismatchError, AdapterUnsupportedError
from aiolora.lora.adapter import PeftConfig
from aiolora.lora.contents import Contents
from aiolora.lora.layout import EMBEDDING, NORMS, Layout
from aiolora.lora.tensorfile import Entry

_ADDED, _ADDED_SHARE = 1024, 8  # tokens that an adapter may add: so many, or that part of the base's


@dataclass(frozen=True)
class Brought:
    """What an adapter brings of one weight of the base."""

    weight: int  # index in the layout
    whole: Mapping[int, Entry] = field(default_factory=dict)  # first row -> rows that follow each other, one or many
    rows: Sequence[int] = ()  # where those of `tokens` belong, over those of `whole`
    tokens: Entry | None = None  # [n, H]
    closed: Mapping[int, str] = field(default_factory=dict)  # first rows of modules that take no adapters


def brought(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> tuple[int, list[Brought]]:
    """The size of its vocabulary (0: the base's), and what it brings of each weight of which it brings anything.

    Raises `AdapterFormatError` for what is missing or malformed, `AdapterMismatchError` for shapes of another base and
    `AdapterUnsupportedError` for what PEFT cannot run itself.
    """
    _check_named(name, config, contents, layout)
    own_vocabulary = _vocabulary(name, config, contents, layout)
    vocabulary = own_vocabulary or len(layout.weights[EMBEDDING].base)
    found = []
    for index, weight in enumerate(layout.weights):
        whole: dict[int, Entry] = {}
        tokens, ids = None, list[int]()
        for module, first in weight.rows.items():
            entry = _whole(config, contents, layout, module)
            if index != NORMS:
                tokens, ids = _tokens(name, config, contents, layout, module, vocabulary)
            if entry is not None:
                width = weight.base.shape[1]
                _check_shape(name, config, entry, (width,) if index == NORMS else (vocabulary, width))
                whole[first] = entry
            if module in contents.parts and (module in contents.tokens or config.saves(module)):
                raise AdapterUnsupportedError(
                    name,
                    f"{module} has low-rank factors and trained tokens or a whole weight, which PEFT does not train "
                    "together; retrain with one of them",
                )
        if whole or tokens is not None:
            closed = {first: module for module, first in weight.rows.items() if module not in weight.taken}
            found.append(Brought(index, whole, ids, tokens, closed))
    return own_vocabulary, found


def _whole(config: PeftConfig, contents: Contents, layout: Layout, module: str) -> Entry | None:
    """The weight of `module` in the file; at an end of a tied model that has none of its own, the other end's base."""
    entry = contents.trained.get(module, contents.kept.get(module))
    ends = layout.embed_tokens, layout.lm_head
    other = dict(zip(ends, reversed(ends))).get(module) if layout.tied else None
    if entry is not None or other is None:
        return entry
    return contents.kept.get(other) or (None if config.saves(other) else contents.trained.get(other))


def _vocabulary(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> int:
    """How many tokens there are once the embedding was resized; 0: as many as the base has."""
    vocabulary, width = layout.weights[EMBEDDING].base.shape
    ends = {module: _whole(config, contents, layout, module) for module in (layout.embed_tokens, layout.lm_head)}
    sizes = {module: entry.shape[0] for module, entry in ends.items() if entry and entry.shape[1:] == (width,)}
    if all(size == vocabulary for size in sizes.values()):
        return 0
    if len(sizes) < len(ends) or len(set(sizes.values())) > 1:
        raise AdapterUnsupportedError(
            name,
            f"the vocabulary was resized to {sizes}, the base model has {vocabulary} tokens, and PEFT saved no rows of "
            "that many for the other end; save both with modules_to_save, or serve the resized model as the base",
        )
    if ranked := [module for module in ends if module in contents.parts]:
        raise AdapterUnsupportedError(
            name,
            f"{ranked} have low-rank factors over a resized vocabulary of {sizes[ranked[0]]} tokens, the base model "
            f"has {vocabulary}; retrain with modules_to_save or trainable_token_indices, or serve the resized model as "
            "the base",
        )
    size = next(iter(sizes.values()))
    if size - vocabulary > (most := max(_ADDED, vocabulary // _ADDED_SHARE)):
        raise AdapterUnsupportedError(
            name,
            f"adds {size - vocabulary} tokens to the base model's {vocabulary}, which make everybody's logits wider; "
            f"at most {most} are served beside others; serve the resized model as the base",
        )
    return size


def _tokens(
    name: str, config: PeftConfig, contents: Contents, layout: Layout, module: str, vocabulary: int
) -> tuple[Entry | None, list[int]]:
    """The rows of trained tokens of `module`, and where they belong."""
    embed_tokens, lm_head = layout.embed_tokens, layout.lm_head
    source = embed_tokens if layout.tied and module == lm_head and lm_head not in contents.tokens else module
    entry = contents.tokens.get(source)
    if entry is None or (source != module and module in contents.trained):
        return None, []
    ids = config.trained_tokens(source, embedding=source == embed_tokens)
    if ids is None and layout.tied and source == lm_head:  # its copy of the embedding's, saved beside a resized base
        ids = config.trained_tokens(embed_tokens, embedding=True)
    width = layout.weights[EMBEDDING].base.shape[1]
    if ids is None:
        raise AdapterFormatError(name, f"{entry.name} is there, and trainable_token_indices names no token of {source}")
    if entry.shape != (len(ids), width):
        raise AdapterMismatchError(
            name,
            f"{entry.name} has the shape {list(entry.shape)}, trainable_token_indices and the base model say "
            f"{[len(ids), width]}; it was made for {config.base_model_name_or_path!r}",
        )
    if bad := [token for token in ids if not 0 <= token < vocabulary]:
        raise AdapterMismatchError(
            name, f"trainable_token_indices names {bad[:3]}, the vocabulary has {vocabulary} tokens"
        )
    if len(set(ids)) < len(ids):
        raise AdapterFormatError(name, "trainable_token_indices names a token twice")
    return entry, ids


def _check_named(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> None:
    """What the config says was trained must be there."""
    for weight in layout.weights:
        for module in weight.rows:
            if config.saves(module) and module not in contents.trained:
                raise AdapterFormatError(name, f"modules_to_save names {module}, but no tensor belongs to it")
    rows = {module for weight in layout.weights for module in weight.rows}
    ends = [module for module in (layout.embed_tokens, layout.lm_head) if module in rows]
    named = [end for end in ends if config.trained_tokens(end, embedding=end == layout.embed_tokens)]
    if layout.tied and layout.embed_tokens in contents.tokens:
        named = []  # the tied head's are saved only where they differ
    for module in named:
        if module not in contents.tokens:
            raise AdapterFormatError(name, f"trainable_token_indices names {module}, but no tensor belongs to it")


def _check_shape(name: str, config: PeftConfig, entry: Entry, wanted: tuple[int, ...]) -> None:
    if entry.shape != wanted:
        raise AdapterMismatchError(
            name,
            f"{entry.name} has the shape {list(entry.shape)}, the base model's is {list(wanted)}; it was made for "
            f"{config.base_model_name_or_path!r}",
        )
