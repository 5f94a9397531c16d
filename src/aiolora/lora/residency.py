"""Residency: the book of where each adapter version is - on disk, in host memory, in device pages. Pure Python."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiolora.errors import AdapterMemoryError
from aiolora.lora.eviction import FROM_DISK, worth
from aiolora.lora.kinds import PageKinds, Room
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
    """Two levels: host memory (a count of versions) and device pages (a pool a kind). `worth` says who goes first.

    Each kind of page has a pool, of as many as there is `room` for. A version is leased by every sequence that runs
    with it; a leased version is never evicted from either level. A placed version is on the device once its bytes have
    landed there; until then it is neither leased nor evicted. A version without a source cannot be read again and is
    never evicted from host memory, only dropped. A pinned version is evicted from neither level, a retired one (its
    name is gone, requests under way still need it) not from host memory: its source may hold something else by now. A
    shelved one (no request needs it, its name may come back to it) is a guest in host memory, the first to be evicted.
    Engine thread only.
    """

    def __init__(self, kinds: PageKinds, room: Room, *, max_host: int) -> None:
        self._kinds = kinds
        self._pools = [PagePool(count) for count in room.pages(kinds)]
        self.max_host = max_host
        self._host: dict[int, tuple[AdapterVersion, W]] = {}
        self._device: dict[int, tuple[AdapterVersion, dict[int, list[int]]]] = {}
        self._uses = 0  # of any version, so far
        self._used: dict[int, int] = {}  # version id -> which of those was its last
        self._arriving: set[int] = set()  # placed, their bytes still on the way
        self._leases: Counter[int] = Counter()
        self._pinned: dict[int, AdapterVersion] = {}
        self._retired: set[int] = set()
        self._shelved: set[int] = set()

    def store(self, version: AdapterVersion, weights: W, *, wanted: Collection[int] = ()) -> None:
        """Keep `weights` in host memory, evicting who is worth least above the limit.

        Versions whose ids are `wanted` are spared: two that wait for room must not push each other out.
        """
        self._host[version.id] = (version, weights)
        self._use(version)
        surplus = len(self._host) - self.max_host
        if surplus <= 0:
            return
        victims = [
            old
            for old in self._host
            if not (old == version.id or self._leases[old] or old in wanted or self._stays(old))
        ]
        for old in sorted(victims, key=self._worth_in_host)[:surplus]:
            del self._host[old]
            self._shelved.discard(old)

    def staying(self) -> set[int]:
        """Ids of versions that leave host memory only by `unpin` or `drop`."""
        return {number for number in self._host if self._stays(number)}

    def in_host(self, version: AdapterVersion) -> bool:
        return version.id in self._host

    def placed(self, version: AdapterVersion) -> bool:
        """Whether it has its pages, be they filled already or not."""
        return version.id in self._device

    def on_device(self, version: AdapterVersion) -> bool:
        """Whether a step may read it."""
        return version.id in self._device and version.id not in self._arriving

    def fits(self, versions: Collection[AdapterVersion]) -> bool:
        """Whether they could be on the device together, were nothing else there but what is pinned."""
        return all(spare >= 0 for spare in self._spare_pages([*self._pinned.values(), *versions]))

    def resident(self) -> list[AdapterVersion]:
        """Versions on the device, least recently used first."""
        there = [version for version, _ in self._device.values() if version.id not in self._arriving]
        return sorted(there, key=lambda version: self._used[version.id])

    def leased(self, version: AdapterVersion) -> int:
        return self._leases[version.id]

    def place(self, version: AdapterVersion, *, wanted: Collection[int] = ()) -> Placement[W] | None:
        """Give `version` (in host memory, not placed) its pages, evicting unleased versions. It has not `landed` yet.

        Nothing launched reads the pages of a version without leases: a sequence gives its lease back when no step with
        it is in flight. So the new bytes need not wait for any step. Versions whose ids are `wanted` are spared. None,
        and no change, where there is no room now.
        """
        _, weights = self._host[version.id]
        self._use(version)
        needs = {site.kind: site.count for site in version.pages}
        victims = sorted(
            (
                old
                for old in self._device
                if not (self._leases[old] or old in wanted or old in self._arriving or old in self._pinned)
            ),
            key=self._worth_on_device,
        )
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

    def pin(self, version: AdapterVersion, *, room: int) -> None:
        """Evict `version` from neither level until `unpin` or `drop`. Pinned already: nothing.

        Raises `AdapterMemoryError` where host memory would have room for no other version, or the device for none of
        `room` rank pages and a vector page a kind inside the layers: whoever is not pinned must still be served, if one
        at a time. Of routed experts and at the ends a pin need leave nothing.
        """
        if version.id in self._pinned:
            return
        if len(self._pinned) + 1 >= self.max_host:
            raise AdapterMemoryError(
                version.name,
                f"cannot be pinned: {len(self._pinned)} are, and max_cpu_loras={self.max_host} must leave room for "
                "one that is not; raise --max-cpu-loras or unpin another",
            )
        spare = self._spare_pages([*self._pinned.values(), version])
        vectors = [self._kinds.vectors_of(site) for site in self._kinds.linears]
        if any(site.kind in vectors for site in version.pages) and min(spare[kind] for kind in vectors) < 1:
            raise AdapterMemoryError(
                version.name,
                "cannot be pinned: it would leave no vector page of a kind for another adapter with DoRA or biases; "
                "raise --max-loras or unpin another",
            )
        least = min((spare[kind] for kind in self._kinds.linears), default=room)
        if least < room:
            raise AdapterMemoryError(
                version.name,
                f"cannot be pinned: it would leave {max(0, least)} rank pages of a kind, and one "
                f"adapter of max_lora_rank needs {room}; raise --lora-memory or unpin another",
            )
        if any(spare[kind] < 0 for kind in self._kinds.experts):
            raise AdapterMemoryError(
                version.name,
                "cannot be pinned beside the others: there is no room for all their experts; raise --lora-memory or "
                "unpin another",
            )
        if min(spare, default=0) < 0:
            raise AdapterMemoryError(
                version.name,
                "cannot be pinned beside the others: there is no room for all their embeddings, heads or norms; raise "
                "--lora-ends-memory or unpin another",
            )
        self._pinned[version.id] = version

    def unpin(self, version: AdapterVersion) -> None:
        """It may be evicted again. Not pinned: nothing."""
        self._pinned.pop(version.id, None)

    def pinned(self, version: AdapterVersion) -> bool:
        return version.id in self._pinned

    def retire(self, version: AdapterVersion) -> None:
        """Its name is gone: it is pinned no more, and stays in host memory, if it is there, until it is dropped."""
        self.unpin(version)
        self._retired.add(version.id)

    def shelve(self, version: AdapterVersion) -> bool:
        """Nobody needs a retired `version` now: free what it takes on the device; host memory keeps it while it can.

        False, and nothing done, as `drop`.
        """
        if self._leases[version.id] or version.id in self._arriving:
            return False
        self._retired.discard(version.id)
        if len(self._host) > self.max_host:
            self._host.pop(version.id, None)
        elif version.id in self._host:
            self._shelved.add(version.id)
        if version.id in self._device:
            self._evict(version.id)
        return True

    def revive(self, version: AdapterVersion) -> bool:
        """A name stands for a retired or shelved version again, if host memory has it; whether it has."""
        if version.id not in self._host:
            return False
        self._retired.discard(version.id)
        self._shelved.discard(version.id)
        self._use(version)
        return True

    def drop(self, version: AdapterVersion) -> bool:
        """Nobody will ask for `version` any more: free what it takes on both levels.

        False, and nothing done, while it is leased or its bytes are on the way to the device.
        """
        if self._leases[version.id] or version.id in self._arriving:
            return False
        self.unpin(version)
        self._retired.discard(version.id)
        self._shelved.discard(version.id)
        self._host.pop(version.id, None)
        if version.id in self._device:
            self._evict(version.id)
        self._used.pop(version.id, None)
        return True

    def pages(self, version: AdapterVersion) -> dict[int, list[int]]:
        """Where a placed version lies."""
        return self._device[version.id][1]

    def lease(self, version: AdapterVersion) -> None:
        """A sequence runs with `version`, which is on the device."""
        assert self.on_device(version), f"{version.label} is leased but not on the device"
        self._leases[version.id] += 1
        self._use(version)

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
        assert self._shelved <= self._host.keys(), "a version is on no shelf"
        assert not self._shelved & self._device.keys(), "a shelved version is on the device"

    def _use(self, version: AdapterVersion) -> None:
        self._uses += 1
        self._used[version.id] = self._uses

    def _worth_in_host(self, version_id: int) -> float:
        cost = 0 if version_id in self._shelved else max(self._host[version_id][0].nbytes, 1)
        return worth(cost, self._age(version_id))

    def _worth_on_device(self, version_id: int) -> float:
        return worth(1 if version_id in self._host else FROM_DISK, self._age(version_id))

    def _age(self, version_id: int) -> int:
        return self._uses - self._used[version_id] + 1

    def _stays(self, version_id: int) -> bool:
        """Whether what is in host memory may go only by `drop`."""
        if version_id in self._shelved:
            return False
        return version_id in self._pinned or version_id in self._retired or self._host[version_id][0].source is None

    def _spare_pages(self, versions: Collection[AdapterVersion]) -> list[int]:
        """Pages of each kind that those versions would leave, were nothing else on the device."""
        spare = [pool.num_pages for pool in self._pools]
        for version in set(versions):
            for site in version.pages:
                spare[site.kind] -= site.count
        return spare

    def _evict(self, version_id: int) -> None:
        assert not self._leases[version_id], "a leased version must not be evicted"
        assert version_id not in self._arriving, "a version must not be evicted before it has landed"
        _, pages = self._device.pop(version_id)
        for kind, numbers in pages.items():
            self._pools[kind].release(numbers)
