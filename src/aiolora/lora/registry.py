"""AdapterRegistry: which version a name stands for. Pure Python."""

import difflib

from aiolora.errors import AdapterConflictError, UnknownModelError
from aiolora.types import AdapterVersion, LoRARequest


class AdapterRegistry:
    """Names of adapters, in the order they came, each with the version it means now.

    Owned by the loop (or by the caller of a blocking face). A name is forgotten at once; holders keep the version.
    """

    def __init__(self, base_model: str) -> None:
        self._base_models = [base_model]
        self._versions: dict[str, AdapterVersion] = {}
        self._requests: dict[str, LoRARequest] = {}
        self._name_of_id: dict[int, str] = {}

    def versions(self) -> list[AdapterVersion]:
        """Every published version, oldest name first."""
        return list(self._versions.values())

    def reserve(self, name: str) -> None:
        """`name` is another name of the base model: no adapter may have it. Raises `AdapterConflictError`."""
        if name in self._versions:
            raise AdapterConflictError(name, "is to be the served name of the base model; choose another")
        if name not in self._base_models:
            self._base_models.append(name)

    def knows(self, name: str) -> bool:
        """Whether `name` stands for an adapter, or for the base model."""
        return name in self._versions or name in self._base_models

    def find(self, name: str) -> AdapterVersion:
        """The version that `name` stands for. Raises `UnknownModelError` with the nearest known names."""
        version = self._versions.get(name)
        if version is None:
            known = [*self._base_models, *self._versions]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known[:8])}"
            raise UnknownModelError(f"the model {name!r} does not exist; {hint}")
        return version

    def match(self, request: LoRARequest) -> AdapterVersion | None:
        """The published version that `request` means; None: it has to be loaded first.

        Raises `AdapterConflictError` where the name or the id already stands for something else.
        """
        name, number = request.lora_name, request.lora_int_id
        if name in self._base_models:
            raise AdapterConflictError(name, "is the name of the base model; choose another")
        owner = self._name_of_id.get(number)
        if owner is not None and owner != name:
            raise AdapterConflictError(name, f"lora_int_id={number} already stands for {owner!r}; give each its own")
        known = self._requests.get(name)
        if known is None:
            return None
        if known.lora_int_id != number:
            raise AdapterConflictError(
                name, f"was loaded with lora_int_id={known.lora_int_id} and is now asked for with {number}"
            )
        if request.load_inplace:
            return None
        if known.lora_path != request.lora_path:
            raise AdapterConflictError(
                name,
                f"is already loaded from {known.lora_path!r}, not from {request.lora_path!r}; "
                "set load_inplace=True to replace it, or choose another name",
            )
        return self._versions[name]

    def publish(self, request: LoRARequest, version: AdapterVersion) -> None:
        """From now on the name stands for `version`. Raises as `match`: others may have published since then."""
        self.match(request)
        self._versions[request.lora_name] = version
        self._requests[request.lora_name] = request
        self._name_of_id[request.lora_int_id] = request.lora_name

    def forget(self, name: str) -> AdapterVersion | None:
        """The name stands for nothing any more; what it stood for until now, if anything."""
        request = self._requests.pop(name, None)
        if request is None:
            return None
        self._name_of_id.pop(request.lora_int_id)
        return self._versions.pop(name)
