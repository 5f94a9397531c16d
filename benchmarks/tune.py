"""Finds how skinny products are best cut, and what a decode step's projections cost: base, with adapters, by cuBLAS.

    python -m benchmarks.tune --seconds 240

Times CUDA graphs over 32 distinct layers, so that no weight comes from the cache.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.ops.kernels import activation, linear, norm, rope
from aiolora.ops.kernels.linear import Tiling, skinny
from benchmarks.harness import machine

SHAPES = {
    "8b": {"hidden": 4096, "inner": 14336, "kv": 1024, "layers": 32, "vocab": 128256},
    "3b": {"hidden": 3072, "inner": 8192, "kv": 1024, "layers": 28, "vocab": 128256},
}
CANDIDATES = [
    Tiling(*cut)
    for cut in (
        (16, 256, 4, 4), (16, 512, 3, 4), (32, 128, 4, 4), (32, 128, 6, 4), (32, 256, 3, 4), (32, 256, 4, 4),
        (64, 128, 3, 4), (64, 128, 4, 4), (64, 128, 4, 8), (64, 256, 3, 8), (64, 64, 6, 4), (128, 64, 4, 4),
        (128, 64, 4, 8),
    )
]  # fmt: skip


def sites(shape: dict[str, int]) -> dict[str, tuple[int, int, list[int]]]:
    """Name -> (out-features, in-features, bounds)."""
    hidden, inner, kv = shape["hidden"], shape["inner"], shape["kv"]
    return {
        "qkv": (hidden + 2 * kv, hidden, [0, hidden, hidden + kv, hidden + 2 * kv]),
        "o": (hidden, hidden, [0, hidden]),
        "gate_up": (2 * inner, hidden, [0, inner, 2 * inner]),
        "down": (hidden, inner, [0, hidden]),
    }


def graphed(call: Callable[[], object], repeat: int = 12) -> float:
    """Median milliseconds of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def routing(tokens: int, adapters: int, rank: int, width: int) -> tuple[list[Tensor], int, Tensor]:
    """One kind; tokens dealt to adapters in turn; lists as large as a graph's."""
    tile = 16 if tokens <= 256 else 64
    rows = sorted(t % adapters for t in range(tokens))
    perm = sorted(range(tokens), key=lambda t: t % adapters)
    each = -(-rank // 8)
    tiles: list[list[int]] = []
    items: list[list[int]] = []
    pages: list[list[int]] = []
    first = 0
    while first < tokens:
        count = sum(rows[i] == rows[first] for i in range(first, min(first + tile, tokens)))
        items += [[len(tiles), pair, first, count] for pair in range(-(-rank // 16))]
        tiles.append([first, count])
        pages.append([rows[first] * each + i for i in range(each)] + [-1] * (width - each))
        first += count
    most = min(-(-tokens // tile) + min(tokens, 33), tokens)
    pages += [[-1] * width] * (most - len(tiles))
    tiles += [[0, 0]] * (most - len(tiles))
    items += [[-1, 0, 0, 0]] * (most * width // 2 - len(items))
    ints = [torch.tensor(v, dtype=torch.int32, device="cuda") for v in (perm, tiles, items, pages)]
    ints[3] = ints[3].unsqueeze(1)
    owners = torch.empty_like(ints[0])
    owners[ints[0].long()] = torch.arange(len(tiles), device="cuda", dtype=torch.int32).repeat_interleave(ints[1][:, 1])
    return [*ints, torch.ones(ints[3].shape, device="cuda")], tile, owners


def compile_one(job: tuple[int, int, int, Tiling]) -> None:
    """In a process of its own: put a variant into the compiler's cache."""
    tokens, columns, depth, cut = job
    torch.cuda.init()
    skinny(random(tokens, depth), random(columns, depth), cut)


def sweep(shape: dict[str, int], deadline: float) -> dict[tuple[str, int], Tiling]:
    """The best cut of each site at 16, 32 and 64 rows, without adapters."""
    best: dict[tuple[str, int], Tiling] = {}
    jobs = [
        (rows, columns, depth, cut)
        for columns, depth, _ in sites(shape).values()
        for rows, cut in itertools.product((16, 32, 64), CANDIDATES)
        if not (rows == 64 and cut.columns == 16)
    ]
    started = time.perf_counter()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        failed = sum(1 for future in [pool.submit(compile_one, job) for job in jobs] if future.exception())
    print(f"{len(jobs)} variants compiled in {time.perf_counter() - started:.0f} s, {failed} failed", flush=True)
    for name, (columns, depth, _) in sites(shape).items():
        weights = [random(columns, depth) for _ in range(shape["layers"])]
        floor = shape["layers"] * columns * depth * 2 / 4.29e9
        for rows in (1, 8, 16, 32, 64):
            x = random(rows, depth) * 50
            cublas = graphed(lambda x=x, weights=weights: [F.linear(x, w) for w in weights])
            found = []
            for cut in CANDIDATES:
                if (rows == 64 and cut.columns == 16) or time.perf_counter() > deadline:
                    continue
                for ahead in (0, 512):
                    try:
                        one = cut._replace(ahead=ahead)
                        y, right = skinny(x, weights[0], one), F.linear(x, weights[0])
                        if not (y - right).float().norm() < 1e-2 * right.float().norm():
                            print("WRONG", name, rows, one)
                            continue
                        found.append(
                            (
                                graphed(lambda x=x, one=one, weights=weights: [skinny(x, w, one) for w in weights], 6),
                                one,
                            )
                        )
                    except Exception as error:
                        print("failed", name, rows, cut, str(error)[:80])
            found.sort(key=lambda pair: pair[0])
            if found:
                best[name, rows] = found[0][1]
            listed = "  ".join(f"{ms:.3f} {tuple(cut)}" for ms, cut in found[:4])
            print(f"{name:8} rows {rows:3}: floor {floor:.3f} cuBLAS {cublas:.3f} | {listed}", flush=True)
        del weights
    return best


def chain(
    shape: dict[str, int], tokens: int, adapters: int, rank: int, weights: list[dict[str, Tensor]], pool
) -> Callable[[], Tensor]:
    """A decode step without attention and sampling: every projection and every reader of one."""
    hidden, kv, dim = shape["hidden"], shape["kv"], 128
    heads, groups = hidden // dim, kv // dim
    layout = sites(shape)
    lists: list[Tensor] = []
    if adapters:
        lists, tile, owners = routing(tokens, adapters, rank, max(2, -(-rank // 8)))
    residual0, ones = random(tokens, hidden) * 50, torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
    cos_sin = torch.randn(64, dim, device="cuda")
    positions = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    slots = torch.arange(tokens, dtype=torch.int32, device="cuda")
    caches = [torch.zeros(64, 16, groups, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def project(layer: int, name: str, x: Tensor) -> tuple[Tensor, None, list[Tensor], list[int]]:
        weight, bounds = weights[layer][name], layout[name][2]
        if not adapters:
            return linear.product(x, weight), None, [], []
        a, b = pool[layer][name]
        y, h = linear.product_shrink(x, weight, a, lists, [0, tile])
        return y, None, [h, b, lists[0], lists[1], lists[3], owners], [0, tile, *bounds]

    def step() -> Tensor:
        x, residual = norm.rms_norm(residual0, ones, 1e-5), residual0
        for layer in range(len(weights)):
            q = rope.rope_store(*project(layer, "qkv", x), None, None, 1e-5, cos_sin, positions, slots, *caches, heads)
            x, residual = norm.add_norm(*project(layer, "o", q.view(tokens, -1)), residual, ones, 1e-5)
            inner = activation.silu_mul(*project(layer, "gate_up", x))
            x, residual = norm.add_norm(*project(layer, "down", inner), residual, ones, 1e-5)
        return x

    return step


def chains(shape: dict[str, int], deadline: float) -> None:
    """The whole step at several batch sizes, with the variants that matter."""
    layers, layout, most = shape["layers"], sites(shape), 64
    weights = [{name: random(n, k) for name, (n, k, _) in layout.items()} for _ in range(layers)]
    pages = [
        {name: (random(len(bounds) - 1, most, 8, k), random(most, 8, n)) for name, (n, k, bounds) in layout.items()}
        for _ in range(layers)
    ]
    for tokens, adapters in (
        (1, 0),
        (1, 1),
        (8, 0),
        (8, 8),
        (16, 0),
        (16, 16),
        (32, 0),
        (32, 1),
        (32, 32),
        (64, 0),
        (64, 32),
        (128, 0),
        (128, 32),
        (128, 1),
        (256, 0),
        (256, 1),
        (256, 32),
    ):
        if time.perf_counter() > deadline:
            return
        line = f"step of {tokens:3} tokens, {adapters:2} adapters:"
        for skinny_to, pdl, ahead in ((0, True, 0), (64, False, 0), (64, True, 0), (64, True, 512), (64, True, 1024)):
            if tokens > 64 and skinny_to:
                continue
            if skinny_to and tokens > skinny_to:
                continue
            for module in (linear, norm, activation, rope):
                module.PDL = pdl
                module.SKINNY = skinny_to
            AHEAD[0] = ahead
            how = f"{'own' if skinny_to else 'cuBLAS'}{' pdl' if pdl else ''} {ahead}"
            try:
                line += f"  [{how}] {graphed(chain(shape, tokens, adapters, 16, weights, pages)):.3f}"
            except Exception as error:
                line += f"  failed {str(error)[:100]}"
        print(line, flush=True)


AHEAD = [0]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=240)
    arguments.add_argument("--shape", default="8b", choices=SHAPES)
    arguments.add_argument("--only", default="sweep,chains")
    arguments.add_argument("--out", type=Path)
    said = arguments.parse_args()
    print(machine(), file=sys.stderr)
    started = time.perf_counter()
    shape = SHAPES[said.shape]
    best: dict[tuple[str, int], Tiling] = {}
    if "sweep" in said.only:
        best = sweep(shape, started + said.seconds * 0.7)
    chosen = {layout[:2]: name for name, layout in sites(shape).items()}
    shipped = linear.tiling_of

    def tiling_of(tokens: int, columns: int, depth: int, dtype: torch.dtype, small: int = 4) -> Tiling:
        rows = next((rows for rows in (1, 8, 16, 32, 64) if rows >= tokens), 64)
        cut = best.get((chosen.get((columns, depth), ""), rows)) or shipped(tokens, columns, depth, dtype, small)
        return cut._replace(ahead=AHEAD[0])

    linear.tiling_of = tiling_of
    if "chains" in said.only:
        chains(shape, started + said.seconds)


if __name__ == "__main__":
    main()
