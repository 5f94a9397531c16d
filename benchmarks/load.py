"""Where the time of a load goes: an adapter from the page cache into host memory, phase by phase. No model runs.

    python -m benchmarks.load --adapters-dir /dev/shm/bench --out results
    python -m benchmarks.load --threads 8,12,16 --rank 64

One thread has the interpreter and does what names and shapes ask for; compiled code reads, digests, checks and lays
out in several. Milliseconds of processor, the least of all loads: neighbours only cost. Reading and sha256 are also
done alone, in one thread; what is left of the compiled part is the check and the laying out. Where there is a GPU,
pages are page-locked, as the engine's, and copied there. Their memory is used again, load after load: there torch
keeps it, elsewhere it is kept here, or taking new memory would be most of a load. Every page is held against the file.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from aiolora import LoRARequest
from aiolora.lora import compiled, loader, outlines, paging, tensorfile
from aiolora.lora.kinds import Room
from aiolora.lora.layout import Layout, layout_of
from aiolora.lora.loader import AdapterWeights
from aiolora.lora.memory import InMemory
from aiolora.lora.outline import Limits
from aiolora.lora.outlines import Outlines
from aiolora.models.loading import outline
from aiolora.ops.build_native import library
from aiolora.ops.linear import RANKS_PER_PAGE
from benchmarks.adapters import factors, make_adapters
from benchmarks.command import arguments, parse
from benchmarks.harness import Result, seconds, write
from benchmarks.shapes import make_model

PARTS = {  # what a load calls, outermost first; a part's time is without the parts in it
    (loader, "parse_config"): "config",
    (loader, "open_tensors"): "file opened, its header read",
    (tensorfile, "_entries"): "header parsed",
    (outlines, "outline"): "names and shapes",
    (loader, "fill"): "places of the tensors",
    (paging, "_empty"): "memory of the pages",
    (paging, "lay_out"): "compiled code called and asked",
    (loader, "_digest"): "digest of the digests",
}
REST, COMPILED = "all else", "compiled"


class Took(NamedTuple):
    """One load, milliseconds."""

    wall: float
    process: float  # processor, of all threads
    parts: dict[str, float]  # processor, of the thread that loads

    @property
    def serial(self) -> float:
        """In the interpreter, one thread."""
        return sum(spent for part, spent in self.parts.items() if part != COMPILED)


class Parts:
    """Processor time of the thread that runs them, part by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._now = [REST]
        self._since = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What PARTS names says when it begins and ends."""
        found = {place: getattr(*place) for place in PARTS}
        loaded = library()
        assert loaded is not None, "nothing here compiles: there are no parts"
        within = loaded._replace(lay_out=self._wrapped(loaded.lay_out, COMPILED))  # type: ignore[arg-type]
        try:
            vars(compiled)["library"] = lambda: within
            for (module, name), call in found.items():
                setattr(module, name, self._wrapped(call, PARTS[module, name]))
            yield
        finally:
            vars(compiled)["library"] = library
            for (module, name), call in found.items():
                setattr(module, name, call)

    def time(self, load: Callable[[], object]) -> Took:
        self.spent.clear()
        start, process, self._since = time.perf_counter(), time.process_time(), time.thread_time()
        load()
        self._turn()
        wall, whole = time.perf_counter() - start, time.process_time() - process
        return Took(wall * 1e3, whole * 1e3, {part: spent * 1e3 for part, spent in self.spent.items()})

    def _wrapped(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._now.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._now.pop()

        return timed

    def _turn(self) -> None:
        now = time.thread_time()
        self.spent[self._now[-1]] += now - self._since
        self._since = now


def rows_of(name: str, loads: list[Took]) -> list[Result]:
    def least(of: Callable[[Took], float]) -> float:
        return min(map(of, loads))

    median = statistics.median(took.wall for took in loads)
    serial, spread = least(lambda took: took.serial), least(lambda took: took.process - took.serial)
    parts = dict.fromkeys((*PARTS.values(), REST))
    return [
        Result(f"{name}: wall clock", least(lambda took: took.wall), "ms", f"median {median:.1f}"),
        Result(f"{name}: one thread, in the interpreter", serial, "ms"),
        *(Result(f"  {part}", least(lambda took, part=part: took.parts.get(part, 0.0)), "ms") for part in parts),
        Result(f"{name}: spread over threads, compiled", spread, "ms"),
    ]


def alone(lora: LoRARequest) -> list[Result]:
    """Reading and digesting each tensor, nothing else, in this thread."""
    with loader.open_tensors(lora.lora_name, Path(lora.lora_path)) as file:
        entries = list(file.entries.values())
        buffer = bytearray(max(entry.nbytes for entry in entries))
        view = memoryview(buffer)

        def read() -> None:
            for entry in entries:
                file.read(entry, view)

        def digest() -> None:
            for entry in entries:
                hashlib.sha256(view[: entry.nbytes]).digest()

        total = sum(entry.nbytes for entry in entries)
        took = {"read": min(cpu(read)), "sha256": min(cpu(digest))}
    return [
        Result(f"  {name} alone", spent, "ms", f"{total / spent / 1e6:.2f} GB/s a thread, {len(entries)} tensors")
        for name, spent in took.items()
    ]


def cpu(call: Callable[[], object], repeat: int = 5) -> list[float]:
    """Milliseconds of this thread."""
    times = []
    for _ in range(repeat):
        start = time.thread_time()
        call()
        times.append((time.thread_time() - start) * 1e3)
    return times


def in_memory(lora: LoRARequest) -> InMemory:
    """What `add_lora(name, tensors=..., config=...)` loads."""
    folder = Path(lora.lora_path)
    config = json.loads((folder / loader.CONFIG).read_bytes())
    return InMemory(lora.lora_name, load_file(folder / loader.TENSORS), config)


def check(lora: LoRARequest, weights: AdapterWeights, layout: Layout) -> None:
    """Every rank of every page is the file's."""
    for module, (a, b) in factors(lora).items():
        kind, layer, index = layout.targets[module].place
        low, high = layout.kinds[kind].bounds[index : index + 2]
        ours_a = torch.cat([page[layer, index] for page in weights.a[kind]])
        ours_b = torch.cat([page[layer, :, low:high] for page in weights.b[kind]])
        if not (torch.equal(ours_a[: len(a)], a) and torch.equal(ours_b[: b.shape[1]], b.T)):
            raise SystemExit(f"WRONG: {module} of {lora.lora_name} is not the file's")
        if ours_a[len(a) :].count_nonzero() or ours_b[b.shape[1] :].count_nonzero():
            raise SystemExit(f"WRONG: {module} of {lora.lora_name} has more than {len(a)} ranks")


def copied(weights: AdapterWeights) -> Result:
    """Its pages to the GPU, nothing else."""
    pages = [page for some in (*weights.a.values(), *weights.b.values()) for page in some]
    there = [torch.empty_like(page, device="cuda") for page in pages]

    def copy() -> None:
        for page, place in zip(pages, there):
            place.copy_(page, non_blocking=True)
        torch.cuda.synchronize()

    return Result("copy to the device", min(seconds(copy, repeat=5)) * 1e3, "ms", f"{len(pages)} pages")


def main() -> None:
    parser = arguments(__doc__, dtype=False)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loads", type=int, default=20, help="of each kind")
    parser.add_argument("--threads", default=str(paging._num_threads()), help="that read an adapter; or several counts")
    measure(parse(parser))


def read_by(threads: int) -> None:
    """So many threads from now on."""
    paging._num_threads = lambda: threads
    paging.threads.cache_clear()


def measure(args: argparse.Namespace) -> None:
    counts_of_threads = list(map(int, args.threads.split(",")))
    read_by(counts_of_threads[0])
    loras = make_adapters(args.adapters_dir, args.model, 4, rank=args.rank)
    layout = layout_of(outline(make_model(args.adapters_dir, args.model)).decoder, torch.bfloat16)
    limits = Limits(args.rank, Room(*[sys.maxsize] * len(Room._fields)), args.model, pinned=torch.cuda.is_available())
    counts = dict.fromkeys(layout.page_kinds.linears, -(-args.rank // RANKS_PER_PAGE))
    if limits.pinned:
        paging.reserve(layout, {kind: 2 * count for kind, count in counts.items()})
    else:
        kept = paging._empty(layout, counts, pinned=False)
        paging._empty = lambda *args, **kwargs: kept

    def load(number: int, known: Outlines) -> AdapterWeights:
        return loader.load_adapter(loras[number % len(loras)], known)

    parts, known = Parts(), Outlines(layout, limits)
    for number, lora in enumerate(loras):  # into the page cache, and the library compiled
        check(lora, load(number, known), layout)
    with parts.watched():
        new = [parts.time(partial(load, number, Outlines(layout, limits))) for number in range(args.loads)]
        alike = [parts.time(partial(load, number, known)) for number in range(args.loads)]
        held = in_memory(loras[0])
        copies = [parts.time(partial(loader.load_adapter, held, known)) for _ in range(args.loads)][1:]
    rows = [*rows_of("first of its kind", new), *rows_of("one more", alike), *alone(loras[0])]
    rows += rows_of("one more, from memory", copies)[:2]
    rows.append(Result("known by name, one more", min(cpu(partial(loader.check_adapter, loras[0], known))), "ms"))
    for threads in counts_of_threads:
        read_by(threads)
        rows += rows_of("one more", [parts.time(partial(load, number, known)) for number in range(args.loads)])[:1]
        rows[-1] = replace(rows[-1], name=f"one more, {threads} threads: wall clock")
    if limits.pinned:
        rows.append(copied(load(0, known)))
    nbytes = (Path(loras[0].lora_path) / loader.TENSORS).stat().st_size
    said = f"{args.model}, rank {args.rank}, {nbytes / 1e6:.1f} MB"
    print(f"load {os.getloadavg()[0]:.1f}, {said}, {counts_of_threads[0]} threads of {os.cpu_count()}")
    write(rows, args.out / "load.csv")


if __name__ == "__main__":
    main()
