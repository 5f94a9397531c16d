"""Logits of rows that adapters have in the place of the base's, against the reference in float64."""

import pytest
import torch

from aiolora.ops import blocks as reference
from aiolora.ops.kernels import blocks as kernels
from tests.kernels.close import assert_near
from tests.kernels.routing import routing, wide

MIXES = {
    "one": [1],
    "all distinct": [3, 1, 0, 2],
    "some none": [2, -1, 0, 2, -1, 0, 1],
    "none": [-1] * 3,
    "over a tile": [i % 4 - 1 for i in range(40)],
}
VOCABULARY = 300  # two blocks and a part of one


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("mix", MIXES)
def test_logits_of_own_rows(mix: str, width: int, dtype: torch.dtype, device: str) -> None:
    mixes = MIXES[mix]
    perm, tiles, *_ = routing(mixes, [8] * 4, tile=16, device=device).lists
    table = torch.tensor([[4, -1, 1], [-1, -1, -1], [-1, 0, 3], [2, 5, 6], [-1, -1, -1]], device=device)
    owners = torch.tensor([4 if mix < 0 else mix for mix in mixes], dtype=torch.int32, device=device)
    rows = torch.randn(8, 128, width, device=device).to(dtype)
    rows[[1, 3, 6], VOCABULARY - 256 :] = torch.nan  # behind the last row of the vocabulary
    hidden = torch.randn(len(mixes), width, device=device).to(dtype) / width**0.5
    logits = torch.randn(len(mixes), VOCABULARY, device=device).to(dtype)
    exact, kept = logits.double(), logits.clone()

    kernels.own_logits(logits, hidden, rows, table.int(), owners, perm, tiles, 16)

    reference.own_logits(exact, *wide(hidden, rows), table.int(), owners, perm, tiles, 16)
    assert_near(logits, exact)
    untouched = (table[owners.long()] < 0).repeat_interleave(128, 1)[:, :VOCABULARY]
    assert torch.equal(logits[untouched], kept[untouched])
