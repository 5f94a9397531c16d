"""Thousands of known adapters against five: start, memory, and what the same traffic gets done.

    python -m benchmarks.many --out results
    python -m benchmarks.many --model llama-3.1-8b --clients 64 --requests 512 --out results

Adapters of rank 8 on q and v, a file each. Two engines of one kind in one process: one knows five, the other all
(`announce_lora`: config and header are checked, tensors are read when somebody asks). Clients that ask again at once
make the same requests of either, in rounds that take turns: to the five, on both; and to all, drawn by zipf, first as
they come off the disk, then from host memory.
"""

import argparse
import asyncio
import csv
import gc
import os
import random
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from benchmarks.adapters import make_adapters
from benchmarks.harness import machine
from benchmarks.online import Answer, ask
from benchmarks.reference import Reference
from benchmarks.shapes import SHAPES, started_on

FEW = 5
RANK, ON = 8, ("q_proj", "v_proj")


@dataclass
class Rounds:
    """What every side got done, by round."""

    pace: dict[str, list[float]] = field(default_factory=dict)  # output tokens a second
    cost: dict[str, list[float]] = field(default_factory=dict)  # ms of processors for one, all threads together
    answers: list[Answer] = field(default_factory=list)

    def fall(self, side: str, over: str) -> float:
        """Percent by which `side` is slower: the median over the rounds."""
        pairs = zip(self.pace[side], self.pace[over])
        return statistics.median(100 - 100 * one / other for one, other in pairs)

    def dearer(self, side: str, over: str) -> float:
        """Percent by which it takes more of the processors: on a CPU the same, but neighbours hardly tell."""
        pairs = zip(self.cost[side], self.cost[over])
        return statistics.median(100 - 100 * other / one for one, other in pairs)


def read_nbytes() -> int:
    """Bytes that this process has read so far, from wherever."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def resident_nbytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def traffic(
    engine: AsyncLLMEngine, loras: list[LoRARequest], args: argparse.Namespace, fresh: random.Random
) -> tuple[float, list[Answer]]:
    """Output tokens a second of one request for each of `loras`, `args.clients` at a time."""
    vocab, waiting = SHAPES[args.model].vocab, list(enumerate(loras))[::-1]
    answers: list[Answer] = []

    async def client() -> None:
        while waiting:
            number, lora = waiting.pop()
            ids = [fresh.randrange(300, vocab) for _ in range(args.inputs + number % 7)]
            answers.append(await ask(engine, ids, args.outputs, lora))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(args.clients)))
    return len(loras) * args.outputs / (time.perf_counter() - start), answers


async def compare(
    few: AsyncLLMEngine, many: AsyncLLMEngine, adapters: list[LoRARequest], args: argparse.Namespace
) -> tuple[Rounds, list[tuple[str, float, str, str]]]:
    rounds, fresh, chance = Rounds(), random.Random(1), random.Random(0)
    weights = [1 / place for place in range(1, len(adapters) + 1)]
    drawn = adapters[FEW:] + adapters[:FEW]  # so that the five are not the popular ones
    rows: list[tuple[str, float, str, str]] = []

    async def side(name: str, engine: AsyncLLMEngine, loras: list[LoRARequest]) -> None:
        before = time.process_time()
        pace, answers = await traffic(engine, loras, args, fresh)
        spent = time.process_time() - before
        rounds.pace.setdefault(name, []).append(pace)
        rounds.cost.setdefault(name, []).append(spent * 1e3 / (len(loras) * args.outputs))
        if engine is many:  # of its last side: what is held against the reference
            rounds.answers = answers

    async def turn(spread: str) -> None:
        five = chance.choices(adapters[:FEW], k=args.requests)
        sides = [
            (f"{FEW} of {FEW} known ({spread})", few, five),
            (f"{FEW} of {len(adapters)} known ({spread})", many, five),
            (spread, many, chance.choices(drawn, weights, k=args.requests)),
        ]
        chance.shuffle(sides)
        for name, engine, loras in sides:
            await side(name, engine, loras)

    for engine in (few, many):  # warm up
        await traffic(engine, adapters[:FEW] * 2, args, fresh)
    spreads = (f"zipf over {len(adapters)}, off the disk", f"zipf over {len(adapters)}, in host memory")
    for number in range(args.rounds):
        await turn(spreads[0])
        print(f"# round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    loaded = {version.name for version in await many.list_loras()}
    before, start = resident_nbytes(), time.perf_counter()
    versions = [await many.add_lora(lora) for lora in adapters if lora.lora_name not in loaded]
    if versions:
        took, computed = time.perf_counter() - start, sum(version.nbytes for version in versions)
        rows.append(("reading an adapter", took / len(versions) * 1e3, "ms", f"{len(versions)} of them, one by one"))
        rows.append(("host memory computed for them", computed / 1e6, "MB", f"{versions[0].nbytes / 1e6:.2f} MB each"))
        rows.append(("  measured (resident set)", (resident_nbytes() - before) / 1e6, "MB", ""))
    for number in range(args.rounds):
        await turn(spreads[1])
        print(f"# round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    for spread in spreads:
        reference = f"{FEW} of {FEW} known ({spread})"
        rows.append((reference, statistics.median(rounds.pace[reference]), "tokens/s", ""))
        for name in (f"{FEW} of {len(adapters)} known ({spread})", spread):
            rows.append((f"  {name}", statistics.median(rounds.pace[name]), "tokens/s", ""))
            rows.append(("    slower by", rounds.fall(name, reference), "%", "bar: 5.5"))
            rows.append(("    slower by processor time", rounds.dearer(name, reference), "%", ""))
    return rounds, rows


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    adapters = make_adapters(args.adapters_dir, args.model, args.adapters, rank=RANK, on=ON, share=0.25)
    on_disk = sum((Path(lora.lora_path) / "adapter_model.safetensors").stat().st_size for lora in adapters)
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
    rows: list[tuple[str, float, str, str]] = []
    async with AsyncExitStack() as stack:
        few, many = [await stack.enter_async_context(AsyncLLMEngine.from_engine_args(engine_args)) for _ in range(2)]
        for engine, known in ((few, adapters[:FEW]), (many, adapters)):
            before, start = read_nbytes(), time.perf_counter()
            for lora in known:
                await engine.announce_lora(lora)
            rows.append((f"making {len(known)} known", time.perf_counter() - start, "s", ""))
        read = read_nbytes() - before
        rows.append(("  bytes read for it", read / 1e6, "MB", f"of {on_disk / 1e6:.0f} MB on disk"))
        rounds, more = await compare(few, many, adapters, args)
        rows += more
        assert many._built is not None
        picked = random.Random(0).sample(rounds.answers, min(4, len(rounds.answers)))
        reference = Reference(many._built.engine._runner._model, args.model)  # type: ignore[attr-defined]
        check = reference.check([each.output for each in picked], [each.output.lora_request for each in picked])
    load = f"load {os.getloadavg()[0]:.1f}"
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "many.csv").open("w", newline="") as stream:
        stream.write(f"# {machine()}, {load}, {args.model}, {args.clients} clients\n")
        csv.writer(stream).writerows([("name", "value", "unit", "note"), *rows])
    print(f"{machine()}, {load}, {args.model}, {args.clients} clients, rank {RANK} on {' and '.join(ON)}")
    for name, value, unit, note in rows:
        print(f"{name:55} {value:10.2f} {unit:10} {note}")
    print(f"check: {check}")
    if not check.right:
        raise SystemExit("WRONG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32, help="of each side in a round")
    parser.add_argument("--inputs", type=int, default=32)
    parser.add_argument("--outputs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--adapters-dir", type=Path, default=Path(tempfile.gettempdir()) / "aiolora-bench")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.adapters_dir.mkdir(parents=True, exist_ok=True)
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()
