"""Out of the rank space: how every kernel that reads a projection pays what the adapters of its tokens owe.

Pages of B do not change while steps run, nor does the routing within one: both are asked for before the kernel waits
for the one before it, 16 ranks (two pages) at once; the rest of a larger rank follows in a loop.
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
def load_b(b, pages, tile, kind, kinds, pair, columns, inside, b_page, b_rank, W: tl.constexpr):
    """[16, BN] of B: the ranks of a pair of pages, zeros where there are none."""
    r = tl.arange(0, 16)
    page = tl.load(pages + (tile * kinds + kind) * W + pair * 2 + r // 8, pair * 2 + r // 8 < W, -1).to(tl.int64)
    at = (b + page * b_page + (r % 8) * b_rank)[:, None] + columns[None, :]
    return tl.load(at, (page >= 0)[:, None] & inside[None, :], 0.0)


@triton.jit
def load_h(h, held, pair, tokens, ok, part, S: tl.constexpr, W: tl.constexpr):
    """[BM, 16] of h: the ranks of the pair; those beyond the last page hold anything and are not read."""
    r = tl.arange(0, 16)
    at = (h + (tokens * S + part) * (W * 8) + pair * 16)[:, None] + r[None, :]
    return tl.load(at, ok[:, None] & (pair * 2 + r // 8 < held)[None, :], 0.0)


@triton.jit
def adjusted(acc, vectors, vector, columns, inside, v_page, N: tl.constexpr):
    """`acc` [BM, BN] or [BN] of float32 times the gain and plus the shift of vector page `vector`.

    Behind a branch: where no page is, nothing is read.
    """
    at = vectors + vector.to(tl.int64) * v_page + columns
    return acc * tl.load(at, inside, 1.0) + tl.load(at + N, inside, 0.0)


@triton.jit
def expand_pair(acc, b_RN, h, held, pair, tokens, ok, part, S: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` [BM, BN] plus h[tokens, part, ranks of the pair] @ `b_RN`."""
    h_MR = load_h(h, held, pair, tokens, ok, part, S, W)
    return tl.dot(h_MR.to(b_RN.dtype), b_RN, acc, input_precision=PRECISION)


@triton.jit
def expand_rest(
    acc, b, pages, tile, kind, kinds, h, held, tokens, ok, columns, inside, part, b_page, b_rank,
    S: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs behind the first: what is owed in all, ready to be added.

    Multiplied by one, which the compiler cannot know to be one: else it adds inside of the product, and what it is
    added to is read in the tensor cores' order, 4 bytes at a time.
    """
    if W > 2:
        for pair in range(1, (held + 1) // 2):
            b_RN = load_b(b, pages, tile, kind, kinds, pair, columns, inside, b_page, b_rank, W)
            acc = expand_pair(acc, b_RN, h, held, pair, tokens, ok, part, S, W, PRECISION)
    return acc * tl.minimum(held, 1).to(tl.float32)


@triton.jit
def pay_token(acc, b_RN, h, held, pair, token, part, S: tl.constexpr, W: tl.constexpr):
    """`acc` [BN] plus the ranks of a pair for one token, without the tensor cores."""
    r = tl.arange(0, 16)
    h_R = tl.load(h + (token * S + part) * (W * 8) + pair * 16 + r, pair * 2 + r // 8 < held, 0.0).to(b_RN.dtype)
    return acc + tl.sum(b_RN.to(tl.float32) * h_R.to(tl.float32)[:, None], 0)


@triton.jit
def pay_rest(
    acc, b, pages, tile, kind, kinds, h, held, token, columns, inside, part, b_page, b_rank,
    S: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The pairs behind the first, for one token."""
    if W > 2:
        for pair in range(1, (held + 1) // 2):
            b_RN = load_b(b, pages, tile, kind, kinds, pair, columns, inside, b_page, b_rank, W)
            acc = pay_token(acc, b_RN, h, held, pair, token, part, S, W)
    return acc


@triton.jit
def next_mix(left, first, second, m, BM: tl.constexpr):
    """The two pages of the first row that is left, and which of the left have the same."""
    leader = tl.min(tl.where(left, m, BM))
    one = tl.sum(tl.where(m == leader, first, 0))
    two = tl.sum(tl.where(m == leader, second, 0))
    return one, two, left & (first == one) & (second == two)


@triton.jit
def two_pages(pages, at, ok, pair, W: tl.constexpr):
    """Pages of a pair for each row, and which rows have any."""
    first = tl.load(pages + at + pair * 2, ok & (pair * 2 < W), -1)
    second = tl.load(pages + at + pair * 2 + 1, ok & (pair * 2 + 1 < W), -1)
    return first, second, (first >= 0) | (second >= 0)


@triton.jit
def expand_mixes(
    acc, h, b, pages, at, row, ok, m, columns, inside, part, b_page, b_rank,
    S: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc` [BM, BN] plus what rows of several mixes owe in `columns` of slice `part`, one mix after the other.

    `at`: where the pages of each row's mix begin in `pages`.
    """
    r = tl.arange(0, 16)
    for pair in range((W + 1) // 2):
        first, second, left = two_pages(pages, at, ok, pair, W)
        while tl.sum(left.to(tl.int32)) > 0:
            one, two, mine = next_mix(left, first, second, m, BM)
            page = tl.where(r < 8, one, two)
            b_at = (b + page.to(tl.int64) * b_page + (r % 8) * b_rank)[:, None] + columns[None, :]
            b_RN = tl.load(b_at, (page >= 0)[:, None] & inside[None, :], 0.0)
            h_at = (h + (row.to(tl.int64) * S + part) * (W * 8) + pair * 16)[:, None] + r[None, :]
            h_MR = tl.load(h_at, mine[:, None] & (page >= 0)[None, :], 0.0)
            acc = tl.dot(h_MR.to(b_RN.dtype), b_RN, acc, input_precision=PRECISION)
            left = left & (mine == 0)
    return acc
