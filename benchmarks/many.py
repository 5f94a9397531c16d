"""Thousands of known adapters against five: start, memory, and what the same traffic gets done.

    python -m benchmarks.many --out results
    python -m benchmarks.many --model llama-3.1-8b --clients 64 --requests 512 --out results

Adapters of rank 8 on q and v, a file each. One engine, which in every round knows five of them and then all, or the
other way round (`announce_lora`: config and header are checked, tensors are read when somebody asks; `remove_lora`).
Clients that ask again at once make the same requests: to the five, while five are known and while all are, and to all,
drawn by zipf, as they come off the disk; at last, with all in host memory, to the five and to all once more.
"""

import argparse
import asyncio
import gc
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, parse, tell
from benchmarks.online import Answer, ask, checked
from benchmarks.shapes import SHAPES, started_on

FEW = 5
RANK, ON = 8, ("q_proj", "v_proj")


@dataclass
class Rounds:
    """What every side got done, by round."""

    pace: dict[str, list[float]] = field(default_factory=dict)  # output tokens a second
    cost: dict[str, list[float]] = field(default_factory=dict)  # ms of processors for one, all threads together

    def put(self, side: str, tokens: int, took_s: float, spent_s: float) -> None:
        self.pace.setdefault(side, []).append(tokens / took_s)
        self.cost.setdefault(side, []).append(spent_s * 1e3 / tokens)

    def rows(self, side: str, over: str) -> list[tuple[str, float, str, str]]:
        """The best of the rounds: neighbours only ever cost. Least in processor time, of which a CPU's pace is made."""
        slower = 100 - 100 * max(self.pace[side]) / max(self.pace[over])
        dearer = 100 - 100 * min(self.cost[over]) / min(self.cost[side])
        return [
            *self.row(side),
            (f"  slower than {over} by", slower, "%", "bar: 5.5"),
            ("  by processor time", dearer, "%", ""),
        ]

    def row(self, side: str) -> list[tuple[str, float, str, str]]:
        return [
            (
                side,
                max(self.pace[side]),
                "tokens/s",
                f"median of {len(self.pace[side])} rounds: {statistics.median(self.pace[side]):.1f}",
            ),
            (
                "  processor time of a token",
                min(self.cost[side]),
                "ms",
                f"median: {statistics.median(self.cost[side]):.3f}",
            ),
        ]


def read_nbytes() -> int:
    """Bytes that this process has read so far, from wherever."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def resident_nbytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Traffic:
    """Clients of one engine, and the books on what they got."""

    def __init__(self, engine: AsyncLLMEngine, adapters: list[LoRARequest], args: argparse.Namespace) -> None:
        self.rounds = Rounds()
        self.answers: list[Answer] = []  # to the last requests
        self._engine, self._args = engine, args
        self._five, self._all = adapters[:FEW], adapters[FEW:] + adapters[:FEW]  # the five are not the popular ones
        self._weights = [1 / place for place in range(1, len(adapters) + 1)]
        self._chance, self._fresh = random.Random(0), random.Random(1)

    async def to_five(self, side: str | None) -> None:
        await self._run(side, self._chance.choices(self._five, k=self._args.requests))

    async def to_all(self, side: str) -> None:
        await self._run(side, self._chance.choices(self._all, self._weights, k=self._args.requests))

    async def _run(self, side: str | None, loras: list[LoRARequest]) -> None:
        """One request for each of `loras`, `args.clients` at a time. `side` None: they do not count."""
        waiting, outputs = list(enumerate(loras)), self._args.outputs
        self.answers = []

        async def client() -> None:
            while waiting:
                number, lora = waiting.pop()
                length = self._args.inputs + number % 7
                ids = [self._fresh.randrange(300, SHAPES[self._args.model].vocab) for _ in range(length)]
                self.answers.append(await ask(self._engine, ids, outputs, lora))

        start, before = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client() for _ in range(self._args.clients)))
        if side is not None:
            took, spent = time.perf_counter() - start, time.process_time() - before
            self.rounds.put(side, len(loras) * outputs, took, spent)


async def compare(
    engine: AsyncLLMEngine, traffic: Traffic, adapters: list[LoRARequest], args: argparse.Namespace
) -> list[tuple[str, float, str, str]]:
    total, rest = len(adapters), adapters[FEW:]
    few, many, spread = f"{FEW} of {FEW} known", f"{FEW} of {total} known", f"all {total}, off the disk"
    held_few, held_many = f"{FEW} of {total} in host memory", f"all {total}, in host memory"
    announced: list[float] = []

    async def know_all() -> None:
        start = time.perf_counter()
        for lora in rest:
            await engine.announce_lora(lora)
        announced.append(time.perf_counter() - start)

    for lora in adapters[:FEW]:
        await engine.announce_lora(lora)
    await traffic.to_five(None)
    before = read_nbytes()
    await know_all()
    read = read_nbytes() - before
    for number in range(args.rounds):
        for known in (True, False) if number % 2 == 0 else (False, True):
            if known and len(engine.intake.registry.known()) < total:
                await know_all()
            elif not known:
                for lora in rest:
                    await engine.remove_lora(lora.lora_name)
                await traffic.to_five(few)
            if known:
                for side in (traffic.to_five(many), traffic.to_all(spread)):
                    await side
        print(f"# round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    loaded = {version.name for version in await engine.list_loras()}
    before, start = resident_nbytes(), time.perf_counter()
    versions = [await engine.add_lora(lora) for lora in adapters if lora.lora_name not in loaded]
    took, computed = time.perf_counter() - start, sum(version.nbytes for version in versions)
    grown = resident_nbytes() - before
    for number in range(args.rounds):
        for side in (traffic.to_five(held_few), traffic.to_all(held_many))[:: 1 if number % 2 else -1]:
            await side
        print(f"# in memory: round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    on_disk = sum((Path(lora.lora_path) / "adapter_model.safetensors").stat().st_size for lora in adapters)
    return [
        (f"making {len(rest)} more known", statistics.median(announced), "s", ""),
        ("  bytes read for it", read / 1e6, "MB", f"of {on_disk / 1e6:.0f} MB on disk"),
        ("reading an adapter", took / len(versions) * 1e3, "ms", f"{len(versions)} of them, one by one"),
        ("  host memory computed for them", computed / 1e6, "MB", f"{versions[0].nbytes / 1e6:.2f} MB each"),
        ("  measured (resident set)", grown / 1e6, "MB", ""),
        *traffic.rounds.row(few),
        *traffic.rounds.rows(many, few),
        *traffic.rounds.rows(spread, few),
        *traffic.rounds.row(held_few),
        *traffic.rounds.rows(held_many, held_few),
    ]


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    adapters = make_adapters(args.adapters_dir, args.model, args.adapters, rank=RANK, on=ON, share=0.25)
    engine_args = EngineArgs(
        **started_on(args.adapters_dir, args.model),  # type: ignore[arg-type]
        max_num_seqs=args.clients,
        max_model_len=1024,
        enable_lora=True,
        max_loras=args.clients,
        max_lora_rank=RANK,
        max_cpu_loras=max(args.clients, args.adapters),
        lora_memory=2 * args.clients * shape.adapter_nbytes(RANK),
        kv_cache_memory=args.clients * 1024 * shape.kv_nbytes,
    )
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        traffic = Traffic(engine, adapters, args)
        rows = await compare(engine, traffic, adapters, args)
        check = checked(engine, args.model, traffic.answers)
    tell(args.out / "many.csv", f"{args.model}, {args.clients} clients, rank {RANK} on {' and '.join(ON)}", rows, check)


def main() -> None:
    parser = arguments(__doc__, model="smollm2-135m", dtype=False)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=16, help="of each side in a round")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    asyncio.run(measure(parse(parser)))


if __name__ == "__main__":
    main()
