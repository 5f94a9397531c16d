"""PEFT folders of random adapters, made fast: one noise, rolled differently for each."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiolora import LoRARequest
from benchmarks.shapes import SHAPES

SCALE = 2.0  # lora_alpha / r
_FILE = "adapter_model.safetensors"


def make_adapters(
    root: Path, model: str, count: int, *, rank: int = 16, on: Sequence[str] = (), share: float | None = None
) -> list[LoRARequest]:
    """`count` adapters of `rank` for the shape `model` in `root`, those that are there reused.

    `on`: ends of the linears' names ("q_proj"); all seven where none is said. A has rows of length 1 and B such a size
    that an adapter adds to a linear about `share` of what the base gives, an eighth where there are 32 layers or more,
    and more where there are few: an answer with the wrong adapter is far off, and bfloat16's noise is not much above
    the base's.
    """
    share = share or max(1 / 8, min(1, 4 / SHAPES[model].layers))
    names = [name for name in SHAPES[model].linears if not on or name.endswith(tuple(on))]
    kind = f"r{rank}" + "".join(f"-{name}" for name in on)
    folders = [root / f"{model}-{kind}-{number}" for number in range(count)]
    absent = [folder for folder in folders if not (folder / _FILE).is_file()]
    if absent:
        noise = _noise(model, rank, names, share)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda folder: _save(folder, model, rank, names, noise), absent))
    return [LoRARequest(f"{kind}-{number}", 1000 * rank + number, str(folder)) for number, folder in enumerate(folders)]


def factors(request: LoRARequest) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of every module, as they stand in the file."""
    tensors = load_file(Path(request.lora_path) / _FILE)
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    prefix = "base_model.model."
    return {
        module.removeprefix(prefix): (tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"])
        for module in modules
    }


def _noise(model: str, rank: int, names: Sequence[str], share: float) -> dict[str, Tensor]:
    shape = SHAPES[model]
    generator = torch.Generator().manual_seed(rank)
    noise: dict[str, Tensor] = {}
    for layer in range(shape.layers):
        for name in names:
            outputs, inputs = shape.linears[name]
            key = f"base_model.model.model.layers.{layer}.{name}"
            std = share * shape.std * inputs**0.5 / (SCALE * rank**0.5)
            a = torch.empty(rank, inputs, dtype=torch.bfloat16).normal_(0, inputs**-0.5, generator=generator)
            b = torch.empty(outputs, rank, dtype=torch.bfloat16).normal_(0, std, generator=generator)
            noise |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return noise


def _save(folder: Path, model: str, rank: int, names: Sequence[str], noise: dict[str, Tensor]) -> None:
    shift = 977 * int(folder.name.rpartition("-")[2])
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": [name.rpartition(".")[2] for name in names],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rolled = {name: tensor.flatten().roll(shift).view_as(tensor) for name, tensor in noise.items()}
    unready = folder / f"{_FILE}.part"  # a run that is ended within leaves none that looks whole
    save_file(rolled, unready, metadata={"format": "pt"})
    unready.rename(folder / _FILE)
