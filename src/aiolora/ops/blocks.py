"""Rows of a weight (embedding, head, norms) that an adapter has in the place of the base's, in blocks of 128.

A weight [R, H] is paged like memory: an adapter with rows of its own holds a page for each block in which there are
any, the base's rows filled in; where it holds none the base's weight is read. A whole weight is all of its blocks.

Shapes: S positions (or tokens), P pages, M mixes with rows of their own, B blocks of the weight.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from aiolora.ops.norm import rms_norm
from aiolora.ops.registration import define

ROWS_PER_BLOCK = 128


class Blocks(NamedTuple):
    """Who has which blocks of one weight in a step."""

    rows: Tensor  # [P, 128, H], the pool's
    table: Tensor  # [M + 1, B] int32: the page of each block; -1: the base's; the last is of those without own rows
    owners: Tensor  # [S] int32, rows of the table


class OwnNorms(NamedTuple):
    """Which tokens of a step have norms of their own: rows 2 * layer, 2 * layer + 1 and, last, the decoder's own."""

    rows: Tensor  # [P, 128, H], the pool's
    pages: Tensor  # [N, B] int32, as in `Blocks.table`
    tokens: Tensor  # [N] int32


def own_logits(
    logits: Tensor, hidden: Tensor, rows: Tensor, table: Tensor, owners: Tensor, perm: Tensor, tiles: Tensor, tile: int
) -> None:
    """Write hidden[s] @ row[v] over `logits` [S, V] wherever position s has a row of its own for token v.

    `rows`, `table` and `owners` as in `Blocks`; `perm` [S], `tiles` [G, 2] and `tile` as in `linear.Routing`: positions
    of a tile have one owner.
    """
    size, vocabulary = rows.shape[1], logits.shape[1]
    held = table.tolist()
    for start, count in tiles.tolist():
        if count == 0:
            continue
        positions = perm[start : start + count]
        pages = held[int(owners[positions[0]])]
        for low, high in _runs(pages):
            first, last = low * size, min(high * size, vocabulary)
            own = rows[pages[low] : pages[low] + high - low].flatten(0, 1)[: last - first]
            logits[positions, first:last] = (hidden[positions] @ own.T).to(logits.dtype)


def own_norm(
    x: Tensor,
    residual: Tensor,
    base: Tensor,
    rows: Tensor,
    pages: Tensor,
    tokens: Tensor,
    number: int,
    eps: float,
    offset: float = 0.0,
) -> Tensor:
    """`x` [T, H], the norm of `residual` with the weight `base` [H], anew for `tokens`: with row `number` of their own.

    `rows`, `pages` and `tokens` as in `OwnNorms`.
    """
    block, row = divmod(number, rows.shape[1])
    if block >= pages.shape[1]:
        return x.clone()
    page = pages[:, block]
    weight = torch.where((page >= 0).unsqueeze(1), rows[page.clamp(min=0), row], base)
    return x.index_copy(0, tokens.long(), rms_norm(residual[tokens], weight, eps, offset).to(x.dtype))


def _runs(pages: list[int]) -> list[tuple[int, int]]:
    """[low, high) of consecutive blocks whose pages follow each other: their rows are one matrix as they lie."""
    runs = []
    for _, group in itertools.groupby(
        (block for block, page in enumerate(pages) if page >= 0), key=lambda block: pages[block] - block
    ):
        blocks = list(group)
        cuts = [0, *(i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1] + 1), len(blocks)]
        runs += [(blocks[low], blocks[high - 1] + 1) for low, high in itertools.pairwise(cuts)]
    return runs


own_logits_op = define(
    own_logits,
    fake=lambda logits, hidden, rows, table, owners, perm, tiles, tile: None,
    mutates=("logits",),
    cuda="aiolora.ops.kernels.blocks",
)
own_norm_op = define(
    own_norm, fake=lambda x, residual, base, rows, pages, tokens, number, eps, offset=0.0: torch.empty_like(x)
)
