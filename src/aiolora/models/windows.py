"""Attention of a tower within stretches of its rows (windows of an image), all of one length in one product.

transformers calls for each stretch by itself, a thousand times an image, unless the implementation has "flash" in its
name: that is called once a layer with the ends of the stretches, which lie on the host here.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

WINDOWS = "aiolora_flash_windows"


def by_length(index: Tensor, ends: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """The same windows, those of one length behind each other.

    `index` [rows / unit] says which rows come in turn, `ends` [windows + 1] int32 where windows begin and end among
    them, in rows. Both on the host.
    """
    lengths = ends.diff()
    order = lengths.argsort(stable=True)
    parts = torch.split(index, (lengths // unit).tolist())
    return torch.cat([parts[one] for one in order.tolist()]), F.pad(lengths[order].cumsum(0, dtype=torch.int32), (1, 0))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Of q, k, v [1, H, T, D] -> [1, T, H, D]; `cu_seq_lens_q` [n + 1] on the host."""
    seen, low = [], 0
    for length, run in groupby(cu_seq_lens_q.diff().tolist()):
        count = sum(1 for _ in run)
        high = low + count * length
        shape = (-1, count, length, query.shape[3])
        q, k, v = (x[0, :, low:high].reshape(shape).transpose(0, 1) for x in (query, key, value))
        seen.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
        low = high
    return torch.cat(seen).unsqueeze(0), None


AttentionInterface.register(WINDOWS, attend)
