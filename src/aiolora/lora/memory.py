"""An adapter that is in memory already: tensors under PEFT's names and a config, instead of a folder."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiolora.errors import AdapterFormatError, RequestError
from aiolora.lora.tensorfile import Entry


class Config(Protocol):
    """A config object with PEFT's `to_dict`, as `peft.LoraConfig`."""

    def to_dict(self) -> dict[str, Any]: ...


AnyConfig: TypeAlias = Mapping[str, object] | Config


@dataclass(frozen=True)
class InMemory:
    """What to load under `lora_name`: the tensors of an adapter_model.safetensors, the fields of its config."""

    lora_name: str
    tensors: Mapping[str, Tensor]  # on any device
    config: AnyConfig
    base_model_name: str | None = None

    def config_json(self) -> bytes:
        """The bytes that its adapter_config.json would have. Raises `AdapterFormatError`."""
        try:
            fields = dict(self.config if isinstance(self.config, Mapping) else self.config.to_dict())
            return msgspec.json.encode(fields, enc_hook=str)
        except Exception as error:  # whatever the caller's object does
            raise AdapterFormatError(self.lora_name, f"config is no dict of a PEFT config: {error!r}") from None


class HeldTensors:
    """The face of `TensorFile` over tensors that the caller holds. Any thread may read.

    `read` copies, and nothing is read twice: what the caller does to the tensors after the load changes nothing.
    """

    def __init__(self, source: InMemory) -> None:
        """Raises `AdapterFormatError` for what is no dense tensor."""
        self.adapter = source.lora_name
        self.entries: dict[str, Entry] = {}
        self._bytes: dict[str, Tensor] = {}
        offset = 0
        for name, tensor in self._on_host(source.tensors).items():
            try:
                flat = tensor.contiguous().reshape(-1)
                data = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
            except Exception as error:
                raise self._no_tensor(name, error) from None
            self._bytes[name] = data
            self.entries[name] = Entry(name, tensor.dtype, tuple(tensor.shape), offset, data.nbytes)
            offset += data.nbytes

    def _on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same on the CPU. A GPU's are copied behind each other and waited for once.

        On a stream of their own: in that of the engine's steps each copy would wait for the step that runs.
        """
        devices = {tensor.device for tensor in tensors.values() if isinstance(tensor, Tensor) and tensor.is_cuda}
        streams = {device: torch.cuda.Stream(device) for device in devices}  # type: ignore[no-untyped-call]
        for device, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))  # what made them may still run
        here: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            try:
                if not tensor.is_cuda:  # asking for a stream takes longer than all else here
                    here[name] = tensor.detach().to("cpu")
                    continue
                with torch.cuda.stream(streams[tensor.device]):
                    here[name] = tensor.detach().to("cpu", non_blocking=True)  # page-locked then
            except Exception as error:
                raise self._no_tensor(name, error) from None
        for stream in streams.values():
            stream.synchronize()
        return here

    def _no_tensor(self, name: str, error: Exception) -> AdapterFormatError:
        return AdapterFormatError(self.adapter, f"{name!r} is no dense tensor: {error!r}")

    @property
    def likeness(self) -> Hashable:
        """What there is, in order."""
        return tuple(self.entries.values())

    def read(self, entry: Entry, into: memoryview) -> None:
        """Fill the first `entry.nbytes` bytes of `into` from `entry.offset` on, a whole tensor or a part of it."""
        first = entry.offset - self.entries[entry.name].offset
        into[: entry.nbytes] = self._bytes[entry.name][first : first + entry.nbytes].numpy().data

    def where(self, entries: Sequence[Entry]) -> tuple[int, npt.NDArray[np.int64]]:
        """(-1, addresses) of their bytes."""
        return -1, np.array([self._bytes[entry.name].data_ptr() for entry in entries], np.int64)


def in_memory(name: str, tensors: Mapping[str, Tensor] | None, config: AnyConfig | None) -> InMemory:
    """What `add_lora(name, tensors=..., config=...)` means. Raises `RequestError` where one of them is missing."""
    if not name or tensors is None or config is None:
        raise RequestError("add_lora takes a LoRARequest, or a name with tensors= and config=", param="lora")
    return InMemory(name, dict(tensors), config)
