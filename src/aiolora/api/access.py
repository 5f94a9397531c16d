"""Who may do what: keys, known by their hashes, and the guard in front of every route."""

from collections.abc import Iterable
from hashlib import sha256
from typing import Literal, TypeAlias

import msgspec
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from msgspec import Struct

from aiolora.api.errors import DrainingError, NoKeyError, NotAllowedError
from aiolora.api.visits import Caller, Door, visit_of
from aiolora.config import ServerArgs
from aiolora.errors import ConfigError

Connection: TypeAlias = ASGIConnection[BaseRouteHandler, object, object, State]
Access: TypeAlias = Literal["open", "key", "whole", "admin"]  # "whole": a key that may use every adapter

OPEN: dict[str, object] = {"access": "open"}  # `opt` of a route; without one it takes a key
WHOLE: dict[str, object] = {"access": "whole"}
ADMIN: dict[str, object] = {"access": "admin"}


class _Key(Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON form of a key."""

    key: str
    name: str | None = None
    adapters: list[str] | None = None


class Keys:
    """Callers by the SHA-256 of their keys: the keys themselves are not kept. A key is long and random, so one round
    without a salt is enough, and to look a digest up tells nothing by its time.
    """

    def __init__(self, args: ServerArgs) -> None:
        self._callers: dict[bytes, Caller] = {}
        self._add("api_key", args.api_key, admin=False)
        self._add("admin_key", args.admin_key, admin=True)
        self._stranger = None if args.api_key else Caller(admin=not args.admin_key)

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this `Authorization` header. Raises `NoKeyError` where a key is needed and this is none."""
        scheme, _, key = (authorization or "").partition(" ")
        known = self._callers.get(sha256(key.strip().encode()).digest()) if scheme.lower() == "bearer" else None
        caller = known or self._stranger
        if caller is None:
            raise NoKeyError("no valid API key: send one as `Authorization: Bearer KEY`")
        return caller

    def needed(self, access: Access) -> bool:
        """Whether nobody gets there without a key."""
        if access == "open" or self._stranger is None:
            return access != "open"
        return access == "admin" and not self._stranger.admin

    def _add(self, field: str, items: Iterable[str], *, admin: bool) -> None:
        for number, item in enumerate(items):
            said = _read(f"{field}[{number}]", item)
            if admin and said.adapters is not None:
                raise ConfigError(f"{field}[{number}]: an admin key may use every adapter; leave `adapters` out")
            digest = _digest(f"{field}[{number}]", said.key)
            if digest in self._callers:
                raise ConfigError(f"{field}[{number}]: the same key is given twice; give everybody their own")
            adapters = None if said.adapters is None else frozenset(said.adapters)
            self._callers[digest] = Caller(said.name, adapters, admin, digest.hex())


class Guard:
    """Litestar's guard of the whole app: no route is reachable without it, whoever wrote it."""

    def __init__(self, keys: Keys, door: Door) -> None:
        self._keys = keys
        self._door = door

    async def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        """Raises `NoKeyError`, `NotAllowedError`, or `DrainingError` where the server is about to stop."""
        access: Access = handler.opt.get("access", "key")
        if access == "open" or connection.scope.get("method") == "OPTIONS":
            return
        caller = self._keys.caller(connection.headers.get("authorization"))
        visit_of(connection.scope).caller = caller
        if access == "admin" and not caller.admin:
            raise NotAllowedError("this takes the admin key (--admin-key)")
        if access == "whole" and caller.adapters is not None:
            raise NotAllowedError("this takes a key that may use every adapter")
        if self._door.closed:
            raise DrainingError("the server is about to stop and takes no new requests; ask another, or later")


def _read(place: str, item: str) -> _Key:
    if not item.lstrip().startswith("{"):
        return _Key(item)
    try:
        return msgspec.json.decode(item, type=_Key)
    except msgspec.MsgspecError as error:  # the item itself is a secret
        raise ConfigError(f'{place}: {error}; write {{"key": ..., "name": ..., "adapters": [...]}}') from None


def _digest(place: str, key: str) -> bytes:
    if not key.startswith("sha256:"):
        if not key or key != key.strip() or not key.isascii():
            raise ConfigError(f"{place}: a key is ASCII text without blanks around it, and not empty")
        return sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix("sha256:"))
    except ValueError:
        digest = b""
    if len(digest) != sha256().digest_size:
        raise ConfigError(f"{place}: `sha256:` is followed by the 64 hex digits of the key's SHA-256")
    return digest
