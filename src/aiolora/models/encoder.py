"""The encoder of a multi-modal model: transformers' own towers and connector, their linear layers open to adapters."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from aiolora.models.adopted import replace
from aiolora.models.layers import Completed, Linear, layer_of
from aiolora.models.multimodal import MULTIMODAL
from aiolora.models.patches import Patches, products
from aiolora.ops.linear import Routing
from aiolora.ops.transfer import sent

Rows: TypeAlias = Callable[[int], Routing]  # the routing of so many rows, all of the item's mix


@dataclass(slots=True)
class _Item:
    """What is being encoded."""

    rows: Rows | None = None

    def of_rows(self, count: int) -> Routing | None:
        return None if self.rows is None else self.rows(count)


class Encoder(nn.Module):
    """From what the processor made of an image or a recording to rows [n, H] for the decoder. Engine thread only.

    One item at a time: its rows do not depend on who else is in the batch, so they may be kept, and all rows of all
    its Linears are of one mix.
    """

    def __init__(self, hf: Any, *, dtype: torch.dtype, device: str, filled: bool = False) -> None:
        """`hf`: a config of transformers whose model_type is in `multimodal.MULTIMODAL`.

        `filled`: with random weights, as transformers begins to train; else they are whatever was in memory.
        """
        from transformers import AutoModel  # seconds to import: only where there is a tower
        from transformers.initialization import no_init_weights

        super().__init__()
        kind = MULTIMODAL[hf.model_type]
        self._ways = kind.ways
        self.dtype, self._device = dtype, device
        self._item = _Item()
        # of a CLIP of 300 M parameters 13 s, and 0.5 s without
        with torch.device(device), contextlib.nullcontext() if filled else no_init_weights():
            self.model = AutoModel.from_config(_without_text(hf), dtype=dtype)
        del self.model.language_model
        self.model.requires_grad_(False)
        kind.begin(self.model)
        if device != "cpu":
            for path, conv in [(path, module) for path, module in self.model.named_modules() if products(module)]:
                replace(self.model, path, Patches(conv))
        self._paths = list(_open(self.model, self._item, kind.unread, dtype, device))
        self.eval()

    @property
    def modalities(self) -> frozenset[str]:
        """What it takes."""
        return frozenset(self._ways)

    def forward(self, modality: str, features: Mapping[str, Tensor], rows: Rows | None) -> Tensor:
        """Rows [n, H] of one item in the encoder's dtype; `rows`: None where no adapter has a share in them."""
        given = {
            name: sent(value, self._device).to(self.dtype) if value.is_floating_point() else value
            for name, value in features.items()
        }
        with self._adapted(rows), _exact() if self.dtype is torch.float32 else contextlib.nullcontext():
            return self._ways[modality](self.model, given)

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """(layer, projection) of everything that takes adapters, by the names of transformers' model, in order."""
        yield from ((layer_of(path), linear) for path, linear in self._paths)

    def checkpoint(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, the tensor that it fills)."""
        for name, tensor in self.model.state_dict().items():
            yield "model." + name.replace(".linear.", "."), tensor

    @contextlib.contextmanager
    def _adapted(self, rows: Rows | None) -> Iterator[None]:
        self._item.rows = rows
        try:
            yield
        finally:
            self._item.rows = None


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Without TF32 in convolutions, where torch has it by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _without_text(hf: Any) -> Any:
    """The config with next to no language model, which is built elsewhere."""
    config = copy.deepcopy(hf)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    return config


def _open(
    model: nn.Module, item: _Item, unread: tuple[str, ...], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Linear]]:
    """Put a `Completed` into the place of every `nn.Linear`; (its path, what is in it).

    Subclasses stay as they are, for they are not called as modules (`nn.MultiheadAttention` reads the weights of its
    own), and take adapters only where those change nothing.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear or (isinstance(module, nn.Linear) and path.startswith(unread))
    ]
    for path, old in found:
        inner = Linear(
            old.in_features,
            {f"model.{path}": old.out_features},
            bias=old.bias is not None,
            dtype=dtype,
            device=device,
            weight=nn.Parameter(old.weight, requires_grad=False),
        )
        inner.bias = old.bias
        if type(old) is nn.Linear:
            replace(model, path, Completed(inner, item.of_rows))
        yield f"model.{path}", inner
