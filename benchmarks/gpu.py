"""The GPU page's workloads on one engine after another, each with a check against a plain float32 decoder.

    python -m benchmarks.gpu --model llama-3.1-8b --only W4,W5 --adapters-dir /dev/shm/bench --out results

Random weights (`load_format="dummy"`), random adapters on all seven linears. Bars and the peer's figures are those of
one H200. Without a GPU: `--model tiny --scale 0.05 --dtype float32`.
"""

import argparse
import csv
import time

import torch

from benchmarks.command import arguments, parse
from benchmarks.harness import machine
from benchmarks.start import start_rows
from benchmarks.workloads import WORKLOADS, Ours, Row


def main() -> None:
    names = [*WORKLOADS, "start"]
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of requests, adapters and answer lengths")
    args = parse(parser)
    wanted = args.only.split(",")
    if strange := set(wanted) - set(names):
        parser.error(f"no workload {', '.join(strange)}; there are {', '.join(names)}")
    print(f"# {machine()}, {args.model}, {args.dtype}", flush=True)
    ours = Ours(args.model, args.adapters_dir, args.scale, args.dtype)
    rows: list[Row] = []
    for name in (name for name in names if name in wanted):
        start = time.perf_counter()
        if name == "start":
            ours.close()
            found = start_rows(args.adapters_dir, args.model, args.dtype)
        else:
            found = WORKLOADS[name](ours)
        rows += found
        print(f"# {name} took {time.perf_counter() - start:.0f} s", flush=True)
        _print(found)
        _write(rows, args)
    if len(wanted) > 1:
        print(f"\n{machine()}, {args.model}, {args.dtype}")
        _print(rows)
    if ours.failed:
        raise SystemExit(f"WRONG: {', '.join(ours.failed)}")


def _print(rows: list[Row]) -> None:
    print(f"{'workload':58} {'ours':>9} {'':8} {'bar':>9} {'stretch':>8} {'vLLM':>7}  check")
    for row in rows:
        value = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.2f}"
        last = f"{row.bar:>9} {row.stretch:>8} {row.peer:>7}  {row.check}"
        print(f"{row.name:58} {value:>9} {row.unit:8} {last}", flush=True)


def _write(rows: list[Row], args: argparse.Namespace) -> None:
    """All rows so far: a run that is ended early leaves what it had."""
    with (args.out / "gpu.csv").open("w", newline="") as stream:
        stream.write(f"# {machine()}, {args.model}, {args.dtype}, torch {torch.__version__}\n")
        lines = csv.writer(stream)
        lines.writerow(["name", "value", "unit", "bar", "stretch", "vllm_0_25_1", "check"])
        lines.writerows(
            [row.name, f"{row.value:.5g}", row.unit, row.bar, row.stretch, row.peer, row.check] for row in rows
        )


if __name__ == "__main__":
    main()
