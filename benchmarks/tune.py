"""How skinny products are best cut, and what all projections of a decode step and their readers cost together.

    python -m benchmarks.tune [--model llama-3.1-8b] [--only sweep,chain] [--seconds 240]

`sweep`: the products of each fused linear by every cut and by cuBLAS, beside the floor of their bytes; no adapters.
`chain`: all of a step but attention and sampling, with adapters of rank 16 and without, by cuBLAS, by our own products,
and by these set up while the kernel before them ends; behind a sweep also as that would have them cut.

Needs a GPU. Times are medians of CUDA graphs over all layers of the model, so that no weight comes from the cache.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from aiolora.engine.batch import Bucket
from aiolora.ops.kernels import activation, launch, linear, norm, rope
from aiolora.ops.kernels.linear import Tiling, skinny
from aiolora.ops.linear import RANKS_PER_PAGE, tile_of
from benchmarks.harness import machine
from benchmarks.shapes import SHAPES, Shape
from benchmarks.steady import BANDWIDTH

RANK, ADAPTERS = 16, 32
PAGES = RANK // RANKS_PER_PAGE  # of an adapter
SHARED_MEMORY = 227 << 10  # bytes that a program on Hopper can have
ROWS = (1, 8, 16, 32, 64)
CUTS = [
    Tiling(*cut, rows=rows)
    for cut in (
        (16, 256, 4, 4), (16, 512, 3, 4), (32, 128, 4, 4), (32, 128, 6, 4), (32, 256, 3, 4), (32, 256, 4, 4),
        (64, 64, 6, 4), (64, 128, 3, 4), (64, 128, 4, 4), (64, 128, 4, 8), (64, 256, 3, 8), (128, 64, 4, 4),
        (128, 64, 4, 8),
    )
    for rows in (16, 64)
]  # fmt: skip
STEPS = [  # tokens, distinct adapters
    (1, 0), (1, 1), (8, 0), (8, 8), (16, 0), (16, 16), (32, 0), (32, 1), (32, 32), (64, 0), (64, 32),
    (128, 0), (128, 1), (128, 32), (256, 0), (256, 1), (256, 32),
]  # fmt: skip
CUBLAS = {"SKINNY": 0, "AHEAD": 0, "TOGETHER": 0}  # as `linear` would have to be set for it to be all cuBLAS

Best = dict[tuple[int, int, int], Tiling]  # by columns and depth of the weight, and rows


class Fused(NamedTuple):
    """A weight [columns, depth] whose slices end at `bounds`."""

    columns: int
    depth: int
    bounds: tuple[int, ...]


def fused(shape: Shape) -> dict[str, Fused]:
    """The four of a layer."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": Fused(q + 2 * kv, shape.hidden, (0, q, q + kv, q + 2 * kv)),
        "o": Fused(shape.hidden, q, (0, shape.hidden)),
        "gate_up": Fused(2 * shape.inner, shape.hidden, (0, shape.inner, 2 * shape.inner)),
        "down": Fused(shape.hidden, shape.inner, (0, shape.hidden)),
    }


def normal(*shape: int, scale: float = 0.02) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def milliseconds(call: Callable[[], object], repeat: int = 12) -> float:
    """Of a replay of `call` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills what is kept between calls
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


def fitting(rows: int) -> list[Tiling]:
    """The cuts whose stages fit into shared memory; of 64 rows those for at least 64 would be the others again."""
    cuts = [cut for cut in CUTS if cut.rows == 16 or rows < cut.rows]
    return [cut for cut in cuts if (max(cut.rows, rows) + cut.columns) * cut.depth * 2 * cut.stages <= SHARED_MEMORY]


def compile_one(rows: int, weight: Fused, cut: Tiling) -> None:
    """In a process of its own: puts a variant into the compiler's cache."""
    skinny(normal(rows, weight.depth), normal(weight.columns, weight.depth), cut)


def compile_all(weights: list[Fused]) -> None:
    jobs = {
        (max(rows, cut.rows), weight, cut._replace(rows=16))
        for weight, rows in itertools.product(weights, (16, 32, 64))
        for cut in fitting(rows)
    }
    start = time.perf_counter()
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(compile_one, *job) for job in jobs]:
            future.result()
    print(f"# {len(jobs)} variants compiled in {time.perf_counter() - start:.0f} s", flush=True)


def sweep(shape: Shape, deadline: float) -> Best:
    """The fastest cut of each product, and a line for each with the four fastest."""
    compile_all(list(fused(shape).values()))
    best: Best = {}
    for (name, weight), rows in itertools.product(fused(shape).items(), ROWS):
        if time.perf_counter() > deadline:
            break
        weights = [normal(weight.columns, weight.depth) for _ in range(shape.layers)]
        floor = shape.layers * weight.columns * weight.depth * 2 / BANDWIDTH * 1e3
        x = normal(rows, weight.depth, scale=1.0)
        right = F.linear(x, weights[0]).float()
        found: list[tuple[float, Tiling]] = []
        for cut in fitting(rows):
            off = (skinny(x, weights[0], cut).float() - right).norm() / right.norm()
            if not off < 1e-2:
                raise SystemExit(f"WRONG: {name}, {rows} rows, {cut}: off by {off:.3g}")
            time_ = milliseconds(lambda x=x, cut=cut, weights=weights: [skinny(x, w, cut) for w in weights], 6)
            found.append((time_, cut))
        cublas = milliseconds(lambda x=x, weights=weights: [F.linear(x, w) for w in weights])
        found.sort(key=lambda pair: pair[0])
        best[weight.columns, weight.depth, rows] = found[0][1]
        fastest = "  ".join(f"{ms:.3f} {tuple(cut)}" for ms, cut in found[:4])
        print(f"{name:8} {rows:3} rows: floor {floor:.3f}, cuBLAS {cublas:.3f} | {fastest}", flush=True)
    return best


class Routing(NamedTuple):
    """See `ops.linear.Routing`: one kind, tokens dealt to the adapters in turn, lists as long as a graph's."""

    perm: Tensor
    tiles: Tensor
    items: Tensor
    pages: Tensor
    scales: Tensor
    vector_pages: Tensor
    owners: Tensor
    tile: int


def route(tokens: int, adapters: int) -> Routing:
    tile, groups = tile_of(tokens, "cuda"), Bucket(tokens, tokens, ADAPTERS, PAGES).tiles
    perm: list[int] = []
    owners = [0] * tokens
    tiles: list[list[int]] = []
    pages: list[list[int]] = []
    for adapter in range(adapters):
        whole = range(adapter, tokens, adapters)
        for own in (whole[at : at + tile] for at in range(0, len(whole), tile)):
            for token in own:
                owners[token] = len(tiles)
            tiles.append([len(perm), len(own)])
            pages.append([adapter * PAGES + page for page in range(PAGES)])
            perm += own
    items = [[group, 0, *of] for group, of in enumerate(tiles)]
    empty = groups - len(tiles)
    tiles += [[0, 0]] * empty
    items += [[-1, 0, 0, 0]] * empty
    pages += [[-1] * PAGES] * empty
    by_kind = ints(pages).unsqueeze(1)
    scales = torch.ones(by_kind.shape, device="cuda")
    none = torch.full((groups, 1), -1, dtype=torch.int32, device="cuda")
    return Routing(ints(perm), ints(tiles), ints(items), by_kind, scales, none, ints(owners), tile)


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


class Chain:
    """A decode step without attention and sampling: every projection of the model, and every reader of one."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.fused = shape, fused(shape)
        layers = range(shape.layers)
        self.weights = [{name: normal(w.columns, w.depth) for name, w in self.fused.items()} for _ in layers]
        self.factors = [{name: self._factors(weight) for name, weight in self.fused.items()} for _ in layers]

    @staticmethod
    def _factors(weight: Fused) -> tuple[Tensor, Tensor]:
        pages = ADAPTERS * PAGES
        a = normal(len(weight.bounds) - 1, pages, RANKS_PER_PAGE, weight.depth)
        return a, normal(pages, RANKS_PER_PAGE, weight.columns)

    def step(self, tokens: int, adapters: int) -> Callable[[], Tensor]:
        shape = self.shape
        routing = route(tokens, adapters) if adapters else None
        embedded = normal(tokens, shape.hidden, scale=1.0)
        ones = torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16)
        cos_sin = torch.randn(64, shape.head_dim, device="cuda")
        positions = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        slots = torch.arange(tokens, dtype=torch.int32, device="cuda")
        k_cache, v_cache = (normal(tokens // 16 + 1, 16, shape.kv_heads, shape.head_dim) for _ in range(2))

        def project(layer: int, name: str, x: Tensor) -> tuple[Tensor, None, list[Tensor], list[int]]:
            weight = self.weights[layer][name]
            if routing is None:
                return linear.product(x, weight), None, [], []
            a, b = self.factors[layer][name]
            y, h = linear.product_shrink(x, weight, a, [*routing[:5]], [0, routing.tile])
            vectors = torch.empty((1, 2, b.shape[-1]), device="cuda")
            tables = [routing.perm, routing.tiles, routing.pages, routing.vector_pages, routing.owners]
            owed = [h, b, vectors, *tables]
            return y, None, owed, [0, routing.tile, *self.fused[name].bounds]

        def step() -> Tensor:
            x, residual = norm.rms_norm(embedded, ones, 1e-5), embedded
            for layer in range(shape.layers):
                qkv = project(layer, "qkv", x)
                q = rope.rope_store(*qkv, None, None, 1e-5, cos_sin, positions, slots, k_cache, v_cache, shape.heads)
                x, residual = norm.add_norm(*project(layer, "o", q.view(tokens, -1)), residual, ones, 1e-5)
                inner = activation.silu_mul(*project(layer, "gate_up", x))
                x, residual = norm.add_norm(*project(layer, "down", inner), residual, ones, 1e-5)
            return x

        return step


def chain(shape: Shape, best: Best, deadline: float) -> None:
    """A line for each size of a step: milliseconds by each of the ways that it can go."""
    shipped = linear.tiling_of

    def swept(tokens: int, columns: int, depth: int, dtype: torch.dtype) -> Tiling:
        rows = next(rows for rows in ROWS if rows >= tokens)
        return best.get((columns, depth, rows)) or shipped(tokens, columns, depth, dtype)

    ways: dict[str, dict[str, Any]] = {"cuBLAS": CUBLAS, "own": {"PDL": False}, "chained": {"PDL": launch.PDL}}
    if best:
        ways["chained, as swept"] = {"tiling_of": swept}
    made = Chain(shape)
    for tokens, adapters in STEPS:
        if time.perf_counter() > deadline:
            break
        times = {}
        for way, settings in ways.items():
            if way != "cuBLAS" and tokens > linear.SKINNY:
                continue  # cuBLAS all the same
            with patch.multiple(linear, **settings):
                times[way] = milliseconds(made.step(tokens, adapters))
        listed = "  ".join(f"{way} {ms:.3f}" for way, ms in times.items())
        print(f"step of {tokens:3} tokens, {adapters:2} adapters: {listed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--only", default="sweep,chain", help="one of the two")
    parser.add_argument("--seconds", type=float, default=240, help="after which nothing new begins; a sweep has 7/10")
    args = parser.parse_args()
    wanted = set(args.only.split(","))
    if strange := wanted - {"sweep", "chain"}:
        parser.error(f"no part {', '.join(sorted(strange))}; there are sweep, chain")
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    print(f"# {machine()}, {args.model}", flush=True)
    start = time.perf_counter()
    best = sweep(SHAPES[args.model], start + 0.7 * args.seconds) if "sweep" in wanted else {}
    if "chain" in wanted:
        chain(SHAPES[args.model], best, start + args.seconds)


if __name__ == "__main__":
    main()
