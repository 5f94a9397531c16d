"""Experts in MXFP4: unpacked as transformers does it, loaded from files as gpt-oss has them."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aiolora.config import EngineArgs
from aiolora.errors import WeightsError
from aiolora.models.loading import load_decoder, read_config
from aiolora.models.mxfp4 import dequantised
from aiolora.models.paths import way_of
from tests.tiny import Loaded, hf_logits, load_hf, make_model, prompt_ids, reconfigure

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # whole blocks
QUANTISED = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}


def drawn(experts: int, rows: int, depth: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks [E, rows, depth / 32, 16] of any bytes, and scales around 2^-4."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, depth // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(120, 126, (experts, rows, depth // 32), dtype=torch.uint8, generator=generator)


def test_a_block_is_what_the_format_says() -> None:
    """Value by value: sign, two bits of exponent, one of mantissa, the lower half of each byte first."""
    blocks, scales = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16),
        torch.arange(119, 135).byte().view(1, 1, 16),
    )
    out = dequantised(blocks, scales, CPU).flatten().tolist()
    for place, value in enumerate(out):
        byte = place // 2
        bits = byte >> 4 if place % 2 else byte & 15
        exponent, mantissa = bits >> 1 & 3, bits & 1
        magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert value == math.copysign(magnitude * 2.0 ** (119 + place // 32 - 127), -1 if bits & 8 else 1)


def test_it_is_what_transformers_makes_of_it() -> None:
    blocks, scales = drawn(3, 10, 64, seed=0)
    scales[1] = torch.arange(20, dtype=torch.uint8).view(10, 2) * 12 + 6
    theirs = convert_moe_packed_tensors(blocks, scales.clone(), dtype=torch.bfloat16)
    assert torch.equal(dequantised(blocks, scales, CPU), theirs.mT)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """One model as transformers has it, and with its experts packed."""
    plain = make_model(tmp_path / "plain", "gpt-oss", **SIZES)
    packed = make_model(tmp_path / "packed", "gpt-oss", **SIZES)
    tensors = load_file(plain / "model.safetensors")
    own = dict(tensors)
    for number, name in enumerate(sorted(name for name in tensors if re.search(r"experts\.\w+_proj$", name))):
        experts, depth, rows = tensors[name].shape
        del own[name]
        own[f"{name}_blocks"], own[f"{name}_scales"] = drawn(experts, rows, depth, seed=number)
        own_pair = own[f"{name}_blocks"], own[f"{name}_scales"].clone()
        tensors[name] = convert_moe_packed_tensors(*own_pair, dtype=torch.float32).contiguous()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(own, packed / "model.safetensors", metadata={"format": "pt"})
    reconfigure(packed, **QUANTISED)
    return plain, packed


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_packed_model_has_the_logits_of_the_unpacked_one(pair: tuple[Path, Path]) -> None:
    plain, packed = pair
    assert way_of(read_config(packed)).impl == "aiolora"
    loaded = Loaded.of(packed)
    (seq,) = loaded.sequences([prompt_ids(2, 40)])
    torch.testing.assert_close(loaded.step((seq, 0, 40))[0], hf_logits(load_hf(plain), seq.tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_of_a_pair_may_lie_in_any_files(dtype: str, pair: tuple[Path, Path]) -> None:
    plain, packed = pair
    tensors = load_file(packed / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.endswith("_scales")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    files = {"a.safetensors": first, "b.safetensors": rest}
    index = {name: file for file, own in files.items() for name in own}
    for file, own in files.items():
        save_file(own, packed / file)
    (packed / "model.safetensors").unlink()
    (packed / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    ours, theirs = (load_decoder(EngineArgs(model="", dtype=dtype), folder, device="cpu") for folder in (packed, plain))
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert torch.equal(one, other), name


def without(end: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def shortened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    return tensors | {name: tensors[name][..., :8].contiguous()}


def of_fewer_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:5].contiguous() if "down_proj_" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("layers.1.mlp.experts.down_proj_scales"), r"layers\.1\S+down_proj_blocks has no \S+down_proj_scales"),
        (without("layers.1.mlp.experts.down_proj_blocks"), r"layers\.1\S+down_proj_scales has no \S+down_proj_blocks"),
        (shortened, r"down_proj: blocks \[6, 64, 3, 8\] and scales \[6, 64, 3\]"),
        (of_fewer_experts, r"down_proj\w*: shape \[5, 64(, 96)?\], the config says \[6, 64(, 96)?\]"),
    ],
)
def test_what_is_no_whole_packed_model_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, pair: tuple[Path, Path]
) -> None:
    _, packed = pair
    rewrite(packed, change)
    with pytest.raises(WeightsError, match=said):
        load_decoder(EngineArgs(model="", dtype="float32"), packed, device="cpu")
