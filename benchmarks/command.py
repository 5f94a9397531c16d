"""The command line that benchmarks of a model's shape share, and the way their tables leave."""

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.reference import Check
from benchmarks.shapes import SHAPES


def arguments(doc: str | None, *, model: str = "llama-3.1-8b", dtype: bool = True) -> argparse.ArgumentParser:
    """A parser with the model and the two folders. `dtype`: whether it is to be chosen."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model, choices=list(SHAPES))
    if dtype:
        parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--adapters-dir", type=Path, default=Path(tempfile.gettempdir()) / "aiolora-bench")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was said; both folders are there."""
    args = parser.parse_args()
    args.adapters_dir.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def between(text: str) -> tuple[int, int]:
    """`128-512` as an argument: the least and the most."""
    low, _, high = text.partition("-")
    return int(low), int(high)


def tell(file: Path, said: str, rows: Sequence[tuple[str | float, ...]], check: Check) -> None:
    """Print `rows` (name, value, unit and perhaps a note), write them as CSV, and end as WRONG where the check did."""
    head = f"{machine()}, load {os.getloadavg()[0]:.1f}, {said}"
    with file.open("w", newline="") as stream:
        stream.write(f"# {head}\n")
        csv.writer(stream).writerows([("name", "value", "unit", "note")[: len(rows[0])], *rows])
    print(head)
    width = max(len(str(row[0])) for row in rows)
    for name, value, unit, *note in rows:
        print(f"{name:{width}} {value:10.2f} {unit:10} {' '.join(map(str, note))}".rstrip())
    print(f"check: {check}")
    if not check.right:
        raise SystemExit("WRONG")
