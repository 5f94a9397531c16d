"""`aiolora inspect ADAPTER [--model MODEL]`: what an adapter holds, and whether a base model can serve it."""

import argparse
from typing import TYPE_CHECKING

from aiolora.config import EngineArgs

if TYPE_CHECKING:
    from aiolora.lora.inspection import Report

_FIELDS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "target_modules", "modules_to_save")
_FEW = 3


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="say what an adapter holds and whether a model can serve it",
        description="Exit status: 0 where the adapter can be served, else 1.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder or hub repository")
    parser.add_argument("--model", help="base model to try it on; only its config is read")
    parser.add_argument(
        "--max-lora-rank",
        type=int,
        default=EngineArgs(model="").max_lora_rank,
        help="of the server that is to take it (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print tables and a verdict."""
    from aiolora.lora.inspection import inspect_adapter

    report = inspect_adapter(args.adapter, model=args.model, max_rank=args.max_lora_rank)
    _print(report, args.model)
    return 0 if report.refusal is None else 1


def _print(report: "Report", model: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(escape(str(report.folder)))
    console.print(escape(f"made for: {report.config.get('base_model_name_or_path') or 'it does not say'}"))
    for field in _FIELDS:
        if field in report.config:
            console.print(escape(f"{field}: {report.config[field]}"))
    if invocation := report.config.get("alora_invocation_tokens"):
        console.print(escape(f"alora_invocation_tokens: {invocation} (at work from their last place in a prompt on)"))
    table = Table(Column("module", overflow="fold"), "tensors", "rank", "dtype", "bytes")
    for content in report.contents:
        ranks = " ".join(map(str, content.ranks)) or "-"
        cells = (content.module, str(content.num_tensors), ranks, " ".join(content.dtypes), f"{content.nbytes:,}")
        table.add_row(*map(escape, cells))
    if report.contents:
        console.print(table)
    if report.coverage is not None:
        label = "applied" if report.refusal is None else "would be applied"
        console.print(f"{label}: {report.coverage.applied} tensors")
        console.print(escape(f"ignored: {_listed(report.coverage.ignored)}"))
        console.print(escape(f"missing: {_listed(report.coverage.missing)}"))
    if report.version is not None:
        version = report.version
        console.print(f"rank {version.rank}, {version.nbytes:,} bytes on the device, digest {version.digest[:12]}")
    if report.refusal is not None:
        console.print(escape(f"refused: {report.refusal}"))
    elif model is None:
        console.print("nothing speaks against it so far; name a base with --model to see whether it fits")
    else:
        console.print(escape(f"can be served on {model}"))


def _listed(names: tuple[str, ...]) -> str:
    """The number, and the first few by name."""
    if not names:
        return "nothing"
    return f"{len(names)}: {', '.join(names[:_FEW])}{', ...' if len(names) > _FEW else ''}"
