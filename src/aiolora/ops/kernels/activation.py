"""silu(gate) * up or gelu(gate) * up, paying on the way what gate and up owe: in two slices, or fused in one."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aiolora.ops.kernels.expand import adjusted, expand_rest, held_pages, load_b, load_h, pay_rest, pay_token
from aiolora.ops.kernels.launch import ceil_div, launch, power_of_2
from aiolora.ops.kernels.linear import chained, precision

LARGE = (64, 4)  # columns and warps of a program for a tile of more than 16 tokens
BY_TOKEN = 64  # tokens up to which each pays alone: several that share B read it from the cache


def silu_mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """See `activation.silu_mul`."""
    return _mul(y, bias, owed, where, gelu=False)


def gelu_mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int]) -> Tensor:
    """See `activation.gelu_mul`."""
    return _mul(y, bias, owed, where, gelu=True)


def _mul(y: Tensor, bias: Tensor | None, owed: list[Tensor], where: list[int], *, gelu: bool) -> Tensor:
    tokens, width = y.shape[0], y.shape[1] // 2
    out = y.new_empty((tokens, width))
    if owed and tokens <= BY_TOKEN:
        _by_token(y, bias, out, owed, where, gelu=gelu)
        return out
    if owed:
        h, b, vectors, perm, tiles, pages, vector_pages, _ = owed
        kind, tile = where[:2]
        strides = b.stride(0), b.stride(1), vectors.stride(0)
        rows, groups, most = max(16, tile), tiles.shape[0], pages.shape[2]
        rest: tuple[object, ...] = (h, b, vectors, perm, tiles, pages, vector_pages, kind, pages.shape[1], *strides)
        columns, warps = (128, 4) if rows == 16 else LARGE
        turns = 4 if groups >= 16 and rows == 16 else 1
    else:
        rows = 1 if tokens <= 4 else 4
        groups, most = ceil_div(tokens, rows), 2
        rest = (y, y, y, y, y, y, y, 0, 0, 0, 0, 0)
        columns, warps = (256, 2) if rows == 1 else (512, 4)
        turns = 1
    pdl = chained(tokens, bool(owed))
    launch(
        _silu_mul_kernel, (groups, ceil_div(width, columns * turns)),
        (y, bias, out, *rest, tokens),
        N=width, S=max(1, len(where) - 3), W=most, W_BLOCK=power_of_2(most), BM=rows, BN=columns, TURNS=turns,
        GELU=gelu, PRECISION=precision(owed[1] if owed else y), LORA=bool(owed), pdl=pdl, num_warps=warps,
    )  # fmt: skip
    return out


def _by_token(y: Tensor, bias: Tensor | None, out: Tensor, owed: list[Tensor], where: list[int], *, gelu: bool) -> None:
    h, b, vectors, _, _, pages, vector_pages, owners = owed
    strides = b.stride(0), b.stride(1), vectors.stride(0)
    tokens, width = out.shape
    most, columns = pages.shape[2], 256 if tokens <= 4 else 512  # 8 a thread: its 16 ranks stay with it
    pdl = chained(tokens, owing=True)
    launch(
        _silu_mul_token_kernel, (tokens, ceil_div(width, columns)),
        (y, bias, out, h, b, vectors, pages, vector_pages, owners, where[0], pages.shape[1], *strides),
        N=width, S=len(where) - 3, W=most, W_BLOCK=power_of_2(most), BN=columns, GELU=gelu, pdl=pdl,
        num_warps=columns // 256,
    )  # fmt: skip


@triton.jit
def _opened(gate, GELU: tl.constexpr):
    """Of the gate: gate * sigmoid(gate), or with GELU what tanh's approximation comes to: gate * sigmoid(2 u)."""
    inner = gate
    if GELU:
        inner = gate * (1.5957691216057308 + 0.07135481627159966 * gate * gate)
    return gate / (1.0 + tl.exp(-inner))


@triton.jit(do_not_specialize=["kind", "kinds"])
def _silu_mul_token_kernel(
    y, bias, out, h, b, vectors, pages, vector_pages, owners, kind, kinds, b_page, b_rank, v_page,
    N: tl.constexpr, S: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr, BN: tl.constexpr, GELU: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BN columns of one token and what it owes."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = n < N
    tile = tl.load(owners + token)
    held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
    vector = tl.load(vector_pages + tile * kinds + kind)
    b_gate = load_b(b, pages, tile, kind, kinds, 0, n, inside, b_page, b_rank, W)
    b_up = load_b(b, pages, tile, kind, kinds, 0, N + n, inside, b_page, b_rank, W)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    at = token.to(tl.int64) * (2 * N) + n
    gate = tl.load(y + at, inside, 0.0).to(tl.float32)
    up = tl.load(y + at + N, inside, 0.0).to(tl.float32)
    if held > 0:
        gate = pay_token(gate, b_gate, h, held, 0, token, 0, S, W)
        up = pay_token(up, b_up, h, held, 0, token, S - 1, S, W)
        gate = pay_rest(gate, b, pages, tile, kind, kinds, h, held, token, n, inside, 0, b_page, b_rank, S, W)
        up = pay_rest(up, b, pages, tile, kind, kinds, h, held, token, N + n, inside, S - 1, b_page, b_rank, S, W)
    if vector >= 0:
        gate = adjusted(gate, vectors, vector, n, inside, v_page, 2 * N)
        up = adjusted(up, vectors, vector, N + n, inside, v_page, 2 * N)
    if bias is not None:
        gate += tl.load(bias + n, inside, 0.0).to(tl.float32)
        up += tl.load(bias + N + n, inside, 0.0).to(tl.float32)
    gate = gate.to(y.dtype.element_ty).to(tl.float32)
    up = up.to(y.dtype.element_ty).to(tl.float32)
    opened = _opened(gate, GELU).to(y.dtype.element_ty).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + n, (opened * up).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "kind", "kinds"])
def _silu_mul_kernel(
    y, bias, out, h, b, vectors, perm, tiles, pages, vector_pages, kind, kinds, b_page, b_rank, v_page, T,
    N: tl.constexpr, S: tl.constexpr, W: tl.constexpr, W_BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TURNS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr, LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TURNS times BN columns of a tile of tokens; without adapters a tile is BM neighbours."""
    tile = tl.program_id(0)
    m = tl.arange(0, BM)
    n = tl.program_id(1) * (BN * TURNS) + tl.arange(0, BN)
    if LORA:
        first, count = tl.load(tiles + tile * 2), tl.load(tiles + tile * 2 + 1)
        held = held_pages(pages, tile, kind, kinds, W, W_BLOCK)
        vector = tl.load(vector_pages + tile * kinds + kind)
        ok = m < count
        tokens = tl.load(perm + first + m, ok, 0)
        b_gate = load_b(b, pages, tile, kind, kinds, 0, n, n < N, b_page, b_rank, W)
        b_up = load_b(b, pages, tile, kind, kinds, 0, N + n, n < N, b_page, b_rank, W)
    else:
        tokens = tile * BM + m
        ok = tokens < T
        count = 1
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if count > 0:
        if LORA:
            h_gate = load_h(h, held, 0, tokens, ok, 0, S, W).to(b_gate.dtype)
            h_up = load_h(h, held, 0, tokens, ok, S - 1, S, W).to(b_gate.dtype)
        for turn in tl.static_range(TURNS):
            inside = n < N
            mask = ok[:, None] & inside[None, :]
            at = tokens.to(tl.int64)[:, None] * (2 * N) + n[None, :]
            gate = tl.load(y + at, mask, 0.0).to(tl.float32)
            up = tl.load(y + at + N, mask, 0.0).to(tl.float32)
            if LORA:
                gate_now, up_now = b_gate, b_up
                if turn + 1 < TURNS:  # on their way while this turn is worked on
                    b_gate = load_b(b, pages, tile, kind, kinds, 0, n + BN, n + BN < N, b_page, b_rank, W)
                    b_up = load_b(b, pages, tile, kind, kinds, 0, N + n + BN, n + BN < N, b_page, b_rank, W)
                if held > 0:
                    gate_more = tl.dot(h_gate, gate_now, input_precision=PRECISION)
                    up_more = tl.dot(h_up, up_now, input_precision=PRECISION)
                    gate += expand_rest(
                        gate_more, b, pages, tile, kind, kinds, h, held, tokens, ok, n, inside, 0, b_page, b_rank,
                        S, W, PRECISION,
                    )  # fmt: skip
                    up += expand_rest(
                        up_more, b, pages, tile, kind, kinds, h, held, tokens, ok, N + n, inside, S - 1, b_page,
                        b_rank, S, W, PRECISION,
                    )  # fmt: skip
                if vector >= 0:
                    gate = adjusted(gate, vectors, vector, n, inside, v_page, 2 * N)
                    up = adjusted(up, vectors, vector, N + n, inside, v_page, 2 * N)
            if bias is not None:
                gate += tl.load(bias + n, inside, 0.0).to(tl.float32)[None, :]
                up += tl.load(bias + N + n, inside, 0.0).to(tl.float32)[None, :]
            gate = gate.to(y.dtype.element_ty).to(tl.float32)
            up = up.to(y.dtype.element_ty).to(tl.float32)
            opened = _opened(gate, GELU).to(y.dtype.element_ty).to(tl.float32)
            tl.store(out + tokens.to(tl.int64)[:, None] * N + n[None, :], (opened * up).to(out.dtype.element_ty), mask)
            n += BN
