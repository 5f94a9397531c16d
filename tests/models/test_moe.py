"""Checkpoints of mixtures of experts, however they spell the experts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aiolora.config import EngineArgs
from aiolora.errors import ConfigError, UnsupportedModelError, WeightsError
from aiolora.models.loading import load_decoder
from tests.conftest import ModelOf
from tests.tiny import TOLERANCE, Loaded, hf_logits, prompt_ids

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"]
OLD = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj.", ".block_sparse_moe.": ".mlp."}


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(source, folder)
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / "model.safetensors")).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of transformers 5, an expert a tensor."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in OLD.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every layer's experts as two parameters."""
    found = modern(tensors)
    for prefix in sorted({match[1] for name in found if (match := re.match(r"(.*\.experts)\.\d+\.", name))}):
        count = len({name for name in found if re.fullmatch(rf"{re.escape(prefix)}\.\d+\.up_proj\.weight", name)})

        def stacked(part: str, prefix: str = prefix, count: int = count) -> Tensor:
            return torch.stack([found.pop(f"{prefix}.{expert}.{part}_proj.weight") for expert in range(count)])

        found[f"{prefix}.gate_up_proj"] = torch.cat((stacked("gate"), stacked("up")), 1)
        found[f"{prefix}.down_proj"] = stacked("down")
    return found


@pytest.mark.parametrize("spelling", [modern, fused])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_the_experts_is_the_same_model(
    family: str,
    spelling: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    model_of: ModelOf,
    hf_of: Callable[[str], nn.Module],
    tmp_path: Path,
) -> None:
    folder = rewritten(model_of(family), tmp_path / "model", spelling)
    loaded = Loaded.of(folder)
    (seq,) = loaded.sequences([prompt_ids(2, 21)])
    torch.testing.assert_close(
        loaded.step((seq, 0, 21))[0], hf_logits(hf_of(family), seq.tokens), rtol=0, atol=TOLERANCE
    )


def load(folder: Path) -> None:
    load_decoder(EngineArgs(model=str(folder), dtype="float32"), folder, device="cpu")


def test_a_missing_expert_is_refused_by_name(model_of: ModelOf, tmp_path: Path) -> None:
    gone = "model.layers.1.mlp.experts.5.up_proj.weight"
    folder = rewritten(
        model_of("qwen3-moe"), tmp_path / "model", lambda found: {n: t for n, t in modern(found).items() if n != gone}
    )
    with pytest.raises(WeightsError, match=f"1 tensors missing: {re.escape(gone)}"):
        load(folder)


def test_experts_of_another_number_are_refused_with_both_shapes(model_of: ModelOf, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    folder = rewritten(
        model_of("qwen3-moe"), tmp_path / "model", lambda found: {**(all_ := fused(found)), name: all_[name][:7]}
    )
    with pytest.raises(WeightsError, match=r"experts\.down_proj: shape \[7, 48, 24\], the config says \[8, 48, 24\]"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_another_activation_or_compiled_are_refused(model_of: ModelOf, tmp_path: Path, family: str) -> None:
    folder = Path(shutil.copytree(model_of(family), tmp_path / "other"))
    with pytest.raises(ConfigError, match="has experts, which are run as they are"):
        load_decoder(EngineArgs(model=str(folder), compile=True), folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu_pytorch_tanh"}))
    with pytest.raises(UnsupportedModelError, match="experts with hidden_act 'gelu_pytorch_tanh'"):
        load_decoder(EngineArgs(model=str(folder), model_impl="aiolora"), folder, device="cpu")
