"""`ops.embedding` for CUDA: a program copies a block of columns of one token's row."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.launch import PDL, ceil_div, launch, power_of_2

_COLUMNS = 2048  # of a program


@triton.jit(do_not_specialize=["most", "vocabulary"])
def _embed(
    tokens, previous, weight, out, most, vocabulary,
    H: tl.constexpr, COLUMNS: tl.constexpr, CHAINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """CHAINED: the kernel behind it may be set up while it runs."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0)
    token = tl.load(tokens + t)
    if token < 0:
        token = tl.load(previous + tl.minimum(-1 - token, most))
    token = tl.minimum(tl.maximum(token, 0), vocabulary - 1)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < H
    row = tl.load(weight + token.to(tl.int64) * H + column, mask=inside)
    tl.store(out + t.to(tl.int64) * H + column, row, mask=inside)


def embed(tokens: Tensor, previous: Tensor, weight: Tensor) -> Tensor:
    """See `ops.embedding.embed`; `weight` is contiguous."""
    count, (vocabulary, hidden) = tokens.shape[0], weight.shape
    out = torch.empty((count, hidden), dtype=weight.dtype, device=weight.device)
    columns = min(power_of_2(hidden), _COLUMNS)
    # the first kernel of a step: what comes before it is a copy, which it could not be set up beside
    launch(
        _embed, (count, ceil_div(hidden, columns)),
        (tokens, previous, weight, out, previous.shape[0] - 1, vocabulary), H=hidden, COLUMNS=columns, CHAINED=PDL,
    )  # fmt: skip
    return out
