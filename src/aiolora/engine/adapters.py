"""Adapters: what the engine thread does with them - reads asked for, copies begun, names that are gone."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

from msgspec import Struct

from aiolora.engine.scheduler import Scheduler
from aiolora.errors import AdapterChangedError, AdapterError, AdapterMemoryError, AdapterNotFoundError
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.residency import Residency
from aiolora.types import AdapterVersion, Mix

logger = logging.getLogger(__name__)


class Arrival(Protocol):
    """Bytes of an adapter on their way to the device, as `lora.pool.Arrival`."""

    def done(self) -> bool: ...

    def wait(self) -> None: ...


class Store(Protocol):
    """What is asked of `lora.pool.AdapterPool`."""

    def write(self, weights: AdapterWeights, pages: Mapping[int, list[int]]) -> Arrival: ...


READS_AHEAD = 4  # side by side, for those whose turn is not near; each read has several threads


class UnderWay(Protocol):
    """What is asked of the engine, which has the requests."""

    def mixes(self) -> list[Mix]:
        """Of every request under way, waiting ones too."""
        ...

    def fail_waiting(self, version: AdapterVersion, error: Exception) -> None:
        """End the sequences that wait for `version`."""
        ...

    def abort_all(self, version: AdapterVersion) -> None:
        """End the sequences with `version`, running or not."""
        ...


class AdapterStanding(Struct, frozen=True, kw_only=True):
    """Where one version is and who needs it, at one moment."""

    version: AdapterVersion
    residency: Literal["gpu", "cpu", "disk"]  # the fastest place that it is in; "gpu": the device's pages
    pinned: bool
    in_use: bool  # a sequence runs with it
    requests: int  # under way with it, waiting ones too
    draining: bool  # its name is gone, or stands for another version
    earlier: AdapterVersion | None = None  # what `rollback_lora` of its name would bring back


class Adapters:
    """Versions on their way: read again, copied to the device, held for requests to come, dropped after the last.

    `Residency` is the book of where they are; this asks for what is missing. `room_of_one`: rank pages of a kind that
    pinned adapters leave to the others, enough for the largest. `read_again(version)` is called when an evicted one is
    needed: it must not block, and answers by `landed` or `failed` later (or at once). Engine thread only.
    """

    def __init__(
        self,
        requests: UnderWay,
        scheduler: Scheduler,
        residency: Residency[AdapterWeights],
        store: Store | None,
        *,
        room_of_one: int,
        read_again: Callable[[AdapterVersion], None],
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._residency = residency
        self._store = store
        self._room = room_of_one
        self._read_again = read_again
        self.reading: set[int] = set()  # ids of versions that `read_again` was asked for
        self.copying: list[tuple[AdapterVersion, Arrival]] = []  # placed and not landed, oldest first
        self.stirred = False  # somebody called since this was set to False last
        self._holds: Counter[int] = Counter()  # version id -> requests that were prepared with it and are alive
        self._going: dict[int, AdapterVersion] = {}  # names are gone, somebody under way may need them
        self._kept: set[int] = set()  # those of them that are shelved then, not dropped
        self._barred: set[int] = set()  # those of them that nobody may begin with any more

    # ---- what callers ask for ----

    def add(self, weights: AdapterWeights) -> None:
        """Keep a version that was just read in host memory."""
        self.stirred = True
        self._residency.store(weights.version, weights, wanted=self._wanted())

    def replace(self, old: AdapterVersion, new: AdapterWeights | AdapterVersion, *, keep: bool = False) -> None:
        """The name of `old` stands for `new` from now on, which is added, or was revived; a pin goes over to it.

        `old` is dropped; `keep`: host memory may have it for longer, for who wants it back.
        """
        pinned = self._residency.pinned(old)
        self._retire(old, keep=keep)
        if not isinstance(new, AdapterVersion):
            self.add(new)
            new = new.version
        if pinned:
            try:
                self.pin(new)
            except AdapterMemoryError as error:
                logger.warning("%s is not pinned any more: %s", new.label, error)

    def revive(self, version: AdapterVersion) -> bool:
        """A name is to stand again for a version that was replaced and kept. False: it is not in host memory any more.

        `drop` it where the name stands for something else after all.
        """
        if not self._residency.revive(version):
            return False
        self._going.pop(version.id, None)
        self._kept.discard(version.id)
        return True

    def drop(self, version: AdapterVersion, *, force: bool = False) -> None:
        """Its name is gone: what it takes is free as soon as nobody under way needs it. `force`: they are aborted."""
        if force:
            self._barred.add(version.id)
        self._retire(version, keep=False)
        if force:
            self.stirred = True
            self._requests.abort_all(version)
            self.sweep()

    def pin(self, version: AdapterVersion) -> None:
        """Keep it in host memory (read again at once where it is not) and, once there, on the device.

        Raises `AdapterMemoryError` where that would leave somebody else without room.
        """
        for mix in set(self._requests.mixes()):
            if not self._residency.fits([version, *mix.versions]):
                names = "+".join(other.name for other in mix.versions)
                raise AdapterMemoryError(
                    version.name,
                    f"cannot be pinned: requests under way with {names} need its room; raise --lora-memory or wait",
                )
        self._residency.pin(version, room=self._room)
        if not self._residency.in_host(version) and version.id not in self.reading:
            self._read(version)

    def unpin(self, version: AdapterVersion) -> None:
        """It may be evicted again."""
        self._residency.unpin(version)

    def hold(self, version: AdapterVersion) -> None:
        """A request with `version` is prepared and may be added any time: it is not dropped before `let_go`."""
        self._holds[version.id] += 1

    def let_go(self, version: AdapterVersion) -> None:
        """That request has ended, or will never be added."""
        self._holds[version.id] -= 1
        self._holds += Counter()  # without the zeros
        self.sweep()

    def standing(
        self, versions: Iterable[AdapterVersion], earlier: Mapping[str, AdapterVersion] | None = None
    ) -> list[AdapterStanding]:
        """How it is with each of `versions`, then with those whose names are gone and that are not free yet.

        `earlier`: by name, what the names of `versions` stood for before.
        """
        before = {name: version for name, version in (earlier or {}).items() if self._may_come_back(version)}
        requests: Counter[int] = Counter()
        for mix in self._requests.mixes():
            requests.update({version.id for version in mix.versions})
        return [
            AdapterStanding(
                version=version,
                residency="gpu"
                if self._residency.on_device(version)
                else "cpu"
                if self._residency.in_host(version)
                else "disk",
                pinned=self._residency.pinned(version),
                requests=requests[version.id],
                in_use=bool(self._residency.leased(version)),
                draining=version.id in self._going,
                earlier=None if version.id in self._going else before.get(version.name),
            )
            for version in dict.fromkeys([*versions, *self._going.values()])
        ]

    def landed(self, version: AdapterVersion, weights: AdapterWeights) -> None:
        """`read_again(version)` brought these weights, in the name of `version` if they are the same."""
        if weights.version.digest != version.digest:
            self.failed(
                version,
                AdapterChangedError(
                    version.name,
                    f"{version.source} now holds {weights.version.digest[:12]}, not {version.digest[:12]} as when "
                    "it was loaded; load it again with load_inplace=True",
                ),
            )
            return
        self.stirred = True
        self.reading.discard(version.id)
        self._residency.store(version, weights, wanted=self._wanted())
        self.sweep()

    def failed(self, version: AdapterVersion, error: Exception) -> None:
        """`read_again(version)` failed: whoever waits for it fails, nobody else."""
        self.stirred = True
        self.reading.discard(version.id)
        self._requests.fail_waiting(version, error)
        self.sweep()

    # ---- what the engine asks for, every step ----

    def refusal(self, mix: Mix) -> AdapterError | None:
        """Why a request with `mix` would wait for ever; None: it would not."""
        name = "+".join(version.name for version in mix.versions)
        if not self._residency.fits(mix.versions):
            return AdapterMemoryError(
                name,
                "together they need more pages than the room for adapters has, beside those that are pinned; raise "
                "--lora-memory, or --lora-ends-memory where it is of embeddings, heads or norms",
            )
        if any(version.source is None and not self._residency.in_host(version) for version in mix.versions):
            return AdapterNotFoundError(name, "was removed, and it came from memory: load it again")
        return None

    def barred(self, mix: Mix) -> bool:
        """Whether a version of `mix` was removed by force."""
        return any(version.id in self._barred for version in mix.versions)

    def sweep(self) -> None:
        """Drop what has no name any more and that nobody under way needs."""
        if not self._going:
            return
        needed = {version.id for mix in self._requests.mixes() for version in mix.versions}
        for version in list(self._going.values()):
            if version.id in needed or version.id in self.reading or self._holds[version.id]:
                continue
            kept = version.id in self._kept
            if self._residency.shelve(version) if kept else self._residency.drop(version):
                del self._going[version.id]
                self._barred.discard(version.id)
                self._kept.discard(version.id)

    def place(self) -> None:
        """Bring what the next steps need onto the device, as far as there is room; nobody waits for it.

        A mix may take the room of those behind it in line: were they spared too, two that do not fit together could
        each wait for the other. What is wanted later is begun now, as far as that costs nobody before it anything: the
        next in line for a slot are copied to the device, those behind them are read from disk.
        """
        self._look_for_landed()
        spared: set[int] = set()
        while (missing := self._place_wanted(spared)) is not None:
            self._read(missing)  # passed over from now on, or there, or failed: look again who comes next
            spared.clear()
        self._look_ahead(spared)

    def wait(self) -> None:
        """Block until the copy begun first has landed; there must be one."""
        self.copying[0][1].wait()

    def resident(self) -> list[AdapterVersion]:
        """As `Residency.resident`."""
        return self._residency.resident()

    def _retire(self, version: AdapterVersion, *, keep: bool) -> None:
        self._residency.retire(version)
        self._going[version.id] = version
        if keep:
            self._kept.add(version.id)
        else:
            self._kept.discard(version.id)
        self.sweep()

    def _may_come_back(self, version: AdapterVersion) -> bool:
        return version.source is not None or self._residency.in_host(version)

    def _place_wanted(self, spared: set[int]) -> AdapterVersion | None:
        """Up to the first that is to be read; `spared` becomes the ids of all that are wanted up to there."""
        for mix in self._scheduler.wanted(self.reading):
            spared.update(version.id for version in mix.versions)
            for version in mix.versions:
                if self._missing(version):
                    return version
                if not self._residency.placed(version) and version.id not in self.reading:
                    self._bring(version, spared)
        return None

    def _look_ahead(self, spared: set[int]) -> None:
        line = self._scheduler.line()
        for mix in line[: self._scheduler.limits.max_loras]:
            spared.update(version.id for version in mix.versions)
            for version in mix.versions:
                if self._residency.in_host(version) and not self._residency.placed(version):
                    self._bring(version, spared)
        if not any(self._missing(version) for mix in line for version in mix.versions):
            return
        while len(self.reading) < READS_AHEAD:
            missing = next(filter(self._missing, self._kept_ready()), None)
            if missing is None:
                return
            self._read(missing)

    def _missing(self, version: AdapterVersion) -> bool:
        there = self._residency.in_host(version) or self._residency.placed(version)
        return not there and version.id not in self.reading

    def _kept_ready(self) -> list[AdapterVersion]:
        """As many as host memory holds beside what stays there anyway: of those that run, then of those in line."""
        taken = self._residency.staying()
        ready: list[AdapterVersion] = []
        for mix in self._scheduler.lineup():
            for version in mix.versions:
                if version.id not in taken and (
                    self._residency.in_host(version) or not self._residency.placed(version)
                ):
                    taken.add(version.id)
                    if len(taken) > self._residency.max_host:
                        return ready
                    ready.append(version)
        return ready

    def _look_for_landed(self) -> None:
        under_way = []
        for version, arrival in self.copying:
            if arrival.done():
                self._residency.landed(version)
            else:
                under_way.append((version, arrival))
        self.copying = under_way

    def _bring(self, version: AdapterVersion, spared: set[int]) -> None:
        placement = self._residency.place(version, wanted=spared)
        if placement is not None:
            arrival = self._store.write(placement.weights, placement.pages) if self._store is not None else None
            if arrival is None or arrival.done():
                self._residency.landed(version)
            else:
                self.copying.append((version, arrival))

    def _read(self, version: AdapterVersion) -> None:
        self.reading.add(version.id)
        self._read_again(version)

    def _wanted(self) -> set[int]:
        """What host memory must not lose for others: they would push each other out for ever."""
        next_ones = {version.id for mix in self._scheduler.wanted(self.reading) for version in mix.versions}
        return next_ones | {version.id for version in self._kept_ready()}
