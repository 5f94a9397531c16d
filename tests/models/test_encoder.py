"""An encoder as it is on a GPU: it asks the device for nothing while it works, and convolves by products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from aiolora.media.reader import MediaReader
from aiolora.models.encoder import Encoder
from aiolora.models.layers import Linear
from aiolora.models.patches import Patches, products
from aiolora.models.windows import by_length
from aiolora.ops.linear import Routing, Site
from tests.models.test_multimodal import MODELS, Model


def routing(rows: int) -> Routing:
    """Of rows on "meta" that all have the pages of one mix."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    scales = torch.empty(1, 9, 2, device="meta")
    return Routing(ints(rows), ints(1, 2), ints(1, 4), ints(1, 9, 2), scales, ints(1, 9), ints(rows), 64)


def site(linear: Linear) -> Site:
    """Where adapters of any kind would be."""
    inputs, outputs = linear.inputs, sum(linear.parts.values())
    a, b = torch.empty(1, 4, 8, inputs, device="meta"), torch.empty(4, 8, outputs, device="meta")
    return Site(0, a, b, torch.empty(1, 2, outputs, device="meta"), [0, outputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_value_is_asked_of_the_device(model: Model, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors on "meta" have none: whoever asks one (`item`, `if`), or takes one of the host for one, fails."""
    folder = model.make(tmp_path)
    encoder = Encoder(AutoConfig.from_pretrained(folder), dtype=dtype, device="meta")
    assert {module.device.type for module in encoder.parameters()} == {"meta"}
    reader = MediaReader.of(folder, "m", domains=(), max_pixels=1 << 20)
    [given] = reader.open(reader.split(asked(model), Words()).given)
    for item in [*reader.samples(), given.item()]:
        features = {name: torch.from_numpy(array) for name, array in item.features.items()}
        for rows in (None, routing):
            for _, linear in encoder.linears() if rows else ():
                linear.site = site(linear)
            made = encoder(item.modality, features, rows)
            assert (made.shape, made.dtype, made.device.type) == ((item.count, 48), dtype, "meta")


def asked(model: Model) -> Any:
    return {"prompt": "w", "multi_modal_data": model.data(3)}


class Words:
    chat_template: object = None

    def decode(self, ids: Any) -> str:
        return "w"


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=False),
        nn.Conv2d(3, 5, (3, 4), (3, 4), padding="valid"),
        nn.Conv1d(6, 5, 1),
    ],
)
def test_a_kernel_that_moves_by_its_own_size_is_a_product(conv: Any) -> None:
    assert products(conv)
    x = torch.randn(2, conv.in_channels, *(5 * part + 1 for part in conv.kernel_size))
    torch.testing.assert_close(Patches(conv)(x), conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv1d(4, 4, 3, stride=2, padding=1),
        nn.Conv1d(4, 4, 2),
        nn.Conv1d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 2, 2, padding=1),
        nn.Linear(4, 4),
    ],
)
def test_any_other_stays_what_it_is(other: nn.Module) -> None:
    assert not products(other)


def test_windows_of_one_length_come_behind_each_other_and_keep_their_rows() -> None:
    index, ends = by_length(torch.arange(6) + 10, torch.tensor([0, 8, 12, 20, 24], dtype=torch.int32), 4)
    assert index.tolist() == [12, 15, 10, 11, 13, 14]
    assert ends.tolist() == [0, 4, 8, 16, 24]
    assert ends.dtype == torch.int32
