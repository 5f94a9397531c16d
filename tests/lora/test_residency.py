"""The book of adapters: host memory, device pages, leases."""

import pytest
from msgspec.structs import replace

from aiolora.errors import AdapterMemoryError
from aiolora.lora.eviction import FROM_DISK
from aiolora.lora.kinds import PageKinds, Room
from aiolora.lora.residency import Placement, Residency
from aiolora.types import AdapterVersion, SitePages


def version(number: int, *needs: int, source: str | None = "folder") -> AdapterVersion:
    """`needs`: rank pages of kind 0, of kind 1, vector pages of kind 0, of kind 1."""
    pages = tuple(SitePages(kind, count, 1.0) for kind, count in enumerate(needs or (1, 1)) if count)
    return AdapterVersion(number, f"adapter{number}", f"{number:064x}", source, 8, pages, 0)


def book(*versions: AdapterVersion, num_pages: int = 2, max_host: int = 8, num_vectors: int = 0) -> Residency[str]:
    """With those versions in host memory."""
    residency: Residency[str] = Residency(PageKinds(2), Room(num_pages, num_vectors), max_host=max_host)
    for one in versions:
        residency.store(one, one.name)
    return residency


def place(residency: Residency[str], *versions: AdapterVersion) -> list[Placement[str]]:
    """Place and land them."""
    placements = []
    for one in versions:
        placement = residency.place(one)
        assert placement is not None
        residency.check()
        residency.landed(one)
        placements.append(placement)
    return placements


def test_a_placement_names_the_pages_of_every_kind_and_what_to_fill_them_with() -> None:
    one = version(1, 2, 1)
    residency = book(one)
    (placement,) = place(residency, one)
    assert placement.weights == "adapter1"
    assert {kind: len(pages) for kind, pages in placement.pages.items()} == {0: 2, 1: 1}
    assert residency.pages(one) == placement.pages
    assert residency.on_device(one)


def test_two_versions_never_share_a_page() -> None:
    one, two = version(1), version(2)
    first, second = place(book(one, two), one, two)
    for kind in (0, 1):
        assert not set(first.pages[kind]) & set(second.pages[kind])


def test_the_least_recently_leased_version_makes_room() -> None:
    one, two, three = version(1), version(2), version(3)
    residency = book(one, two, three)
    place(residency, one, two)
    residency.lease(one)
    residency.release(one)
    place(residency, three)
    assert residency.resident() == [one, three]


def test_a_leased_version_is_never_evicted_from_the_device() -> None:
    one, two, three = version(1), version(2), version(3, 2)
    residency = book(one, two, three)
    place(residency, one, two)
    residency.lease(one)
    assert residency.place(three) is None
    assert residency.resident() == [two, one], "where there is no room nothing changes"
    residency.release(one)
    place(residency, three)
    assert residency.resident() == [three]


def test_every_lease_counts() -> None:
    one, two = version(1, 2), version(2, 1)
    residency = book(one, two)
    place(residency, one)
    residency.lease(one)
    residency.lease(one)
    residency.release(one)
    assert residency.leased(one) == 1
    assert residency.place(two) is None
    residency.release(one)
    assert residency.leased(one) == 0
    with pytest.raises(AssertionError, match="released twice"):
        residency.release(one)


def test_only_a_version_on_the_device_can_be_leased() -> None:
    one = version(1)
    with pytest.raises(AssertionError, match="not on the device"):
        book(one).lease(one)


def test_a_version_whose_bytes_are_on_the_way_is_neither_used_nor_evicted() -> None:
    one, two = version(1, 2), version(2, 1)
    residency = book(one, two)
    assert residency.place(one) is not None
    residency.check()
    assert (residency.placed(one), residency.on_device(one), residency.resident()) == (True, False, [])
    with pytest.raises(AssertionError, match="not on the device"):
        residency.lease(one)
    assert residency.place(two) is None
    residency.landed(one)
    assert residency.on_device(one)
    assert residency.place(two) is not None
    assert not residency.placed(one)


def test_a_dropped_version_frees_what_it_takes_unless_it_is_leased_or_on_its_way() -> None:
    one, two, three, memory = version(1), version(2), version(3), version(4, source=None)
    residency = book(one, two, memory)
    place(residency, one)
    residency.lease(one)
    assert residency.place(two) is not None
    assert not residency.drop(one), "leased"
    assert not residency.drop(two), "its bytes are on the way"
    assert residency.in_host(one)
    assert residency.in_host(two)
    residency.release(one)
    residency.landed(two)
    for each in (one, two, memory):
        assert residency.drop(each)
        residency.check()
        assert not residency.in_host(each)
    assert not residency.resident()
    residency.store(three, "adapter3")
    place(residency, three)


def test_a_pinned_version_is_evicted_from_neither_level_until_it_is_unpinned() -> None:
    one, two, three = version(1), version(2), version(3)
    residency = book(one, max_host=2)
    residency.pin(one, room=1)
    for each in (two, three):
        residency.store(each, each.name)
    assert residency.in_host(one)
    assert not residency.in_host(two)
    place(residency, one, three)
    residency.store(two, two.name)
    place(residency, two)
    assert residency.resident() == [one, two]
    residency.store(three, three.name)
    residency.unpin(one)
    place(residency, three)
    assert residency.resident() == [two, three]
    residency.store(version(4), "adapter4")
    assert not residency.in_host(one)


def test_a_pin_must_leave_room_for_others_on_both_levels() -> None:
    one, two, three = version(1), version(2), version(3)
    residency = book(one, two, num_pages=3, max_host=3)
    with pytest.raises(AdapterMemoryError, match="'adapter1': cannot be pinned: it would leave 2 rank pages"):
        residency.pin(one, room=3)
    residency.pin(one, room=1)
    residency.pin(one, room=1)
    residency.pin(two, room=1)
    with pytest.raises(AdapterMemoryError, match="max_cpu_loras=3"):
        residency.pin(three, room=0)
    assert residency.fits([three])
    assert not residency.fits([three, version(4)]), "what is pinned takes room"


def test_vector_pages_are_given_and_taken_like_rank_pages() -> None:
    one, two, plain = version(1, 1, 1, 1), version(2, 1, 0, 1, 1), version(3, 1, 1)
    residency = book(one, two, plain, num_pages=3, num_vectors=1)
    (placement,) = place(residency, one)
    assert {kind: len(pages) for kind, pages in placement.pages.items()} == {0: 1, 1: 1, 2: 1}
    place(residency, plain)
    assert residency.resident() == [one, plain], "there are rank pages for both"
    place(residency, two)
    assert residency.resident() == [plain, two], "and one vector page of kind 0"
    residency.lease(two)
    assert residency.place(one) is None
    assert not residency.fits([one, two])
    assert residency.fits([plain, two])


def test_a_pin_must_leave_a_vector_page_of_each_kind() -> None:
    one, two, plain = version(1, 1, 1, 1), version(2, 1, 1, 1), version(3, 1, 1)
    residency = book(one, two, plain, num_pages=8, num_vectors=2)
    residency.pin(one, room=2)
    with pytest.raises(AdapterMemoryError, match=r"'adapter2': cannot be pinned: .* no vector page .* --max-loras"):
        residency.pin(two, room=2)
    residency.pin(plain, room=2)


def test_a_retired_version_stays_in_host_memory_until_it_is_dropped() -> None:
    one, two = version(1), version(2)
    residency = book(one, max_host=1)
    residency.retire(one)
    residency.store(two, "adapter2")
    assert residency.in_host(one)
    assert residency.drop(one)
    assert not residency.in_host(one)


def test_the_device_keeps_what_only_a_disk_has_longer_than_what_is_in_host_memory() -> None:
    disk, host, new, newer = (version(number) for number in (1, 2, 3, 4))
    residency = book(disk, host, max_host=2)
    place(residency, disk, host)
    residency.store(new, new.name)
    assert not residency.in_host(disk)
    place(residency, new)
    assert residency.resident() == [disk, new], "one copy is cheaper than one read"
    for _ in range(4 * FROM_DISK):
        residency.lease(new)
        residency.release(new)
    residency.store(newer, newer.name)
    place(residency, newer)
    assert residency.resident() == [new, newer], "but it does not stay for ever"


def test_host_memory_keeps_large_ones_longer_than_small_ones() -> None:
    large, small = replace(version(1), nbytes=100), replace(version(2), nbytes=10)
    residency = book(large, small, max_host=2)
    residency.store(version(3), "adapter3")
    assert [residency.in_host(each) for each in (large, small)] == [True, False]
    for number in range(4, 30):
        residency.store(replace(version(number), nbytes=10), f"adapter{number}")
    assert not residency.in_host(large)


def test_a_wanted_version_is_spared() -> None:
    one, two, three = version(1), version(2), version(3)
    residency = book(one, two, three)
    place(residency, one, two)
    assert residency.place(three, wanted={1, 2}) is None
    assert residency.place(three, wanted={1}) is not None
    assert residency.resident() == [one]
    residency.landed(three)
    assert residency.resident() == [one, three]


def test_no_more_is_evicted_than_is_needed() -> None:
    one, two, three = version(1, 1), version(2, 1), version(3, 1)
    residency = book(one, two, three)
    place(residency, one, two, three)
    assert residency.resident() == [two, three]


def test_room_is_needed_of_every_kind() -> None:
    one, two = version(1, 1, 2), version(2, 1, 1)
    residency = book(one, two)
    place(residency, one)
    residency.lease(one)
    assert residency.place(two) is None, "kind 0 has a page, kind 1 has none"


def test_whether_versions_fit_together_does_not_depend_on_what_is_there() -> None:
    one, two, three = version(1, 1, 1), version(2, 1, 0), version(3, 2, 1)
    residency = book(one)
    place(residency, one)
    residency.lease(one)
    assert residency.fits([one, two])
    assert residency.fits([three, three]), "one version twice needs its pages once"
    assert not residency.fits([two, three])


def test_host_memory_keeps_the_most_recently_used() -> None:
    one, two, three = version(1), version(2), version(3)
    residency = book(one, two, max_host=2)
    place(residency, one)  # used
    residency.store(three, three.name)
    assert [residency.in_host(each) for each in (one, two, three)] == [True, False, True]


def test_host_memory_spares_what_is_leased_and_what_is_wanted() -> None:
    one, two, three, four = version(1), version(2), version(3), version(4)
    residency = book(one, max_host=1)
    place(residency, one)
    residency.lease(one)
    residency.store(two, two.name)
    residency.store(three, three.name, wanted={2})
    assert [residency.in_host(each) for each in (one, two, three)] == [True, True, True]
    residency.release(one)
    residency.store(four, four.name)
    assert [residency.in_host(each) for each in (one, two, three, four)] == [False, False, False, True]


def test_a_version_that_cannot_be_read_again_stays_in_host_memory() -> None:
    memory, one, two = version(1, source=None), version(2), version(3)
    residency = book(memory, one, two, max_host=1)
    assert [residency.in_host(each) for each in (memory, one, two)] == [True, False, True]


def test_eviction_from_host_memory_leaves_the_device_alone() -> None:
    one, two = version(1), version(2)
    residency = book(one, max_host=1)
    place(residency, one)
    residency.store(two, two.name)
    assert not residency.in_host(one)
    assert residency.on_device(one)


# ---- kinds that few adapters need ----


def test_pages_of_embedding_and_head_are_pools_of_their_own() -> None:
    one, two, three = version(1, 1, 1, 2), version(2, 1, 1, 2), version(3, 1, 1)
    residency: Residency[str] = Residency(PageKinds(3, head=2), Room(3, ends=2), max_host=8)
    for each in (one, two, three):
        residency.store(each, each.name)
    place(residency, one, three)
    assert not residency.fits([one, two])
    place(residency, two)
    assert residency.resident() == [three, two], "the first gave its pages of the third kind"


def test_a_pin_need_leave_no_room_in_kinds_that_few_adapters_need() -> None:
    one, two = version(1, 1, 1, 2), version(2, 1, 1, 1)
    residency: Residency[str] = Residency(PageKinds(3, head=2), Room(4, ends=2), max_host=8)
    for each in (one, two):
        residency.store(each, each.name)
    residency.pin(one, room=2)
    with pytest.raises(AdapterMemoryError, match=r"adapter2.*cannot be pinned beside the others.*--lora-ends-memory"):
        residency.pin(two, room=2)
    assert not residency.fits([two])


def test_where_experts_or_the_ends_alone_take_adapters_a_pin_need_leave_nothing() -> None:
    one, two = version(1, 2), version(2, 1)
    for kinds in (PageKinds(1, experts=(0,)), PageKinds(1, head=0)):
        residency: Residency[str] = Residency(kinds, Room(0, experts=2, ends=2), max_host=8)
        for each in (one, two):
            residency.store(each, each.name)
        residency.pin(one, room=2)
        with pytest.raises(AdapterMemoryError, match="'adapter2': cannot be pinned beside the others"):
            residency.pin(two, room=2)
