"""Where adapters may come from when a request names one that nobody loaded: the interface, and who is registered."""

from typing import ClassVar, Protocol

from aiolora.types import LoRARequest

_MAX_NAME = 256


class LoRAResolver(Protocol):
    """Finds adapters by name. Subclass it, or bring the method.

    It runs on the engine's loop: await, or go to a worker thread for what blocks.
    """

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request that loads `lora_name`, under that very name; None: not known here.

        May raise anything: the next resolver is asked. `lora_name` has passed `may_be_resolved`.
        """
        ...


class LoRAResolverRegistry:
    """The resolvers of this process in the order they came, for every engine in it."""

    _resolvers: ClassVar[dict[str, LoRAResolver]] = {}

    @classmethod
    def register_resolver(cls, resolver_name: str, resolver: LoRAResolver) -> None:
        """Ask `resolver` from now on. One that had the name is replaced."""
        cls._resolvers[resolver_name] = resolver

    @classmethod
    def remove_resolver(cls, resolver_name: str) -> None:
        """Ask it no more. Unknown names are fine."""
        cls._resolvers.pop(resolver_name, None)

    @classmethod
    def get_supported_resolvers(cls) -> list[str]:
        """Names, in the order in which they are asked."""
        return list(cls._resolvers)

    @classmethod
    def get_resolver(cls, resolver_name: str) -> LoRAResolver:
        """The resolver of that name. Raises `KeyError`."""
        return cls._resolvers[resolver_name]


def may_be_resolved(lora_name: str) -> bool:
    """Whether a name can be part of a path or URL without leading out of it.

    Up to 256 printable characters, `a/b` but no `..`, `//`, leading `/`, backslash or percent sign. Other names are
    unknown, and no resolver sees them.
    """
    return (
        len(lora_name) <= _MAX_NAME
        and lora_name.isprintable()
        and not any(char in lora_name for char in "\\%")
        and all(part.strip() not in ("", ".", "..") for part in lora_name.split("/"))
    )
