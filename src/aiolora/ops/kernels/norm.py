"""RMSNorm, alone and behind the residual addition that pays what the projection before it owes."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.expand import adjusted, held_pages, load_b, pay_rest, pay_token
from aiolora.ops.kernels.launch import launch, power_of_2
from aiolora.ops.kernels.linear import chained, complete

BY_TOKEN = 64  # tokens up to which each pays alone: more share the reading of B in a launch of its own


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See `norm.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x.view(-1, x.shape[-1]), None, [], [], None, weight, None, out, None, eps, offset)
    return out


def add_norm(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    inner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `norm.add_norm`."""
    slices = len(where) - 3
    if owed and (y.shape[0] > BY_TOKEN or slices > 1):
        y, bias, owed, where = complete(y, bias, owed, where), None, [], []
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    _launch(y, bias, owed, where, residual, weight, inner, out, total, eps, offset)
    return out, total


def _launch(
    y: Tensor,
    bias: Tensor | None,
    owed: list[Tensor],
    where: list[int],
    residual: Tensor | None,
    weight: Tensor,
    inner: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    tokens, width = y.shape
    most = 2
    rest: tuple[object, ...] = (y, y, y, y, y, y, 0, 0, 0, 0, 0)
    if owed:
        h, b, vectors, _, _, pages, vector_pages, owners = owed
        most = pages.shape[2]
        strides = b.stride(0), b.stride(1), vectors.stride(0)
        rest = (h, b, vectors, pages, vector_pages, owners, where[0], pages.shape[1], *strides)
    block = power_of_2(width)
    pdl = chained(tokens, bool(owed))
    launch(
        _add_norm_kernel, (tokens,),
        (y, bias, residual, weight, inner, out, total, *rest, eps),
        N=width, BLOCK=block, W=most, W_BLOCK=power_of_2(most), OFFSET=offset, LORA=bool(owed), pdl=pdl,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip


@triton.jit
def _normed(x, scale, eps, N: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of `x` [BLOCK] float32, N of them values and zeros behind, for a result in DTYPE."""
    root = tl.rsqrt(tl.sum(x * x) / N + eps)
    if OFFSET != 0:
        normed = x * root * (scale.to(tl.float32) + OFFSET)
    else:
        normed = (x * root).to(DTYPE).to(tl.float32) * scale.to(tl.float32)
    return normed


@triton.jit(do_not_specialize=["kind", "kinds"])
def _add_norm_kernel(
    y, bias, residual, weight, inner, out, total, h, b, vectors, pages, vector_pages, owners, kind, kinds, b_page,
    b_rank, v_page, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr, OFFSET: tl.constexpr,
    LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    n = tl.arange(0, BLOCK)
    inside = n < N
    scale = tl.load(weight + n, inside, 0.0)
    if inner is not None:
        inner_scale = tl.load(inner + n, inside, 0.0)
    token = tl.program_id(0)
    if LORA:
        tile = tl.load(owners + token)
        held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
        vector = tl.load(vector_pages + tile * kinds + kind)
        b_RN = load_b(b, pages, tile, kind, kinds, 0, n, inside, b_page, b_rank, W)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = token.to(tl.int64) * N + n
    acc = tl.load(y + at, inside, 0.0).to(tl.float32)
    if residual is not None:
        before = tl.load(residual + at, inside, 0.0).to(tl.float32)
    if LORA:
        if held > 0:
            acc = pay_token(acc, b_RN, h, held, 0, token, 0, 1, W)
            acc = pay_rest(acc, b, pages, tile, kind, kinds, h, held, token, n, inside, 0, b_page, b_rank, 1, W)
        if vector >= 0:
            acc = adjusted(acc, vectors, vector, n, inside, v_page, N)
    if bias is not None:
        acc += tl.load(bias + n, inside, 0.0).to(tl.float32)
    if inner is not None:
        acc = _normed(acc.to(out.dtype.element_ty).to(tl.float32), inner_scale, eps, N, OFFSET, out.dtype.element_ty)
    if residual is not None:
        summed = (acc.to(out.dtype.element_ty).to(tl.float32) + before).to(out.dtype.element_ty)
        tl.store(total + at, summed, inside)
        acc = summed.to(tl.float32)
    normed = _normed(acc, scale, eps, N, OFFSET, out.dtype.element_ty)
    tl.store(out + at, normed.to(out.dtype.element_ty), inside)
