"""AdapterRegistry: which version a name stands for. Pure Python."""

import difflib
import itertools
from collections.abc import Callable, Sequence

from aiolora.errors import AdapterConflictError, RequestError, UnknownModelError
from aiolora.types import AdapterVersion, AnnouncedAdapter, LoRARequest

_LONGEST = 200  # characters of a name that is not known
_ALIKE = 3  # characters at its begin
_COMPARED = 32  # names with it


class AdapterRegistry:
    """Names of adapters, in the order they came: the version each means now, or what is to be read for it first.

    An alias stands for a name, and so for whatever that name means. Owned by the loop (or by the caller of a blocking
    face). A name is forgotten at once; holders keep the version.
    """

    def __init__(self, base_model: str) -> None:
        self._base_models = [base_model]
        self._known: dict[str, AdapterVersion | AnnouncedAdapter] = {}
        self._earlier: dict[str, AdapterVersion] = {}  # what a name meant before; of another digest
        self._aliases: dict[str, str] = {}
        self._ids: dict[str, int] = {}
        self._name_of_id: dict[int, str] = {}
        self._numbers = itertools.count(2**63 - 1, -1)  # far from those that callers count up from 1

    def known(self) -> list[AdapterVersion | AnnouncedAdapter]:
        """What every name stands for, oldest name first."""
        return list(self._known.values())

    def versions(self) -> list[AdapterVersion]:
        """Every published version, oldest name first."""
        return [known for known in self._known.values() if isinstance(known, AdapterVersion)]

    def names(self) -> list[str]:
        """All that an adapter can be asked for by: names, oldest first, then aliases."""
        return [*self._known, *self._aliases]

    def look_up(self, name: str) -> AdapterVersion | AnnouncedAdapter | None:
        """What a name or an alias stands for, be it read or not; None: nothing."""
        return self._known.get(self._aliases.get(name, name))

    def announced(self, name: str) -> AnnouncedAdapter | None:
        """What is to be read before a name or an alias can be served; None: nothing."""
        known = self.look_up(name)
        return known if isinstance(known, AnnouncedAdapter) else None

    def reserve(self, name: str) -> None:
        """`name` is another name of the base model: no adapter may have it. Raises `AdapterConflictError`."""
        if name in self._known or name in self._aliases:
            raise AdapterConflictError(name, "is to be the served name of the base model; choose another")
        if name not in self._base_models:
            self._base_models.append(name)

    def knows(self, name: str) -> bool:
        """Whether `name` stands for an adapter, or for the base model."""
        return name in self._known or name in self._aliases or name in self._base_models

    def find(self, name: str) -> AdapterVersion:
        """The version that `name` stands for; one that is announced has to be read first.

        Raises `UnknownModelError` with the nearest known names.
        """
        known = self._known[self.name(name)]
        assert isinstance(known, AdapterVersion), f"{name} was not read yet"
        return known

    def named(self, lora: str | int) -> str | None:
        """The name of an adapter by its name, an alias or its `lora_int_id`; None: there is none."""
        name = self._name_of_id.get(lora) if isinstance(lora, int) else self._aliases.get(lora, lora)
        return name if name in self._known else None

    def name(self, lora: str | int) -> str:
        """As `named`. Raises `UnknownModelError` with the nearest known names."""
        name = self.named(lora)
        if name is None:
            known = [*self._base_models, *self.names()]
            close = nearest(str(lora), known)
            hint = f"known are: {', '.join(known[:8])}" if close is None else f"did you mean {close!r}?"
            raise UnknownModelError(f"the model {str(lora)[:_LONGEST]!r} does not exist; {hint}")
        return name

    def number(self, name: str) -> int:
        """The id of `name`; one that nobody has, and that is handed out once, where it is not known."""
        known = self._ids.get(name)
        return known or next(number for number in self._numbers if number not in self._name_of_id)

    def match(self, request: LoRARequest) -> AdapterVersion | None:
        """The published version that `request` means; None: it has to be read first.

        Raises `AdapterConflictError` where the name or the id already stands for something else.
        """
        name = request.lora_name
        self.check(name, request.lora_int_id)
        known = self._known.get(name)
        if known is None or request.load_inplace:
            return None
        if known.source != request.lora_path:
            raise _taken(known, f"not from {request.lora_path!r}")
        return known if isinstance(known, AdapterVersion) else None

    def check(self, name: str, number: int) -> None:
        """Raises `AdapterConflictError` where the name is the base model's, or name and id do not belong together."""
        if name in self._base_models:
            raise AdapterConflictError(name, "is the name of the base model; choose another")
        if name in self._aliases:
            raise AdapterConflictError(
                name, f"is an alias of {self._aliases[name]!r}; remove it, or choose another name"
            )
        owner = self._name_of_id.get(number)
        if owner is not None and owner != name:
            raise AdapterConflictError(name, f"lora_int_id={number} already stands for {owner!r}; give each its own")
        known = self._ids.get(name, number)
        if known != number:
            raise AdapterConflictError(name, f"was loaded with lora_int_id={known} and is now asked for with {number}")

    def announce(self, adapter: AnnouncedAdapter) -> None:
        """From now on the name is known, and to be read when it is asked for. Known from there already: nothing.

        Raises `AdapterConflictError` as `match`.
        """
        if self.match(adapter.request) is None and adapter.name not in self._known:
            self._put(adapter, adapter.request.lora_int_id)

    def publish(self, version: AdapterVersion, number: int, *, replace: bool) -> AdapterVersion | None:
        """From now on the name stands for `version`; returns the version for which it stood until now.

        Raises `AdapterConflictError` as `check`, and where the name is known and not to be replaced.
        """
        old = self._known.get(version.name)
        awaited = isinstance(old, AnnouncedAdapter) and old.source == version.source
        if old is not None and not replace and not awaited:
            raise _taken(old, "and is not to be replaced")
        self.check(version.name, number)
        replaced = old if isinstance(old, AdapterVersion) else None
        if replaced is not None and replaced.digest != version.digest:
            self._earlier[version.name] = replaced
        self._put(version, number)
        return replaced

    def earlier(self, name: str) -> AdapterVersion | None:
        """What the name meant before what it means now; None: nothing, or it is forgotten."""
        return self._earlier.get(name)

    def earlier_versions(self) -> dict[str, AdapterVersion]:
        """All that `earlier` gives, by name."""
        return dict(self._earlier)

    def alias(self, alias: str, lora: str | int) -> None:
        """`alias` means what an adapter's name means from now on, also after a reload; it may have been another's.

        Raises `RequestError` for an empty one, `UnknownModelError`, and `AdapterConflictError` where `alias` is the
        name of a model or adapter.
        """
        if not alias.strip():
            raise RequestError("the alias is empty", param="alias")
        name = self.name(lora)
        if alias in self._base_models or alias in self._known:
            raise AdapterConflictError(alias, "is the name of a model that is served; an alias needs one of its own")
        self._aliases[alias] = name

    def aliases(self) -> dict[str, str]:
        """The name that each alias stands for."""
        return dict(self._aliases)

    def forget_alias(self, alias: str) -> bool:
        """It means nothing any more; whether it was one."""
        return self._aliases.pop(alias, None) is not None

    def forget(self, name: str, *, aliases: bool = False) -> AdapterVersion | AnnouncedAdapter | None:
        """The name stands for nothing any more; what it stood for until now, if anything.

        Raises `AdapterConflictError` where it has aliases, unless they are to be forgotten with it.
        """
        if name not in self._ids:
            return None
        others = [alias for alias, meant in self._aliases.items() if meant == name]
        if others and not aliases:
            raise AdapterConflictError(name, f"has the alias {others[0]!r}; remove that first, or let it mean another")
        for alias in others:
            del self._aliases[alias]
        self._name_of_id.pop(self._ids.pop(name))
        self._earlier.pop(name, None)
        return self._known.pop(name)

    def _put(self, adapter: AdapterVersion | AnnouncedAdapter, number: int) -> None:
        self._known[adapter.name] = adapter
        self._ids[adapter.name] = number
        self._name_of_id[number] = adapter.name


def nearest(name: str, known: Sequence[str], permits: Callable[[str], bool] | None = None) -> str | None:
    """What is spelled most like `name` of those that `permits`, if anything is.

    Compares few: where many are known, some that begin alike, for others stream while this is worked out.
    """
    name = name[:_LONGEST]
    begin = name[:_ALIKE] if len(known) > _COMPARED else ""
    alike = (one for one in known if one.startswith(begin) and (permits is None or permits(one)))
    return next(iter(difflib.get_close_matches(name, itertools.islice(alike, _COMPARED), n=1)), None)


def _taken(known: AdapterVersion | AnnouncedAdapter, why: str) -> AdapterConflictError:
    place = repr(known.source) if known.source is not None else "memory"
    return AdapterConflictError(
        known.name,
        f"is already loaded from {place}, {why}; set load_inplace=True to replace it, or choose another name",
    )
