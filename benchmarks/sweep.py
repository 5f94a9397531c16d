"""LoRA sweep: what a decode step takes over batch, adapters, rank and popularity, with the floor of its bytes.

    python -m benchmarks.sweep --model llama-3.1-8b --out results [--quick]

Writes sweep.csv and, with matplotlib, sweep.png. One engine a rank. Without a GPU:
`--model tiny --quick --dtype float32`.
"""

import argparse
import csv
import random
import statistics
import time
from dataclasses import asdict, dataclass

from aiolora import LoRARequest
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, parse
from benchmarks.harness import machine
from benchmarks.session import Loras
from benchmarks.shapes import SHAPES
from benchmarks.steady import BANDWIDTH, decoding, publish
from benchmarks.workloads import Ours

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POPULARITY = (
    ("base", 0),
    ("identical", 1),
    ("uniform", 8),
    ("zipf", 8),
    ("uniform", 32),
    ("zipf", 32),
    ("distinct", 0),
)


@dataclass
class Point:
    """One measured step."""

    rank: int
    batch: int
    popularity: str
    adapters: int  # to choose from
    distinct: int  # in the batch
    step_ms: float
    extra_ms: float  # over the same batch on the base
    floor_ms: float  # weights, keys and values, adapters of the batch, each read once
    adapters_floor_ms: float


def chosen(popularity: str, adapters: list[LoRARequest], known: int, batch: int) -> Loras | None:
    """The adapter of each row; None where there are too few."""
    chance = random.Random(f"{popularity} {known} {batch}")
    if popularity == "base":
        return [None] * batch
    if popularity == "distinct":
        return list(adapters[:batch]) if batch <= len(adapters) else None
    if known > len(adapters):
        return None
    weights = [1 / (place if popularity == "zipf" else 1) for place in range(1, known + 1)]
    return list(chance.choices(adapters[:known], weights, k=batch))


def sweep_rank(ours: Ours, rank: int, batches: list[int], steps: int, room: int) -> list[Point]:
    shape = SHAPES[ours.model]
    nbytes = shape.adapter_nbytes(rank) * (2 if ours.dtype == "float32" else 1)
    count = max(1, min(max(32, *batches), room // nbytes))
    memory = {"lora_memory": count * nbytes, "kv_tokens": 4096 + max(batches) * (64 + 3 * steps)}
    session = ours.engine(rank=rank, loras=count, max_cpu_loras=count, **memory)
    adapters = publish(session, make_adapters(ours.root, ours.model, 8, rank=rank), count)
    points: list[Point] = []
    for batch in batches:  # every size is met once before it is timed
        for popularity in ("base", "distinct"):
            with decoding(session, chosen(popularity, adapters, 0, min(batch, count)) or [], warm=2):
                pass
    for batch in batches:
        base = float("nan")
        for popularity, known in POPULARITY:
            loras = chosen(popularity, adapters, known, batch)
            if loras is None:
                continue
            with decoding(session, loras) as steady:
                took = statistics.median(steady.step(steps) for _ in range(3)) / steps * 1e3
                kv = steady.kv_tokens() * shape.kv_nbytes
                session.keep(steady.outputs(), loras)
            base = took if popularity == "base" else base
            distinct = len({lora.lora_name for lora in loras if lora is not None})
            floor = distinct * shape.adapter_nbytes(rank) / BANDWIDTH * 1e3
            bare = (shape.weight_nbytes + kv) / BANDWIDTH * 1e3
            points.append(
                Point(rank, batch, popularity, known or distinct, distinct, took, took - base, bare + floor, floor)
            )
    check = session.check(4)
    print(f"# rank {rank}: {check}", flush=True)
    if not check.right:
        ours.failed.append(f"rank {rank}")
    return points


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--steps", type=int, default=12, help="timed decode steps, three times, after 8 others")
    parser.add_argument("--quick", action="store_true", help="batches 1, 8, 32, 128 and 4 steps")
    parser.add_argument("--lora-gib", type=float, default=40, help="device memory for adapters")
    args = parse(parser)
    batches = [1, 8, 32, 128] if args.quick else [int(batch) for batch in args.batches.split(",")]
    steps = 4 if args.quick else args.steps
    ours = Ours(args.model, args.adapters_dir, dtype=args.dtype)
    points: list[Point] = []
    for rank in map(int, args.ranks.split(",")):
        start = time.perf_counter()
        points += sweep_rank(ours, rank, batches, steps, int(args.lora_gib * 2**30))
        print(f"# rank {rank} took {time.perf_counter() - start:.0f} s", flush=True)
        _write(points, args)
    _print(points)
    _draw(points, args)
    if ours.failed:
        raise SystemExit(f"WRONG: {', '.join(ours.failed)}")


def _write(points: list[Point], args: argparse.Namespace) -> None:
    with (args.out / "sweep.csv").open("w", newline="") as stream:
        stream.write(f"# {machine()}, {args.model}, {args.dtype}\n")
        lines = csv.DictWriter(stream, list(Point.__dataclass_fields__))
        lines.writeheader()
        lines.writerows(
            {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in asdict(point).items()}
            for point in points
        )


def _print(points: list[Point]) -> None:
    """A line a rank and popularity, a column a batch: the step without adapters, then extra ms (floor)."""
    print(machine())
    batches = sorted({point.batch for point in points})
    print(f"{'rank, adapters: ms over the base (floor)':30}" + "".join(f"{batch:>13}" for batch in batches))
    for rank in dict.fromkeys(point.rank for point in points):
        for popularity, known in POPULARITY:
            mine = {
                point.batch: point
                for point in points
                if (point.rank, point.popularity) == (rank, popularity) and known in (0, point.adapters)
            }
            cells = [
                ""
                if batch not in mine
                else f"{mine[batch].step_ms:.2f} ({mine[batch].floor_ms:.2f})"
                if popularity == "base"
                else f"{mine[batch].extra_ms:.2f} ({mine[batch].adapters_floor_ms:.2f})"
                for batch in batches
            ]
            name = "the step itself" if popularity == "base" else f"{popularity} {known or ''}"
            print(f"{rank:4} {name:25}" + "".join(f"{cell:>13}" for cell in cells))


def _draw(points: list[Point], args: argparse.Namespace) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib, so no sweep.png")
        return
    ranks = list(dict.fromkeys(point.rank for point in points))
    figure, axes = pyplot.subplots(1, len(ranks), figsize=(5.5 * len(ranks), 4.5), sharey=True, squeeze=False)
    for rank, axis in zip(ranks, axes[0]):
        for number, (popularity, known) in enumerate(POPULARITY):
            mine = [
                point
                for point in points
                if (point.rank, point.popularity) == (rank, popularity) and known in (0, point.adapters)
            ]
            if not mine:
                continue
            batches, colour = [point.batch for point in mine], f"C{number}"
            name = "base" if popularity == "base" else f"{popularity} {known or ''}".strip()
            axis.plot(batches, [point.step_ms for point in mine], "o-", color=colour, markersize=3, label=name)
            axis.plot(batches, [point.floor_ms for point in mine], ":", color=colour, linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(f"rank {rank}")
        axis.set_xlabel("sequences in the batch")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode step, ms (dotted: floor of its bytes)")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{args.model}, {machine()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out / "sweep.png", dpi=130)
    print(f"-> {args.out / 'sweep.csv'}, {args.out / 'sweep.png'}")


if __name__ == "__main__":
    main()
