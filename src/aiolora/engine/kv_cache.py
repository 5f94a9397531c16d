"""KVCache: the store of keys and values. Which page belongs to whom is `PagePool`'s business."""

import torch

from aiolora.models.inputs import LayerKV
from aiolora.models.model import ModelConfig


class KVCache:
    """[P, page_size, G, D] of keys and of values for every layer. Engine thread only.

    Not filled: nothing is read before it was written, and on the CPU memory is only taken as pages come into use.
    """

    def __init__(self, config: ModelConfig, *, num_pages: int, page_size: int, dtype: torch.dtype, device: str) -> None:
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.page_size = page_size
        self.layers = [
            LayerKV(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]


def page_nbytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize
