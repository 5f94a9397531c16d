"""The book of pages: owned, idle or free."""

import pytest

from aiolora.pages import PagePool


def keep_all(pool: PagePool, pages: list[int], *keys: bytes) -> None:
    for page, key in zip(pages, keys, strict=True):
        pool.keep(page, key)


def take(pool: PagePool, count: int) -> list[int]:
    pages = pool.take(count)
    assert pages is not None
    return pages


def test_taken_pages_are_distinct_and_have_one_owner() -> None:
    pool = PagePool(4)
    pages = take(pool, 3)
    assert len(set(pages)) == 3
    assert [pool.refs(page) for page in pages] == [1, 1, 1]
    assert pool.num_available == 1


def test_taking_more_than_there_are_changes_nothing() -> None:
    pool = PagePool(2)
    take(pool, 1)
    assert pool.take(2) is None
    assert pool.num_available == 1
    pool.check()


def test_taking_no_page_is_fine_when_none_is_left() -> None:
    pool = PagePool(1)
    take(pool, 1)
    assert pool.take(0) == []


def test_a_shared_page_is_free_after_its_last_owner() -> None:
    pool = PagePool(1)
    pages = take(pool, 1)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_available == 0
    pool.release(pages)
    assert pool.num_available == 1
    pool.check()


def test_a_page_released_too_often_is_an_error() -> None:
    pool = PagePool(1)
    pages = take(pool, 1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_a_kept_page_is_found_while_owned_and_while_idle() -> None:
    pool = PagePool(2)
    pages = take(pool, 1)
    pool.keep(pages[0], b"key")
    assert pool.find(b"key") == pages[0]
    pool.release(pages)
    assert pool.find(b"key") == pages[0]
    assert pool.num_available == 2
    pool.share(pages)
    assert pool.refs(pages[0]) == 1
    assert pool.num_available == 1
    pool.check()


def test_a_page_without_a_key_is_never_found() -> None:
    pool = PagePool(1)
    pool.release(take(pool, 1))
    assert pool.find(b"key") is None


def test_a_second_page_with_the_same_key_stays_unknown_and_becomes_free() -> None:
    pool = PagePool(2)
    first, second = take(pool, 2)
    keep_all(pool, [first, second], b"key", b"key")
    assert pool.find(b"key") == first
    pool.release([second])
    pool.release([first])
    pool.check()
    assert take(pool, 1) == [second], "the free page goes before the idle one"
    assert pool.find(b"key") == first


def test_a_page_keeps_its_first_key() -> None:
    pool = PagePool(1)
    (page,) = take(pool, 1)
    keep_all(pool, [page, page], b"first", b"second")
    assert pool.find(b"first") == page
    assert pool.find(b"second") is None


def test_only_an_owned_page_can_be_kept() -> None:
    pool = PagePool(1)
    with pytest.raises(AssertionError, match="not owned"):
        pool.keep(0, b"key")


def test_the_least_recently_used_idle_page_is_forgotten_first() -> None:
    pool = PagePool(2)
    first, second = take(pool, 2)
    keep_all(pool, [first, second], b"first", b"second")
    pool.release([first])
    pool.release([second])
    pool.share([first])  # used again
    pool.release([first])
    assert take(pool, 1) == [second]
    assert pool.find(b"second") is None
    assert pool.find(b"first") == first
    pool.check()


def test_a_chain_is_forgotten_from_its_end() -> None:
    pool = PagePool(3)
    chain = take(pool, 3)
    keep_all(pool, chain, b"a", b"ab", b"abc")
    pool.release(chain)
    take(pool, 1)
    assert [pool.find(key) for key in (b"a", b"ab", b"abc")] == [chain[0], chain[1], None]
    take(pool, 1)
    assert [pool.find(key) for key in (b"a", b"ab", b"abc")] == [chain[0], None, None]


def test_a_forgotten_key_frees_an_idle_page_and_leaves_an_owned_one_to_its_owner() -> None:
    pool = PagePool(2)
    idle, owned = take(pool, 2)
    keep_all(pool, [idle, owned], b"idle", b"owned")
    pool.release([idle])
    for key in (b"idle", b"owned", b"unknown"):
        pool.forget(key)
        assert pool.find(key) is None
        pool.check()
    assert pool.refs(owned) == 1
    pool.release([owned])
    assert pool.num_available == 2
    pool.check()
