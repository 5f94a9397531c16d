"""Residency: the book of where each adapter version is - on disk, in host memory, in device pages. Pure Python."""

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiolora.pages import PagePool
from aiolora.types import AdapterVersion

W = TypeVar("W")


@dataclass(frozen=True)
class Placement(Generic[W]):
    """Pages just given to a version, to be filled from `weights`."""

    version: AdapterVersion
    weights: W
    pages: dict[int, list[int]]  # kind -> page numbers


class Residency(Generic[W]):
    """Two levels: host memory (a count of versions) and device pages (a pool a kind), both least recently used first.

    A version is leased by every sequence that runs with it; a leased version is never evicted from either level. A
    placed version is on the device once its bytes have landed there; until then it is neither leased nor evicted.
    A version without a source cannot be read again and is never evicted from host memory. Engine thread only.
    """

    def __init__(self, *, num_kinds: int, num_pages: int, max_host: int) -> None:
        self._pools = [PagePool(num_pages) for _ in range(num_kinds)]
        self._max_host = max_host
        self._host: OrderedDict[int, tuple[AdapterVersion, W]] = OrderedDict()
        self._device: OrderedDict[int, tuple[AdapterVersion, dict[int, list[int]]]] = OrderedDict()
        self._arriving: set[int] = set()  # placed, their bytes still on the way
        self._leases: Counter[int] = Counter()

    def store(self, version: AdapterVersion, weights: W, *, wanted: Collection[int] = ()) -> None:
        """Keep `weights` in host memory, evicting the least recently used above the limit.

        Versions whose ids are `wanted` are spared: two that wait for room must not push each other out.
        """
        self._host[version.id] = (version, weights)
        self._host.move_to_end(version.id)
        for old in list(self._host):
            if len(self._host) <= self._max_host:
                break
            spared = old == version.id or self._leases[old] or old in wanted
            if not spared and self._host[old][0].source is not None:
                del self._host[old]

    def in_host(self, version: AdapterVersion) -> bool:
        return version.id in self._host

    def placed(self, version: AdapterVersion) -> bool:
        """Whether it has its pages, be they filled already or not."""
        return version.id in self._device

    def on_device(self, version: AdapterVersion) -> bool:
        """Whether a step may read it."""
        return version.id in self._device and version.id not in self._arriving

    def fits(self, versions: Collection[AdapterVersion]) -> bool:
        """Whether they could be on the device together, were nothing else there."""
        needs: Counter[int] = Counter()
        for version in set(versions):
            needs.update({site.kind: site.count for site in version.pages})
        return all(count <= self._pools[kind].num_pages for kind, count in needs.items())

    def resident(self) -> list[AdapterVersion]:
        """Versions on the device, least recently used first."""
        return [version for version, _ in self._device.values() if version.id not in self._arriving]

    def leased(self, version: AdapterVersion) -> int:
        return self._leases[version.id]

    def place(self, version: AdapterVersion, *, wanted: Collection[int] = ()) -> Placement[W] | None:
        """Give `version` (in host memory, not placed) its pages, evicting unleased versions. It has not `landed` yet.

        Nothing launched reads the pages of a version without leases: a sequence gives its lease back when no step with
        it is in flight. So the new bytes need not wait for any step. Versions whose ids are `wanted` are spared. None,
        and no change, where there is no room now.
        """
        _, weights = self._host[version.id]
        self._host.move_to_end(version.id)
        needs = {site.kind: site.count for site in version.pages}
        victims = [
            old for old in self._device if not self._leases[old] and old not in wanted and old not in self._arriving
        ]
        room = {kind: self._pools[kind].num_available for kind in needs}
        chosen = []
        for old in victims:
            if all(room[kind] >= count for kind, count in needs.items()):
                break
            chosen.append(old)
            for kind, pages in self._device[old][1].items():
                if kind in room:
                    room[kind] += len(pages)
        if any(room[kind] < count for kind, count in needs.items()):
            return None
        for old in chosen:
            self._evict(old)
        taken = {}
        for kind, count in needs.items():
            fresh = self._pools[kind].take(count)
            assert fresh is not None
            taken[kind] = fresh
        self._device[version.id] = (version, taken)
        self._arriving.add(version.id)
        return Placement(version, weights, taken)

    def landed(self, version: AdapterVersion) -> None:
        """All bytes of a placed version are in its pages."""
        self._arriving.remove(version.id)

    def drop(self, version: AdapterVersion) -> None:
        """Nobody will ask for `version` soon: without leases it leaves host memory, and its pages are the next to go.

        A version without a source stays: who asks all the same could not be served.
        """
        if self._leases[version.id] or version.source is None:
            return
        self._host.pop(version.id, None)
        if version.id in self._device:
            self._device.move_to_end(version.id, last=False)

    def pages(self, version: AdapterVersion) -> dict[int, list[int]]:
        """Where a placed version lies."""
        return self._device[version.id][1]

    def lease(self, version: AdapterVersion) -> None:
        """A sequence runs with `version`, which is on the device."""
        assert self.on_device(version), f"{version.label} is leased but not on the device"
        self._leases[version.id] += 1
        self._device.move_to_end(version.id)
        if version.id in self._host:
            self._host.move_to_end(version.id)

    def release(self, version: AdapterVersion) -> None:
        """That sequence runs no more."""
        assert self._leases[version.id] > 0, f"{version.label} released twice"
        self._leases[version.id] -= 1
        if not self._leases[version.id]:
            del self._leases[version.id]

    def check(self) -> None:
        """Assert that pages belong to exactly the placed versions and every leased version is placed."""
        for kind, pool in enumerate(self._pools):
            pool.check()
            held = sorted(page for _, pages in self._device.values() for page in pages.get(kind, []))
            owned = [page for page in range(pool.num_pages) if pool.refs(page)]
            assert held == owned, f"pages of kind {kind}: {owned} owned, {held} held by versions"
        for version_id, count in self._leases.items():
            assert count >= 0
            assert version_id in self._device, "a leased version was evicted"
            assert version_id not in self._arriving, "a version is leased before it has landed"
        assert self._arriving <= self._device.keys(), "a version was evicted before it had landed"

    def _evict(self, version_id: int) -> None:
        assert not self._leases[version_id], "a leased version must not be evicted"
        assert version_id not in self._arriving, "a version must not be evicted before it has landed"
        _, pages = self._device.pop(version_id)
        for kind, numbers in pages.items():
            self._pools[kind].release(numbers)
