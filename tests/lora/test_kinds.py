"""The one numbering of pages."""

from aiolora.lora.kinds import PageKinds, Room


def test_pages_of_ranks_of_vectors_and_of_rows_follow_each_other() -> None:
    kinds = PageKinds(4, embedding=2, head=3)
    numbers = [*range(kinds.sites), *map(kinds.vectors_of, range(kinds.sites)), kinds.blocks]
    assert numbers == list(range(9))
    assert (kinds.layers, list(kinds.ends)) == (2, [2, 3])
    assert Room(7, vectors=5, ends=6, blocks=9).pages(kinds) == [7, 7, 6, 6, 5, 5, 5, 5, 9]


def test_an_end_without_rank_pages_has_no_vector_pages() -> None:
    assert Room(7, vectors=5, ends=2).pages(PageKinds(2, head=1)) == [7, 2, 5, 2, 0]
    assert Room(7, vectors=5).pages(PageKinds(2, embedding=1)) == [7, 0, 5, 0, 0]
    assert Room(7, vectors=5).pages(PageKinds(2)) == [7, 7, 5, 5, 0]


def test_routed_experts_have_rank_pages_and_no_vector_pages() -> None:
    assert Room(7, vectors=5, experts=4).pages(PageKinds(3, experts=(1, 2))) == [7, 4, 4, 5, 0, 0, 0]
