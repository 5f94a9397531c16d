"""Where a model lives, and its tensors streamed from safetensors into the parameters that take them."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aiolora.errors import ModelNotFoundError, WeightsError
from aiolora.hub import fetch
from aiolora.models.decoder import Decoder
from aiolora.models.embedded import EMBEDDED, pull
from aiolora.models.moe import Stored
from aiolora.models.mxfp4 import unpacked
from aiolora.types import Report, unreported

_DERIVED = ("rotary_emb.inv_freq", ".position_ids")  # tensors that old checkpoints hold for no need
_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt")


def locate(model: str, *, only: tuple[str, ...] = _FILES) -> Path:
    """The folder of a model named by a folder, the embedded model's name or a hub repository. Blocks.

    Raises `ModelNotFoundError`.
    """
    if model == EMBEDDED:
        return pull()
    folder = Path(os.path.expanduser(model))
    if not os.path.isdir(folder):  # unlike Path.is_dir it never raises, however strange the path
        try:
            folder = fetch(model, only)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"model {model!r}: {error}") from error
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"model {model!r}: {folder} holds no config.json")
    return folder


def load_weights(
    model: Decoder,
    folder: Path,
    *,
    more: Iterable[tuple[str, Tensor]] = (),
    report: Report = unreported,
) -> None:
    """Fill every parameter from the safetensors of `folder`, one tensor at a time, and `more` (an encoder's).

    Raises `WeightsError` naming tensors that the model does not know, that it misses, or whose shape differs.
    """
    wanted = dict(model.checkpoint()) | dict(more)
    targets = {name: Stored(tensor.shape, tensor, [name]) for name, tensor in wanted.items()}
    targets |= {name: stored for _, linear in model.experts() for name, stored in linear.stored()}
    tied = {"lm_head.weight"} if model.config.tied_head else set()
    unknown: list[str] = []
    seen: set[str] = set()
    for written, tensor in unpacked(_tensors(folder), model.embed.weight.device):
        name = written if written in targets else model.named(written)
        if name in targets:
            target = targets[name]
            if tensor.shape != target.shape:
                raise WeightsError(f"{name}: shape {list(tensor.shape)}, the config says {list(target.shape)}")
            target.view.copy_(tensor.view(target.view.shape))
            seen.update(target.parts)
            report("weights", len(seen), len(wanted))
        elif name not in tied and not name.endswith(_DERIVED):
            unknown.append(name)
    missing = [name for name in wanted if name not in seen]
    if unknown or missing:
        raise WeightsError(
            f"{folder}: {listed('tensors unknown to this architecture', unknown)}"
            f"{'; ' if unknown and missing else ''}{listed('tensors missing', missing)}"
        )


def random_weights(model: Decoder, seed: int = 0) -> None:
    """Fill every parameter with small random numbers (`load_format="dummy"`)."""
    for number, (name, tensor) in enumerate(model.checkpoint()):
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(tensor.device).manual_seed(seed * 100_003 + number)
            tensor.normal_(0.0, 0.02, generator=generator)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in shards(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise WeightsError(f"{file}: not a whole safetensors file: {error}") from error


class _Index(msgspec.Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]  # tensor -> file


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model. Raises `WeightsError` for those that are not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise WeightsError(f"{index} is no index of shards: {error}") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise WeightsError(f"{index} names {outside[0]!r}, which is no file of this folder")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise WeightsError(f"{folder} holds no {', '.join(absent)}; only safetensors weights are read")
    return files


def listed(what: str, names: list[str]) -> str:
    """How many there are, and the first of them by name."""
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} {what}: {', '.join(names[:5])}{more}"
