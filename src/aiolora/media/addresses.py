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

    Hosts that are `named` wait for nobody else's. Owned by the loop.
    """

    def __init__(self, named: Collection[str]) -> None:
        self._named = frozenset(named)
        self._own = anyio.CapacityLimiter(max(1, len(self._named)))
        self._others = anyio.CapacityLimiter(LOOK_UPS)
        self._under_way: dict[str, asyncio.Task[str]] = {}

    async def of(self, host: str) -> str:
        """One address of `host`. Raises `OSError` or `UnicodeError`; who stops waiting takes it from nobody else."""
        task = self._under_way.get(host)
        if task is None:
            task = self._under_way[host] = asyncio.ensure_future(self._look_up(host))
            task.add_done_callback(partial(self._end, host))
        return await asyncio.shield(task)

    async def _look_up(self, host: str) -> str:
        found = await anyio.to_thread.run_sync(
            partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM),
            limiter=self._own if host in self._named else self._others,
            abandon_on_cancel=True,  # by the end of the loop only
        )
        return str(found[0][4][0]).partition("%")[0]

    def _end(self, host: str, task: asyncio.Task[str]) -> None:
        del self._under_way[host]
        if not task.cancelled():
            task.exception()  # who asked may have left


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
