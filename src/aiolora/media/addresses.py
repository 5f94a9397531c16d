"""Where hosts are, and which of that is within a network."""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from functools import partial

import anyio
import anyio.to_thread

LOOK_UPS = 32  # at a time, of hosts that nobody named
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Addresses:
    """Looks hosts up in threads, each once at a time, however many ask: a silent name server holds one thread a host.

    Hosts that are `named` wait for nobody else's. What no thread has begun when the last asker leaves is not begun.
    Owned by the loop.
    """

    def __init__(self, named: Collection[str]) -> None:
        self._named = frozenset(named)
        self._own = anyio.CapacityLimiter(max(1, len(self._named)))
        self._others = anyio.CapacityLimiter(LOOK_UPS)
        self._under_way: dict[str, _LookUp] = {}

    async def of(self, host: str) -> str:
        """One address of `host`. Raises `OSError` or `UnicodeError`; who stops waiting takes it from nobody else."""
        look_up = self._under_way.get(host)
        if look_up is None:
            look_up = self._under_way[host] = _LookUp(host, self._own if host in self._named else self._others)
            look_up.task.add_done_callback(partial(self._end, host, look_up))
        look_up.askers += 1
        try:
            return await asyncio.shield(look_up.task)
        finally:
            look_up.askers -= 1
            if not look_up.askers and not look_up.begun:
                look_up.task.cancel()
                self._forget(host, look_up)  # who asks from now on begins anew

    def _end(self, host: str, look_up: "_LookUp", task: asyncio.Task[str]) -> None:
        self._forget(host, look_up)
        if not task.cancelled():
            task.exception()  # who asked may have left

    def _forget(self, host: str, look_up: "_LookUp") -> None:
        if self._under_way.get(host) is look_up:
            del self._under_way[host]


class _LookUp:
    """Of one host, for as many as ask meanwhile."""

    def __init__(self, host: str, limiter: anyio.CapacityLimiter) -> None:
        self.askers = 0
        self.begun = False  # a thread is at it, which nothing can interrupt
        self.task = asyncio.ensure_future(self._address(host, limiter))

    async def _address(self, host: str, limiter: anyio.CapacityLimiter) -> str:
        async with limiter:
            self.begun = True
            found = await anyio.to_thread.run_sync(
                partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM),
                limiter=anyio.CapacityLimiter(1),  # it has its turn
                abandon_on_cancel=True,  # by the end of the loop only
            )
        return str(found[0][4][0]).partition("%")[0]


def is_public(address: str) -> bool:
    """Not of the own machine or network, however it is written (an IPv6 address may carry one of IPv4)."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if parsed in _NAT64:
            embedded.append(ipaddress.IPv4Address(parsed.packed[-4:]))
        if any(one is not None and not one.is_global for one in embedded):
            return False
    return parsed.is_global and not parsed.is_multicast
