"""The routing of a part of a step is that of those tokens alone."""

import torch

from aiolora.models.one_by_one import narrowed
from aiolora.ops.linear import Routing


def ints(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


WHOLE = Routing(
    perm=ints(1, 4, 5, 0, 2, 3, 6),
    tiles=ints([0, 2], [2, 1], [3, 4]),  # two tiles of one mix, then tokens without any
    items=ints([0, 0, 0, 2], [0, 1, 0, 2], [1, 0, 2, 1], [-1, 0, 0, 0]),
    pages=ints([[3, 4]], [[3, 4]], [[-1, -1]]),
    scales=torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]], [[0.0, 0.0]]]),
    vector_pages=ints([-1], [-1], [-1]),
    owners=ints(2, 0, 2, 2, 0, 1, 2),
    tile=2,
)


def test_tokens_of_a_part_keep_their_tiles_and_others_leave_theirs_empty() -> None:
    part = narrowed(WHOLE, 3, 6)
    assert part.owners.tolist() == [2, 0, 1]
    assert part.perm.tolist() == [1, 2, 0]
    assert part.tiles.tolist() == [[0, 1], [1, 1], [2, 1]]
    assert part.items.tolist() == [[0, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1], [-1, -1, -1, -1]]
    assert part.pages is WHOLE.pages
    none = narrowed(WHOLE, 2, 4)
    assert none.tiles.tolist() == [[0, 0], [0, 0], [0, 2]]
    assert {tensor.dtype for tensor in (none.perm, none.tiles, none.items, none.owners)} == {torch.int32}


def test_the_whole_step_is_its_own_part() -> None:
    whole = narrowed(WHOLE, 0, 7)
    assert whole.perm.tolist() == WHOLE.perm.tolist()
    assert whole.tiles.tolist() == WHOLE.tiles.tolist()
    assert whole.items[:3].tolist() == WHOLE.items[:3].tolist()
