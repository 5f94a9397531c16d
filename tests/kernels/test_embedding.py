"""The kernel that turns token ids, also those in flight, into vectors."""

import pytest
import torch

from aiolora.ops import embedding
from aiolora.ops.kernels import embedding as kernels


@pytest.mark.parametrize("hidden", [48, 2064])
def test_embed(hidden: int, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(9, hidden, device=device).to(dtype)
    previous = torch.tensor([8, 2, 700], dtype=torch.int32, device=device)
    tokens = torch.tensor([5, -1, 0, -2, -3, 9, -1], dtype=torch.int32, device=device)
    assert torch.equal(kernels.embed(tokens, previous, weight), embedding.embed(tokens, previous, weight))
