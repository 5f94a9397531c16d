"""Ops of adapters' embeddings, heads and norms: rows of their own, low-rank shares, against the plain weights."""

import torch

from aiolora.ops.blocks import own_logits, own_norm
from aiolora.ops.embedding import embed, embed_own, embed_shrink
from aiolora.ops.linear import shrink
from aiolora.ops.norm import rms_norm
from tests.ops.routing import routing, tables


def test_the_embeddings_low_rank_share_is_that_of_one_hot_vectors() -> None:
    torch.manual_seed(0)
    pages, scales = tables([3, 12])
    perm, tiles, of, by, _ = routing([1, -1, 0, 1, 0], pages, scales, 2)
    owners = torch.empty(5, dtype=torch.int32)
    for tile, (start, count) in enumerate(tiles.tolist()):
        owners[perm[start : start + count].long()] = tile
    a = torch.randn(1, 4, 8, 11)
    tokens, previous = torch.tensor([4, -2, 10, 0, -1], dtype=torch.int32), torch.tensor([7, 2], dtype=torch.int32)
    one_hot = torch.eye(11)[[4, 2, 10, 0, 7]]
    h = embed_shrink(tokens, previous, a, of, by, owners, 1)
    wanted = shrink(one_hot, a, [perm, tiles, tiles, of, by], [1, 2])
    torch.testing.assert_close(h, wanted)
    assert h[1].eq(0).all()


def test_own_rows_stand_in_for_the_base_wherever_there_are_some() -> None:
    torch.manual_seed(0)
    base, rows = torch.randn(300, 6), torch.randn(9, 128, 6)
    table = torch.tensor([[2, -1, 7], [-1, 5, -1], [-1, -1, -1]], dtype=torch.int32)
    narrow = torch.tensor([[2, 5], [-1, -1]], dtype=torch.int32)  # of an adapter without rows in the last block
    owners = torch.tensor([1, 0, 2, 0, 1, 1], dtype=torch.int32)
    whole = base.repeat(3, 1, 1)
    whole[0, :128], whole[0, 256:], whole[1, 128:256] = rows[2], rows[7][:44], rows[5]
    tokens = torch.tensor([130, 299, 130, 129, -1, 5], dtype=torch.int32)
    previous = torch.tensor([255], dtype=torch.int32)
    ids = [130, 299, 130, 129, 255, 5]
    x = embed_own(embed(tokens, previous, base), tokens, previous, rows, table, owners)
    assert torch.equal(x, torch.stack([whole[int(owner), token] for owner, token in zip(owners, ids)]))

    x = embed(tokens, previous, base)
    few = embed_own(x, tokens, previous, rows, narrow, torch.zeros(6, dtype=torch.int32))
    wanted = [rows[5, 2], base[299], rows[5, 2], rows[5, 1], rows[5, 127], rows[2, 5]]
    assert torch.equal(few, torch.stack(wanted))

    hidden = torch.randn(6, 6)
    logits = hidden @ base.T
    perm = torch.tensor([2, 1, 3, 0, 4, 5], dtype=torch.int32)
    tiles = torch.tensor([[0, 1], [1, 2], [3, 2], [5, 1], [0, 0]], dtype=torch.int32)
    own_logits(logits, hidden, rows, table, owners, perm, tiles, 2)
    torch.testing.assert_close(logits, torch.stack([whole[int(o)] @ h for o, h in zip(owners, hidden)]))


def test_own_norms_are_taken_of_the_residual_stream() -> None:
    torch.manual_seed(0)
    residual, base, rows = torch.randn(4, 6), torch.randn(6), torch.randn(3, 128, 6)
    x = rms_norm(residual, base, 1e-5)
    pages, tokens = torch.tensor([[2, -1], [-1, 1]], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    for number, weights in ((9, {3: rows[2, 9], 1: base}), (130, {3: base, 1: rows[1, 2]}), (300, {})):
        out = own_norm(x, residual, base, rows, pages, tokens, number, 1e-5)
        for token in range(4):
            wanted = rms_norm(residual[token], weights.get(token, base), 1e-5)
            torch.testing.assert_close(out[token], wanted)
