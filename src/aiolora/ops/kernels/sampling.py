"""Sampling without a sort. A row's vocabulary is cut into blocks, whose statistics many programs find at once; one
program a row then puts them together and, where a row truncates, finds the least logit kept by bisection over the row.

Sums are taken in an order that depends on V alone: a row's result does not depend on who else is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops import sampling
from aiolora.ops.kernels.launch import INTERPRETED, PDL, ceil_div, launch, power_of_2

BLOCK = 64 if INTERPRETED else 4096  # logits a block of statistics
SPAN = 128 if INTERPRETED else 8192  # logits at a time of a pass over a row
GREEDY_BELOW = tl.constexpr(sampling.GREEDY_BELOW)
UNDERFLOW = tl.constexpr(104.0)  # exp(-104) is 0 in float32


@triton.jit
def _inverse(temperature):
    """1 / temperature; 1 for greedy rows, which do not use it."""
    return 1.0 / tl.where(temperature < GREEDY_BELOW, 1.0, temperature)


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr", "temperature_ptr"])
def _statistics(
    logits_ptr, tokens_ptr, temperature_ptr, stats_ptr, V, stride,
    COUNTS: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one block, for `stats` [B, 3, blocks]: its largest logit, the sum of exp((x - largest) / temperature), and the
    id of the largest or (COUNTS) how many logits are over that of the row's token. NaN anywhere makes the sum NaN.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block, row = tl.program_id(0), tl.program_id(1)
    logits_ptr += row.to(tl.int64) * stride
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    number = tl.where(x == x, x, float("-inf"))
    top = tl.max(number, 0)
    base = tl.where(top == float("-inf"), 0.0, top)  # a block of -inf has sum 0
    inverse = 1.0
    if WARM:
        inverse = _inverse(tl.load(temperature_ptr + row).to(tl.float32))
    total = tl.sum(tl.exp((x - base) * inverse), 0)
    if COUNTS:
        chosen = tl.load(logits_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
        third = tl.sum((x > chosen).to(tl.float32), 0)
    else:
        third = tl.min(tl.where(number == top, ids, V), 0).to(tl.float32)
    stats_ptr += row * 3 * tl.num_programs(0) + block
    tl.store(stats_ptr, top)
    tl.store(stats_ptr + tl.num_programs(0), total)
    tl.store(stats_ptr + 2 * tl.num_programs(0), third)


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr"])
def _combine(
    logits_ptr, tokens_ptr, stats_ptr, logprobs_ptr, out_ptr, stride,
    COUNTS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's log-probability, and its likeliest token or (COUNTS) the rank of its token."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    stats_ptr += row * 3 * BLOCKS + lane
    tops = tl.load(stats_ptr, mask=lane < BLOCKS, other=float("-inf"))
    sums = tl.load(stats_ptr + BLOCKS, mask=lane < BLOCKS, other=0.0)
    third = tl.load(stats_ptr + 2 * BLOCKS, mask=lane < BLOCKS, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp(tops - top), 0)
    chosen = top
    if COUNTS:
        chosen = tl.load(logits_ptr + row.to(tl.int64) * stride + tl.load(tokens_ptr + row)).to(tl.float32)
        out = tl.sum(third, 0)
    else:
        out = tl.min(tl.where((tops == top) & (lane < BLOCKS), third, float("inf")), 0)
    tl.store(out_ptr + row, out.to(tl.int32))
    tl.store(logprobs_ptr + row, (chosen - top) - tl.log(total))


@triton.jit
def _weights(x, top, inverse, min_p, least):
    """Unnormalised probabilities of logits `x`; 0 where min_p or the least logit kept says so."""
    weight = tl.exp((x - top) * inverse)
    return tl.where((weight >= min_p) & (x >= least), weight, 0.0)


@triton.jit
def _mass(x_ptr, V, top, inverse, min_p, least, SPAN: tl.constexpr, STAGES: tl.constexpr):
    """Of a whole row, summed in the order of `_least_kept`."""
    amount = tl.zeros((SPAN,), dtype=tl.float32)
    for start in tl.range(0, V, SPAN, num_stages=STAGES):
        ids = start + tl.arange(0, SPAN)
        x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        amount += _weights(x, top, inverse, min_p, least)
    return tl.sum(amount, 0)


@triton.jit
def _least_kept(
    x_ptr, V, top, inverse, min_p, least, target,
    BY_MASS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The largest logit t of a row such that those >= t amount to `target`, in mass or in number; at least `least`.

    Bisection between logits of the row: each pass moves `low` up or `high` down to one of them. What is so unlikely
    that its weight is 0 need not be told apart.
    """
    low = tl.maximum(top - UNDERFLOW / inverse, least)
    high = top
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        amount = tl.zeros((SPAN,), dtype=tl.float32)
        above = tl.full((SPAN,), float("inf"), dtype=tl.float32)
        below = tl.full((SPAN,), float("-inf"), dtype=tl.float32)
        for start in tl.range(0, V, SPAN, num_stages=STAGES):
            ids = start + tl.arange(0, SPAN)
            x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
            over = x >= middle
            if BY_MASS:
                amount += tl.where(over, _weights(x, top, inverse, min_p, least), 0.0)
            else:
                amount += tl.where(over, 1.0, 0.0)
            above = tl.minimum(above, tl.where(over, x, float("inf")))
            below = tl.maximum(below, tl.where(over, float("-inf"), x))
        found = tl.sum(amount, 0)
        if found >= target:
            low = tl.min(above, 0)
            if not BY_MASS:
                high = tl.where(found == target, low, high)
        else:
            high = tl.max(below, 0)
    return tl.maximum(high, least)


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "u_ptr"])
def _draw(
    logits_ptr, stats_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, u_ptr, out_ptr, V, stride,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row's token: the likeliest, or the one at point u of the cumulative mass of what is kept."""
    row = tl.program_id(0)
    x_ptr = logits_ptr + row.to(tl.int64) * stride
    lane = tl.arange(0, LANES)
    stats_ptr += row * 3 * BLOCKS + lane
    tops = tl.load(stats_ptr, mask=lane < BLOCKS, other=float("-inf"))
    sums = tl.load(stats_ptr + BLOCKS, mask=lane < BLOCKS, other=0.0)
    firsts = tl.load(stats_ptr + 2 * BLOCKS, mask=lane < BLOCKS, other=0.0)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    inverse = _inverse(temperature)
    top = tl.max(tops, 0)
    sums = sums * tl.exp((tops - top) * inverse)
    token = tl.min(tl.where((tops == top) & (lane < BLOCKS), firsts, float("inf")), 0).to(tl.int32)
    total = tl.sum(sums, 0)
    if (temperature >= GREEDY_BELOW) & (total < float("inf")):  # not NaN
        least = float("-inf")
        k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        if (k > 0) & (k < V):
            least = _least_kept(x_ptr, V, top, inverse, min_p, least, k.to(tl.float32), False, SPAN, STAGES)
        if top_p < 1:
            target = top_p * _mass(x_ptr, V, top, inverse, min_p, least, SPAN, STAGES)
            least = _least_kept(x_ptr, V, top, inverse, min_p, least, target, True, SPAN, STAGES)
        if (least > float("-inf")) | (min_p > 0):
            for block in tl.range(0, BLOCKS, num_stages=STAGES):
                ids = block * BLOCK + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
                sums = tl.where(lane == block, tl.sum(_weights(x, top, inverse, min_p, least), 0), sums)
        ends = tl.cumsum(sums, 0)
        point = tl.load(u_ptr + row).to(tl.float32) * tl.max(ends, 0)
        first = tl.min(tl.where((ends > point) & (sums > 0), lane, LANES), 0)
        block = tl.minimum(first, tl.max(tl.where(sums > 0, lane, 0), 0))  # rounding, or u = 1: the last one
        point -= tl.sum(tl.where(lane == block - 1, ends, 0.0), 0)
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        weight = _weights(x, top, inverse, min_p, least)
        first = tl.min(tl.where((tl.cumsum(weight, 0) > point) & (weight > 0), ids, V), 0)
        token = tl.minimum(first, tl.max(tl.where(weight > 0, ids, 0), 0))
    tl.store(out_ptr + row, token)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.sampling.greedy`. Two launches, which may be part of a CUDA graph."""
    logprobs, tokens = _reported(logits, None, pdl=PDL)
    return tokens, logprobs


def report(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.sampling.report`."""
    return _reported(logits, tokens, pdl=False)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """See `ops.sampling.sample`. A row that does not truncate is read once; each truncation reads it 10 to 30 times."""
    logits = _by_rows(logits)
    (rows, vocabulary), out = logits.shape, logits.new_empty(len(logits), dtype=torch.int32)
    if not rows:
        return out
    stats = _stats(logits, None, temperature, pdl=False)
    blocks = stats.shape[2]
    launch(
        _draw, (rows,),
        (logits, stats, temperature, top_k, top_p, min_p, u, out, vocabulary, logits.stride(0)),
        BLOCKS=blocks, LANES=power_of_2(blocks), BLOCK=BLOCK, SPAN=SPAN, STAGES=4, num_warps=16,
    )  # fmt: skip
    return out


def _by_rows(logits: Tensor) -> Tensor:
    assert logits.shape[1] < 2**24, "statistics hold token ids as float32"
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _stats(logits: Tensor, tokens: Tensor | None, temperature: Tensor | None, *, pdl: bool) -> Tensor:
    """[B, 3, blocks] float32, see `_statistics`."""
    rows, vocabulary = logits.shape
    blocks = ceil_div(vocabulary, BLOCK)
    stats = logits.new_empty((rows, 3, blocks), dtype=torch.float32)
    launch(
        _statistics, (blocks, rows),
        (logits, tokens, temperature, stats, vocabulary, logits.stride(0)),
        COUNTS=tokens is not None, WARM=temperature is not None, BLOCK=BLOCK, pdl=pdl, num_warps=8,
    )  # fmt: skip
    return stats


def _reported(logits: Tensor, tokens: Tensor | None, *, pdl: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B] float32 and ranks of `tokens` [B] int32, or of the likeliest tokens and those."""
    logits = _by_rows(logits)
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    out = logits.new_empty(len(logits), dtype=torch.int32)
    if len(logits):
        stats = _stats(logits, tokens, None, pdl=pdl)
        blocks = stats.shape[2]
        launch(
            _combine, (len(logits),),
            (logits, tokens, stats, logprobs, out, logits.stride(0)),
            COUNTS=tokens is not None, BLOCKS=blocks, LANES=power_of_2(blocks), pdl=pdl, num_warps=1,
        )  # fmt: skip
    return logprobs, out
