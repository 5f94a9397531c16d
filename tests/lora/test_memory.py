"""Tensors that a caller holds, read as those of a file are."""

import numpy as np
import pytest
import torch

from aiolora.errors import AdapterFormatError
from aiolora.lora.memory import HeldTensors, InMemory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("form", ["whole", "transposed", "a slice", "trained", "empty"])
def test_a_tensor_is_read_row_by_row_whatever_its_strides(form: str, dtype: torch.dtype) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8).to(dtype)
    tensor = {
        "whole": base,
        "transposed": base.T,
        "a slice": base[1:5, ::2],
        "trained": base if dtype.itemsize == 1 else base.requires_grad_(),
        "empty": base[:0],
    }[form]
    held = HeldTensors(InMemory("mine", {"first": torch.ones(3), "it": tensor}, {}))
    entry = held.entries["it"]
    assert (entry.dtype, entry.shape, entry.nbytes) == (dtype, tuple(tensor.shape), tensor.numel() * dtype.itemsize)
    buffer = bytearray(entry.nbytes + 4)
    held.read(entry, memoryview(buffer))
    expected = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    assert bytes(buffer) == expected + bytes(4)


@pytest.mark.parametrize(
    "wrong",
    [None, 3.0, "text", np.zeros(3), torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
    ids=["None", "a number", "text", "an array", "sparse", "without data"],
)
def test_what_is_no_dense_tensor_is_refused_by_its_name(wrong: object) -> None:
    with pytest.raises(AdapterFormatError, match=r"adapter 'mine': 'it' is no dense tensor"):
        HeldTensors(InMemory("mine", {"first": torch.ones(3), "it": wrong}, {}))  # type: ignore[dict-item]
