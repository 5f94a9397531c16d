"""Names: what they stand for, what they may take, and what the engine thread must hear of a change."""

from collections.abc import Callable

from aiolora.engine.core import Message
from aiolora.engine.intake import Intake
from aiolora.errors import AdapterChangedError, AdapterNotFoundError
from aiolora.lora.loader import AdapterWeights
from aiolora.types import AdapterPolicy, AdapterVersion


class Names:
    """The verbs that change a name, the same for every face. `post` gives the engine thread a message.

    Owned by the loop (or by the caller of a blocking face), as the registry and the policies are.
    """

    def __init__(self, intake: Intake, post: Callable[[Message], None]) -> None:
        self._registry = intake.registry
        self._policies = intake.policies
        self._post = post

    def publish(self, weights: AdapterWeights, number: int, *, replace: bool) -> AdapterVersion:
        """Its name stands for what was read from now on. Raises `AdapterConflictError`; nothing has changed then."""
        return self._publish(weights.version, weights, number, replace=replace)

    def remove(self, lora: str | int, *, force: bool) -> bool:
        """Forget an adapter by name or `lora_int_id`, or an alias. False: it was not known.

        Raises `AdapterConflictError` where it has aliases; `force`: they go with it.
        """
        if isinstance(lora, str) and self._registry.forget_alias(lora):
            return True
        name = self._registry.named(lora)
        if name is None:
            return False
        earlier = self._registry.earlier(name)
        known = self._registry.forget(name, aliases=force)
        self._policies.forget(name)
        if isinstance(known, AdapterVersion):
            self._post(lambda engine: engine.adapters.drop(known, force=force))
        self._post(lambda engine: engine.scheduler.shares.put(name, None))
        if earlier is not None:
            self._post(lambda engine: engine.adapters.drop(earlier))
        return True

    def allow(self, lora: str | int, policy: AdapterPolicy) -> None:
        """What an adapter may take from now on. Raises `UnknownModelError`."""
        name = self._registry.name(lora)
        self._policies.put(name, policy)
        self._post(lambda engine: engine.scheduler.shares.put(name, policy))

    def earlier(self, lora: str | int, digest: str | None) -> AdapterVersion:
        """What a name stood for before, and that `digest` begins so, where it is said.

        Raises `UnknownModelError`, and `AdapterNotFoundError` where nothing such is remembered.
        """
        name = self._registry.name(lora)
        version = self._registry.earlier(name)
        if version is None:
            raise AdapterNotFoundError(name, "has no earlier version: it was not replaced since it was loaded")
        if digest is not None and not (digest and version.digest.startswith(digest)):
            raise AdapterNotFoundError(name, f"has no earlier version {digest[:12]!r}, only {version.digest[:12]!r}")
        return version

    def bring_back(self, version: AdapterVersion, weights: AdapterWeights | None) -> AdapterVersion:
        """The name of `version`, which is what `earlier` gave, stands for it again.

        `weights`: what was read where host memory had it no more; None: the engine has revived it. Raises
        `AdapterChangedError` where they are others, `AdapterNotFoundError` where the name has gone on meanwhile.
        """
        name = version.name
        if weights is not None and weights.version.digest != version.digest:
            raise AdapterChangedError(
                name,
                f"its earlier version {version.digest[:12]} is not held any more, and {version.source} now holds "
                f"{weights.version.digest[:12]}",
            )
        if self._registry.earlier(name) != version:
            if weights is None:
                self._post(lambda engine: engine.adapters.drop(version))
            raise AdapterNotFoundError(name, f"its earlier version {version.digest[:12]} was dropped meanwhile")
        number = self._registry.number(name)
        if weights is not None:
            return self._publish(weights.version, weights, number, replace=True)
        return self._publish(version, version, number, replace=True)

    def _publish(
        self, version: AdapterVersion, given: AdapterWeights | AdapterVersion, number: int, *, replace: bool
    ) -> AdapterVersion:
        """`given`: what the engine takes for `version`."""
        before = self._registry.earlier(version.name)
        old = self._registry.publish(version, number, replace=replace)
        if old is None:
            assert isinstance(given, AdapterWeights)
            self._post(lambda engine: engine.adapters.add(given))
            return version
        kept = self._registry.earlier(version.name)
        self._post(lambda engine: engine.adapters.replace(old, given, keep=kept == old))
        if before is not None and before not in (kept, version):
            self._post(lambda engine: engine.adapters.drop(before))
        return version


def not_held(version: AdapterVersion) -> AdapterNotFoundError:
    """Why an earlier version that came from memory cannot be brought back."""
    digest = version.digest[:12]
    return AdapterNotFoundError(version.name, f"its earlier version {digest} came from memory and is not held any more")
