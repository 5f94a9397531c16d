"""Token ids to vectors, tokens still in flight included: the host need not know an id for the device to use it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops.registration import define


def embed(tokens: Tensor, previous: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, H] for `tokens` [T] int32: [T, H].

    A token -(i + 1) stands for `previous[i]`, the token that the step before sampled at row i ([P] int32). Ids are
    clamped into the vocabulary: no id may read elsewhere.
    """
    in_flight = previous[(-1 - tokens).clamp(0, previous.shape[0] - 1)]
    return F.embedding(torch.where(tokens < 0, in_flight, tokens).clamp(0, weight.shape[0] - 1), weight)


embed_op = define(
    embed,
    fake=lambda tokens, previous, weight: weight.new_empty((tokens.shape[0], weight.shape[1])),
    cuda="aiolora.ops.kernels.embedding",
)
