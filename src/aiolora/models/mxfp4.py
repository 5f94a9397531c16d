"""Weights in MXFP4: blocks of 32 values of four bits (E2M1) that share a power of two (E8M0).

The format is that of the OCP Microscaling Formats (MX) Specification v1.0; its values are bfloat16's, too.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from aiolora.errors import WeightsError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign
BLOCKS, SCALES = "_blocks", "_scales"


def unpacked(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """`tensors` by name, of which `x_blocks` and `x_scales` come as one `x_blocks` in bfloat16 on `device`.

    One of both waits packed until the other has come. Raises `WeightsError` where it never comes, or where their shapes
    do not belong together.
    """
    waiting: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors:
        half = name[-len(BLOCKS) :]
        if half not in (BLOCKS, SCALES) or tensor.dtype is not torch.uint8:
            yield name, tensor
            continue
        own = name.removesuffix(half)
        if own not in waiting:
            waiting[own] = name, tensor
            continue
        _, other = waiting.pop(own)
        blocks, scales = (tensor, other) if half == BLOCKS else (other, tensor)
        if blocks.shape != (*scales.shape, 16):
            raise WeightsError(
                f"{own}: blocks {list(blocks.shape)} and scales {list(scales.shape)}; 16 bytes of each block are needed"
            )
        yield f"{own}{BLOCKS}", dequantised(blocks, scales, device)
    for own, (name, _) in waiting.items():
        raise WeightsError(f"{name} has no {own}{SCALES if name.endswith(BLOCKS) else BLOCKS} beside it")


def dequantised(blocks: Tensor, scales: Tensor, device: torch.device) -> Tensor:
    """`blocks` [E, ..., K / 32, 16] and `scales` [E, ..., K / 32] of uint8 -> [E, ..., K] bfloat16 on `device`.

    Exact; of a byte the lower four bits come first. One of E after the other: little is needed beside the result.
    """
    values = torch.tensor([sign * value for sign in (1, -1) for value in _MAGNITUDES], dtype=torch.bfloat16)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # [256, 2], by byte
    both = pairs.view(torch.int32).flatten().to(device)  # as one number, to be moved at once
    powers = scales.view(torch.float8_e8m0fnu).to(torch.bfloat16).unsqueeze(-1).to(device)
    out = torch.empty((*scales.shape, 32), dtype=torch.bfloat16, device=device)
    for part, packed, power in zip(out, blocks, powers):
        found = both.index_select(0, packed.to(device).int().flatten())  # both[...] takes 17 times as long
        torch.mul(found.view(torch.bfloat16).view_as(part), power, out=part)
    return out.flatten(-2)
