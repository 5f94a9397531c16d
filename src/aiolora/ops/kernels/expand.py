"""Out of the rank space: how every kernel that reads a projection pays what the adapters of its tokens owe.

Pages of B do not change while steps run, nor does the routing within one: both are asked for before the kernel waits for
the one before it, 16 ranks (two pages) at once; the rest of a larger rank follows in a loop.
"""

import triton
import triton.language as tl


@triton.jit
def held_pages(pages, tile, kind, kinds, W: tl.constexpr, W_BLOCK: tl.constexpr):
    """How many rank pages of `kind` the tokens of `tile` have."""
    w = tl.arange(0, W_BLOCK)
    held = tl.load(pages + (tile * kinds + kind) * W + w, w < W, -1)
    return tl.sum((held >= 0).to(tl.int32))


@triton.jit
def load_b(b, pages, tile, kind, kinds, held, pair, columns, inside, b_page, b_rank, W: tl.constexpr):
    """[16, BN] of B: the ranks of a pair of pages, zeros where there are none."""
    r = tl.arange(0, 16)
    there = pair * 2 + r // 8 < held
    page = tl.load(pages + (tile * kinds + kind) * W + pair * 2 + r // 8, there, 0).to(tl.int64)
    at = (b + page * b_page + (r % 8) * b_rank)[:, None] + columns[None, :]
    return tl.load(at, there[:, None] & inside[None, :], 0.0)


@triton.jit
def expand_pair(acc, b_RN, h, held, pair, tokens, ok, part, S: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` [BM, BN] plus h[tokens, part, ranks of the pair] @ `b_RN`; ranks beyond the last page hold anything."""
    r = tl.arange(0, 16)
    there = pair * 2 + r // 8 < held
    at = (h + (tokens * S + part) * (W * 8) + pair * 16)[:, None] + r[None, :]
    h_MR = tl.load(at, ok[:, None] & there[None, :], 0.0)
    return tl.dot(h_MR.to(b_RN.dtype), b_RN, acc, input_precision=PRECISION)


@triton.jit
def expand_rest(
    acc, b, pages, tile, kind, kinds, h, held, tokens, ok, columns, inside, part, b_page, b_rank,
    S: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs behind the first."""
    if W > 2:
        for pair in range(1, (held + 1) // 2):
            b_RN = load_b(b, pages, tile, kind, kinds, held, pair, columns, inside, b_page, b_rank, W)
            acc = expand_pair(acc, b_RN, h, held, pair, tokens, ok, part, S, W, PRECISION)
    return acc
