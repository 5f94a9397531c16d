"""Queues: who waits, and whose turn it is. Pure Python, no clock of its own.

`Queues` shares tokens among mixes; `Slots` shares the few places for distinct mixes among them in time.
"""

from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from itertools import takewhile
from operator import attrgetter

from aiolora.engine.sequence import Sequence
from aiolora.types import Mix

MAX_ABSENT = 256  # counters of mixes that have nothing waiting, before those that say nothing are forgotten

turn_of, seniority_of = attrgetter("turn"), attrgetter("seniority")


class Queues:
    """Waiting sequences, a queue a mix (the base model is one), each in order of arrival and priority.

    Mixes are ordered by virtual token counters (VTC, arXiv 2401.00588): a mix is charged for what the device does for
    it, over its weight, and the one charged least comes first, ties by arrival. So two mixes that both have something
    waiting get service as their weights are, up to one step's; alone, a mix is first come, first served. A mix that
    comes back is lifted to the least counter of those that wait: nobody saves up for later.
    """

    def __init__(self) -> None:
        self._queues: dict[Mix | None, deque[Sequence]] = {}
        self._served: defaultdict[Mix | None, float] = defaultdict(float)
        self._floor = 0.0  # what the mix that emptied its queue last had been charged

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def __contains__(self, mix: Mix | None) -> bool:
        return mix in self._queues

    def add(self, seq: Sequence) -> None:
        """Let `seq` wait, behind those of its mix that it does not come before; so a preempted one is soon back."""
        queue = self._queues.get(seq.mix)
        if queue is None:
            self._lift(seq.mix)
            queue = self._queues[seq.mix] = deque()
        insort(queue, seq, key=turn_of)

    def remove(self, seq: Sequence) -> None:
        """`seq` waits no more; fine if it never did."""
        queue = self._queues.get(seq.mix)
        if queue and seq in queue:
            queue.remove(seq)
            if not queue:
                del self._queues[seq.mix]
                self._floor = max(self._floor, self.served(seq.mix))

    def head(self, mix: Mix | None) -> Sequence:
        return self._queues[mix][0]

    def heads(self) -> list[tuple[float, int, Sequence]]:
        """(charged, number, sequence) of the first of each mix: the least comes first."""
        return [self.rank(mix) for mix in self._queues]

    def rank(self, mix: Mix | None) -> tuple[float, int, Sequence]:
        head = self._queues[mix][0]
        return self.served(mix), head.number, head

    def served(self, mix: Mix | None) -> float:
        return self._served.get(mix, 0.0)

    def shared(self, mix: Mix | None) -> bool:
        """Whether anything but `mix` was served since nobody waited or ran last, as far as is remembered."""
        return len(self._served) > (mix in self._served)

    def charge(self, mix: Mix | None, count: float) -> None:
        """The device computes so many tokens for `mix`, those that it samples counted twice, all over its weight."""
        self._served[mix] += count

    def keep_up(self, limited: Collection[Mix]) -> None:
        """`limited` could not go on for limits of their own: they save nothing up, as if they had not waited."""
        least = min((self.served(mix) for mix in self._queues if mix not in limited), default=self._floor)
        for mix in limited:
            self._served[mix] = max(self.served(mix), least)

    def forget(self) -> None:
        """Nobody waits or runs: all are equal again."""
        self._served.clear()
        self._floor = 0.0

    def _lift(self, mix: Mix | None) -> None:
        least = min(map(self.served, self._queues), default=self._floor)
        if len(self._served) > len(self._queues) + MAX_ABSENT:
            for old in [old for old, count in self._served.items() if count <= least and old not in self._queues]:
                del self._served[old]
        self._served[mix] = max(self.served(mix), least)


class Slots:
    """At most `limit` distinct mixes of adapters at a time, and their change.

    A mix that has waited `patience_s` for a slot is due. For each mix that is due the running mix that was served most
    is closed: it lets nobody new in, so it ends with its running answers, and everybody else goes on. Meanwhile slots
    go to those that are due, in the order in which they began to wait.

    So while no more mixes wait than there are slots, a mix gets one after `patience_s` and the longest running answer
    of one mix (and its copy to the device); a request that comes when its own mix has just been closed waits for that
    to end before. With k times as many mixes as slots waiting, after k times that. Where adapters are too large to
    share the device, mixes are closed until the first in line has room.
    """

    def __init__(self, limit: int, patience_s: float) -> None:
        self.active: Counter[Mix] = Counter()  # sequences that hold leases, a mix
        self.closed: set[Mix] = set()
        self._limit = limit
        self._patience_s = patience_s
        self._since: dict[Mix, float] = {}  # when a mix without a slot began to wait for one
        self._entrants: Collection[Mix] = ()

    def wait(self, mix: Mix, now: float) -> None:
        """Something of `mix` waits."""
        if mix not in self.active:
            self._since.setdefault(mix, now)

    def give_up(self, mix: Mix) -> None:
        """Nothing of `mix` waits any more."""
        self._since.pop(mix, None)

    def enter(self, mix: Mix) -> None:
        """A sequence of `mix` runs."""
        self.active[mix] += 1
        self._since.pop(mix, None)

    def leave(self, mix: Mix) -> bool:
        """That sequence has ended; whether it was the last of its mix."""
        self.active[mix] -= 1
        if self.active[mix]:
            return False
        del self.active[mix]
        self.closed.discard(mix)
        return True

    def line(self) -> list[Mix]:
        """Mixes that wait for a slot, the longest wait first."""
        return sorted(self._since, key=self._since.__getitem__)

    def turn(
        self,
        now: float,
        *,
        held_up: Callable[[Mix], bool],
        ready: Callable[[Mix], bool],
        served: Callable[[Mix], float],
    ) -> None:
        """Decide who may take a slot in this step, and who is closed. Who is `held_up` from outside is never due."""
        line = self.line()
        due = [mix for mix in line if now - self._since[mix] >= self._patience_s and not held_up(mix)]
        # who is due and has no room must not see it taken by those behind it
        self._entrants = set(takewhile(ready, due) if due else line)
        free = self._limit - len(self.active)
        wanting = len(due) - min(free, len(self._entrants)) if due else 0
        order = sorted(self.active, key=lambda mix: (mix in self.closed, served(mix)), reverse=True)
        self.closed = set(order[:wanting])

    def admits(self, seq: Sequence) -> bool:
        """Whether `seq` may run as far as slots go; one that had begun to answer may always go on in its own."""
        mix = seq.mix
        if mix is None:
            return True
        if mix in self.active:
            return mix not in self.closed or seq.num_output > 0
        return len(self.active) < self._limit and mix in self._entrants
