"""More adapters than slots, and one that is hot: what each costs whoever waits, in one run on one engine.

    python -m benchmarks.turns --model smollm2-135m --slots 4 --rate 3 --out results
    python -m benchmarks.turns --model llama-3.1-8b --slots 16 --rate 40 --inputs 128-512 --outputs 64-128 --out results

Three comparisons, each in rounds that take turns so that a drift of the machine meets both sides alike; arrivals,
prompts and lengths of both sides are the same:

- even: arrivals by chance over as many adapters as slots, and over twice as many. Time to first token.
- full: two clients an adapter that ask again at once, so that every slot is always wanted. The longest wait is held
  against the bound of docs/architecture.md: 3 s and twice the longest answer (and the step that computes its prompt).
- hot: the cold adapters' requests alone, and beside one adapter that makes the requests nine times as many.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest
from aiolora.engine.scheduler import SchedulerLimits
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, between, parse, tell
from benchmarks.online import Answer, ask, at, checked
from benchmarks.shapes import SHAPES, started_on

PATIENCE_S: float = SchedulerLimits.patience_s
HOT_SHARE = 0.9


class Traffic:
    """Requests of one comparison: what is asked is the same on both sides, of whom is not."""

    def __init__(self, engine: AsyncLLMEngine, args: argparse.Namespace) -> None:
        self.answers: list[Answer] = []
        self._engine = engine
        self._args = args
        self._vocab = SHAPES[args.model].vocab
        self._fresh = random.Random(args.seed)  # prompts: none is met twice

    async def by_chance(self, seed: int, rate: float, lora_of: Callable[[random.Random], LoRARequest]) -> list[Answer]:
        """Poisson arrivals for a round, and all answers to them."""
        chance, choice = random.Random(seed), random.Random(seed)
        tasks = []
        start = due = time.perf_counter()
        while due < start + self._args.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self._ask(chance, lora_of(choice))))
            due += chance.expovariate(rate)
        return self._kept(await asyncio.gather(*tasks))

    async def by_clients(self, seed: int, loras: list[LoRARequest], clients: int) -> list[Answer]:
        """Clients of each adapter that ask again as soon as they are answered, for a round."""
        end = time.perf_counter() + self._args.seconds

        async def client(number: int, lora: LoRARequest) -> list[Answer]:
            chance, answers = random.Random(1000 * seed + number), []
            while time.perf_counter() < end:
                answers.append(await self._ask(chance, lora))
            return answers

        several = [client(number, loras[number % len(loras)]) for number in range(clients)]
        return self._kept([answer for answers in await asyncio.gather(*several) for answer in answers])

    async def _ask(self, chance: random.Random, lora: LoRARequest) -> Answer:
        length, outputs = chance.randint(*self._args.inputs), chance.randint(*self._args.outputs)
        return await ask(self._engine, [self._fresh.randrange(300, self._vocab) for _ in range(length)], outputs, lora)

    def _kept(self, answers: list[Answer]) -> list[Answer]:
        self.answers += answers
        return answers


@dataclass
class Table:
    """Waits of both sides of each comparison, by round."""

    sides: dict[str, list[list[float]]] = field(default_factory=dict)
    longest: float = 0.0  # ms, of an answer from its first token to its last

    def put(self, side: str, answers: list[Answer]) -> None:
        self.sides.setdefault(side, []).append([answer.ttft_ms for answer in answers])
        self.longest = max(self.longest, *(sum(answer.gaps_ms) for answer in answers))

    def waits(self, side: str) -> list[float]:
        return [wait for some in self.sides[side] for wait in some]

    def ratio(self, side: str, over: str, share: float) -> float:
        """The median over the rounds: what disturbs the machine for a while decides nothing."""
        pairs = zip(self.sides[side], self.sides[over])
        return statistics.median(at(one, share) / at(other, share) for one, other in pairs)

    def rows(self, slots: int) -> Iterator[tuple[str, float, str, str]]:
        for side in self.sides:
            waits = self.waits(side)
            yield f"{side}: requests", len(waits), "", ""
            for share in (50, 99):
                yield f"{side}: first token p{share}", at(waits, share / 100), "ms", ""
            yield f"{side}: longest wait", max(waits), "ms", ""
        for kind in ("even", "full"):
            if f"{kind} {slots}" in self.sides:
                ratio = self.ratio(f"{kind} {2 * slots}", f"{kind} {slots}", 0.5)
                yield f"{kind}: p50 of {2 * slots} adapters over {slots}", ratio, "x", "bar: 2" * (kind == "even")
        if f"full {slots}" in self.sides:
            yield f"longest wait of {2 * slots} adapters", self.worst(slots), "ms", f"bound: {self.bound(slots):.0f}"
        if "cold alone" in self.sides:
            ratio = self.ratio("cold beside hot", "cold alone", 0.99)
            yield "hot: cold adapters' p99 over the same alone", ratio, "x", "bar: 3"

    def worst(self, slots: int) -> float:
        return max(max(self.waits(side)) for side in self.sides if side.endswith(f" {2 * slots}"))

    def bound(self, slots: int) -> float:
        """Twice the longest answer, with the wait for its first token where no slot has to be waited for."""
        return PATIENCE_S * 1e3 + 2 * (self.longest + max(self.waits(f"full {slots}")))


async def compare(traffic: Traffic, adapters: list[LoRARequest], args: argparse.Namespace) -> Table:
    table, slots = Table(), args.slots
    hot, cold, cold_rate = adapters[0], adapters[1:], args.rate * (1 - HOT_SHARE)
    for number in range(args.rounds):
        for count in (slots, 2 * slots) if "even" in args.only else ():
            some = adapters[:count]
            table.put(f"even {count}", await traffic.by_chance(number, args.rate, lambda c, some=some: c.choice(some)))
        for count in (slots, 2 * slots) if "full" in args.only else ():
            table.put(f"full {count}", await traffic.by_clients(number, adapters[:count], 4 * slots))
        if "hot" in args.only:
            table.put("cold alone", await traffic.by_chance(number, cold_rate, lambda c: c.choice(cold)))
            beside, _ = await asyncio.gather(
                traffic.by_chance(number, cold_rate, lambda c: c.choice(cold)),
                traffic.by_chance(1000 + number, args.rate * HOT_SHARE, lambda _: hot),
            )
            table.put("cold beside hot", beside)
        print(f"# round {number + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    return table


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    adapters = make_adapters(args.adapters_dir, args.model, 2 * args.slots, rank=args.rank)
    double = 2 if args.dtype == "float32" else 1
    engine_args = EngineArgs(
        **started_on(args.adapters_dir, args.model),  # type: ignore[arg-type]
        dtype=args.dtype,
        max_num_seqs=args.seqs,
        max_model_len=2048,
        enable_lora=True,
        max_loras=args.slots,
        max_lora_rank=args.rank,
        max_cpu_loras=2 * args.slots,
        lora_memory=args.slots * shape.adapter_nbytes(args.rank) * double,
        kv_cache_memory=args.seqs * 1024 * shape.kv_nbytes * double,
    )
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        for lora in adapters:
            await engine.add_lora(lora)
        await asyncio.gather(*(ask(engine, [300 + n] * 32, 8, adapters[n % len(adapters)]) for n in range(args.seqs)))
        traffic = Traffic(engine, args)
        table = await compare(traffic, adapters, args)
        check = checked(engine, args.model, traffic.answers)
    rows = list(table.rows(args.slots))
    said = f"{args.model}, {args.dtype}, {args.rate} requests/s, {args.slots} slots, rank {args.rank}"
    tell(args.out / "turns.csv", said, rows, check)
    if "full" in args.only and table.worst(args.slots) > table.bound(args.slots):
        raise SystemExit("LATE")


def main() -> None:
    parser = arguments(__doc__, model="smollm2-135m")
    parser.add_argument(
        "--slots", type=int, default=4, help="adapters on the device at a time; there are twice as many"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seqs", type=int, default=32, help="sequences in a step at most")
    parser.add_argument("--rate", type=float, default=3, help="requests a second, all together")
    parser.add_argument("--only", nargs="+", default=["even", "full", "hot"], choices=["even", "full", "hot"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals on each side of a round")
    parser.add_argument("--inputs", type=between, default=(16, 48))
    parser.add_argument("--outputs", type=between, default=(16, 32))
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(measure(parse(parser)))


if __name__ == "__main__":
    main()
