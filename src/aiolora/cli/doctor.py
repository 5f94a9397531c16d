"""`aiolora doctor`: what this machine can do with a model, and why not more."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, TypeAlias

from msgspec import Struct

from aiolora import __version__
from aiolora.config import Environment
from aiolora.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from aiolora.ops.machine import Machine

State: TypeAlias = Literal["ok", "slow", "off", "bad"]

_EXTRAS = {  # extra -> (what it brings, the packages that show it is there)
    "server": ("aiolora serve", ("litestar", "uvicorn", "prometheus_client")),
    "otel": ("traces", ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")),
    "plots": ("aiolora bench --plot", ("matplotlib",)),
    "completion": ("aiolora completion", ("shtab",)),
    "fa3": ("FlashAttention 3 on Hopper", ("flash_attn_interface",)),
}
_COLOURS = {"ok": "green", "slow": "yellow", "off": "dim", "bad": "red"}


class Finding(Struct, frozen=True):
    """One line."""

    about: str
    state: State
    says: str
    way_out: str = ""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine can do, and why not more",
        description="Exit status: 1 where something would keep aiolora from starting.",
        allow_abbrev=False,
    )
    says = "folder, name or repository of a model: says as well which way it goes and why; only its config is fetched"
    parser.add_argument("model", nargs="?", help=says)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line for each thing looked at."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from aiolora.ops.machine import look

    findings = [*_versions(), *of_machine(look()), *_extras(), *_cache()]
    findings += [] if args.model is None else [of_model(args.model)]
    table = Table("", "", "", "to change it", box=None, show_header=True, header_style="dim")
    for found in findings:
        colour = _COLOURS[found.state]
        table.add_row(found.about, f"[{colour}]{found.state}[/]", escape(found.says), escape(found.way_out))
    Console(highlight=False).print(table)
    return 1 if any(found.state == "bad" for found in findings) else 0


def of_machine(machine: "Machine") -> list[Finding]:
    """What the facts mean for serving."""
    return [_gpu(machine), *_cpu(machine)]


def _gpu(machine: "Machine") -> Finding:
    if machine.gpus:
        cards = ", ".join(f"{card.name} ({card.nbytes / 2**30:.0f} GiB)" for card in machine.gpus)
        if machine.gpu_kernels:
            return Finding("GPU", "ok", f"{cards}, CUDA {machine.cuda}; one is used")
        why = "Triton is missing" if not machine.triton else "the kernels do not run on it"
        return Finding("GPU", "slow", f"{cards}, but {why}", "" if machine.triton else "pip install triton")
    if machine.cuda is None:
        way_out = "install a CUDA build of torch, where there is a GPU"
        return Finding("GPU", "off", f"torch {machine.torch} is built for the CPU only", way_out)
    way_out = "see whether nvidia-smi finds one, and its driver is new enough"
    return Finding("GPU", "off", f"torch is built for CUDA {machine.cuda} and finds no GPU", way_out)


def _cpu(machine: "Machine") -> list[Finding]:
    dtype = "bfloat16" if machine.bfloat16 else "float32"
    memory = f"{machine.memory_nbytes / 2**30:.0f} GiB"
    findings = [Finding("CPU", "ok", f"{platform.machine()}, {machine.cores} cores, {memory}; dtype auto is {dtype}")]
    if machine.native:
        findings.append(Finding("CPU kernels", "ok", f"compiled by {machine.compiler}"))
    elif not Environment.read().native:
        findings.append(
            Finding("CPU kernels", "slow", "switched off: decoding is 2-3 times slower", "AIOLORA_NATIVE=1")
        )
    elif machine.compiler is None:
        says = "no C compiler found: decoding on the CPU is 2-3 times slower"
        findings.append(Finding("CPU kernels", "slow", says, "install gcc or clang"))
    else:
        says = f"{machine.compiler} could not compile them: decoding on the CPU is 2-3 times slower"
        findings.append(Finding("CPU kernels", "slow", says, "the warning above says why"))
    return findings


def of_model(model: str) -> Finding:
    """Which way it would be served. Blocks."""
    from aiolora.models.loading import look_up

    try:
        way = look_up(model)
    except ModelError as error:
        return Finding("model", "bad", str(error))
    why = "; ".join(way.reasons)
    if way.impl is None:
        return Finding("model", "bad", str(way.refusal))
    if way.impl == "transformers":
        says = f"{way.model_type} by transformers' code with our attention and LoRA, without CUDA graphs: {why}"
        return Finding("model", "slow", says, "see docs/models-fallback.md")
    towers = "".join(f", {modality} by transformers' tower" for modality in way.modalities)
    return Finding("model", "ok", f"{way.model_type} by our decoder{towers}")


def _versions() -> list[Finding]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
    shown = ", ".join(f"{package} {_version(package)}" for package in packages)
    return [
        Finding("aiolora", "ok", f"{__version__} on Python {platform.python_version()}, {platform.system()}"),
        Finding("packages", "ok", shown),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _extras() -> list[Finding]:
    findings = []
    for extra, (brings, packages) in _EXTRAS.items():
        missing = [package for package in packages if not _is_there(package)]
        says = brings if not missing else f"{brings}: without {', '.join(missing)}"
        way_out = f"pip install 'aiolora[{extra}]'" if missing else ""
        findings.append(Finding(f"extra {extra}", "off" if missing else "ok", says, way_out))
    return findings


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _cache() -> list[Finding]:
    try:
        folder = Environment.read().cache
    except ConfigError as error:
        return [Finding("environment", "bad", str(error))]
    there = folder
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        return [Finding("cache", "bad", f"{folder} cannot be written", "set AIOLORA_CACHE to a folder of yours")]
    free = shutil.disk_usage(there).free / 2**30
    models = sorted(path.parent.name for path in folder.glob("models/*/model.safetensors"))
    return [Finding("cache", "ok", f"{folder}, {free:.0f} GiB free; models: {', '.join(models) or 'none yet'}")]
