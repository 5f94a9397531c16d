"""Rows that the mixes of a step have in the place of the base's, as numbers for the device and back as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aiolora.lora.layout import EMBEDDING, HEAD, NORMS
from aiolora.models.inputs import StepInputs
from aiolora.ops.blocks import Blocks, OwnNorms
from aiolora.types import BlockSpan

Own: TypeAlias = Sequence[Sequence[tuple[BlockSpan, Sequence[int]]]]  # of each mix: blocks and their pages
Ints: TypeAlias = NDArray[np.int32]


def trunk_numbers(own: Own, mixes: Ints) -> dict[str, NDArray[Any]]:
    """Of the embedding and the norms, for tokens of `mixes` [T] (-1: none)."""
    numbers: dict[str, NDArray[Any]] = {}
    if has(own, EMBEDDING):
        numbers |= {"embedding_table": _table(own, EMBEDDING), "embedding_owners": _owners(own, mixes)}
    if has(own, NORMS):
        table, owners = _table(own, NORMS), _owners(own, mixes)
        tokens = (table.max(1) >= 0)[owners].nonzero()[0].astype(np.int32)
        numbers |= {"norm_pages": table[owners[tokens]], "norm_tokens": tokens}
    return numbers


def trunk_inputs(step: StepInputs, tensors: Mapping[str, Tensor], rows: Tensor | None, *, embeds: bool) -> StepInputs:
    """`step` with what `trunk_numbers` became; `rows`: the pool's; `embeds`: see `StepInputs`."""
    embeddings = norms = None
    if rows is not None and "embedding_table" in tensors:
        embeddings = Blocks(rows, tensors["embedding_table"], tensors["embedding_owners"])
    if rows is not None and "norm_pages" in tensors:
        norms = OwnNorms(rows, tensors["norm_pages"], tensors["norm_tokens"])
    return replace(step, embeds=embeds, own_embeddings=embeddings, own_norms=norms)


def head_numbers(own: Own, mixes: Ints) -> dict[str, NDArray[Any]]:
    """Of the head, for positions of `mixes` [S] (-1: none)."""
    return {"head_table": _table(own, HEAD), "head_owners": _owners(own, mixes)} if has(own, HEAD) else {}


def head_blocks(tensors: Mapping[str, Tensor], rows: Tensor | None) -> Blocks | None:
    """What `head_numbers` became."""
    if rows is None or "head_table" not in tensors:
        return None
    return Blocks(rows, tensors["head_table"], tensors["head_owners"])


def has(own: Own, weight: int) -> bool:
    """Whether any mix has rows of its own there."""
    return any(span.weight == weight for blocks in own for span, _ in blocks)


def _table(own: Own, weight: int) -> Ints:
    """The page of each block of each mix, -1 where it is the base's; the last row is of those without a mix."""
    held = [(mix, span, pages) for mix, blocks in enumerate(own) for span, pages in blocks if span.weight == weight]
    table = np.full((len(own) + 1, max(span.high for _, span, _ in held)), -1, dtype=np.int32)
    for mix, span, pages in held:
        table[mix, span.low : span.high] = pages
    return table


def _owners(own: Own, mixes: Ints) -> Ints:
    return np.where(mixes >= 0, mixes, len(own)).astype(np.int32)
