"""Token ids to vectors, tokens still in flight included: the host need not know an id for the device to use it.

An adapter may change the vectors: by a low-rank sum, x[t] += scale * b @ a[:, id of t], or by rows of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops.registration import define


def embed(tokens: Tensor, previous: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, H] for `tokens` [T] int32: [T, H].

    A token -(i + 1) stands for `previous[i]`, the token that the step before sampled at row i ([P] int32). Ids are
    clamped into the vocabulary: no id may read elsewhere.
    """
    return F.embedding(_ids(tokens, previous).clamp(max=weight.shape[0] - 1), weight)


def embed_shrink(
    tokens: Tensor, previous: Tensor, a: Tensor, pages: Tensor, scales: Tensor, owners: Tensor, kind: int
) -> Tensor:
    """`linear.shrink` of one-hot vectors: column id of A [1, P, 8, V] for each page of a token, scaled.

    `pages` and `scales` [G, kinds, W] and `owners` [T] as in `linear.Routing`; `tokens` as for `embed`. Float32
    [T, 1, W * 8], zeros where a token has no page.
    """
    held = pages[owners, kind]
    ids = _ids(tokens, previous).clamp(max=a.shape[3] - 1)
    h = a[0][held.clamp(min=0), :, ids.unsqueeze(1)].float()
    h = torch.where((held >= 0).unsqueeze(2), h * scales[owners, kind].unsqueeze(2), 0.0)
    return h.reshape(len(tokens), 1, -1)


def embed_own(x: Tensor, tokens: Tensor, previous: Tensor, rows: Tensor, table: Tensor, owners: Tensor) -> Tensor:
    """`x` [T, H] with the vectors of `blocks.Blocks` in the place of the base's; `tokens` as for `embed`."""
    size, blocks = rows.shape[1], table.shape[1]
    ids = _ids(tokens, previous)
    block = ids // size
    page = torch.where(block < blocks, table[owners, block.clamp(max=blocks - 1)], -1)
    return torch.where((page >= 0).unsqueeze(1), rows[page.clamp(min=0), ids % size], x)


def _ids(tokens: Tensor, previous: Tensor) -> Tensor:
    """Token ids, those in flight among them, none below zero."""
    in_flight = previous[(-1 - tokens).clamp(0, previous.shape[0] - 1)]
    return torch.where(tokens < 0, in_flight, tokens).clamp(min=0)


embed_op = define(
    embed,
    fake=lambda tokens, previous, weight: weight.new_empty((tokens.shape[0], weight.shape[1])),
    cuda="aiolora.ops.kernels.embedding",
)
embed_shrink_op = define(
    embed_shrink,
    fake=lambda tokens, previous, a, pages, scales, owners, kind: a.new_empty(
        (tokens.shape[0], 1, pages.shape[2] * a.shape[2]), dtype=torch.float32
    ),
)
embed_own_op = define(embed_own, fake=lambda x, tokens, previous, rows, table, owners: torch.empty_like(x))
