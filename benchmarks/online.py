"""Arrivals by chance over AsyncLLMEngine: time to first token, time between tokens, steps that take too long.

    python -m benchmarks.online --model llama-3.1-8b --seconds 60 --rate 20 --out results

Poisson arrivals, 64 adapters (zipf 1.0) over 16 slots, 128 to 512 tokens in, 64 to 128 out. Steps are timed in the
engine's thread; one that takes over three times the median is looked at: did an adapter come in it, did a prompt end?
A step's time has the launch of the next one in it, so that of a prompt which is not a graph's, too.
"""

import argparse
import asyncio
import csv
import random
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.core import Engine
from aiolora.engine.output import Assembler
from aiolora.types import TokenDelta
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, between, parse, tell
from benchmarks.reference import Check
from benchmarks.session import core_of, reference_of
from benchmarks.shapes import SHAPES, started_on


@dataclass
class Step:
    """One step of the engine as its thread saw it."""

    ms: float
    tokens: int  # it brought
    firsts: int  # answers that it began: a prompt ended in it
    adapters: int  # whose bytes were sent to the device in it
    prompt: bool = False  # one ended in it, or in the next step, which it launched


@dataclass
class Watch:
    """Wraps an engine's `step` and its store's `write`."""

    steps: list[Step] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)
    _arrived: int = 0

    def attach(self, engine: Engine) -> None:
        inner, ended = engine.step, 0.0

        def step() -> list[TokenDelta]:
            nonlocal ended
            started = time.perf_counter()
            deltas = inner()
            now = time.perf_counter()
            since = ended if started - ended < 0.002 else started  # what lies between two steps belongs to the second
            ended = now
            new = {delta.request_id for delta in deltas} - self._known
            self._known |= new
            if deltas:
                if new and self.steps:
                    self.steps[-1].prompt = True
                self.steps.append(Step((now - since) * 1e3, len(deltas), len(new), self._arrived, bool(new)))
                self._arrived = 0
            return deltas

        engine.step = step  # type: ignore[method-assign]
        store = engine.adapters._store
        assert store is not None
        write = store.write

        def written(weights, pages):  # type: ignore[no-untyped-def]
            self._arrived += 1
            return write(weights, pages)

        store.write = written  # type: ignore[method-assign]


@dataclass
class Answer:
    """One request as its client saw it."""

    ttft_ms: float
    gaps_ms: list[float]
    output: RequestOutput


async def ask(engine: AsyncLLMEngine, ids: list[int], outputs: int, lora: LoRARequest | str) -> Answer:
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
    assembler = Assembler(await engine.prepare(ids, params, lora=lora), engine.intake.tokenizer)
    times: list[float] = []
    async for burst in engine.run([assembler]):
        times += [time.perf_counter()] * len(burst)
    gaps = [(after - before) * 1e3 for before, after in pairwise(times)]
    return Answer((times[0] - start) * 1e3, gaps, assembler.output())


async def drive(args: argparse.Namespace, adapters: list[LoRARequest], engine: AsyncLLMEngine) -> list[Answer]:
    chance, vocab = random.Random(args.seed), SHAPES[args.model].vocab
    weights = [1 / place for place in range(1, len(adapters) + 1)]
    tasks: list[asyncio.Task[Answer]] = []
    start = due = time.perf_counter()
    while due < start + args.seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        ids = [chance.randrange(300, vocab) for _ in range(chance.randint(*args.inputs))]
        (lora,) = chance.choices(adapters, weights)
        tasks.append(asyncio.ensure_future(ask(engine, ids, chance.randint(*args.outputs), lora)))
        due += chance.expovariate(args.rate)
    return await asyncio.gather(*tasks)


def at(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def report(answers: list[Answer], steps: list[Step], took: float) -> list[tuple[str, float, str]]:
    middle = statistics.median(step.ms for step in steps)
    long = [step for step in steps if step.ms > 3 * middle]
    decoding = [step for step in steps if not step.prompt]
    plain = [step.ms for step in decoding]
    arriving = [step.ms for step in decoding if step.adapters]
    ttft = [answer.ttft_ms for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_ms]
    return [
        ("requests", len(answers), ""),
        ("output tokens", sum(step.tokens for step in steps) / took, "tokens/s"),
        *((f"time to first token, p{share}", at(ttft, share / 100), "ms") for share in (50, 90, 99)),
        *((f"between tokens, p{share}", at(gaps, share / 100), "ms") for share in (50, 90, 99)),
        ("between tokens, max", max(gaps, default=float("nan")), "ms"),
        ("step, median", middle, "ms"),
        ("step, p99", at([step.ms for step in steps], 0.99), "ms"),
        ("decode-only step, p99", at(plain, 0.99), "ms"),
        ("decode-only step with an adapter coming, median", at(arriving, 0.5), "ms"),
        ("steps", len(steps), ""),
        ("adapters sent to the device", sum(step.adapters for step in steps), ""),
        ("steps over 3x the median", len(long), ""),
        ("  of them with a prompt's end", sum(step.firsts > 0 for step in long), ""),
        ("  of them that launched such a step", sum(step.prompt and not step.firsts for step in long), ""),
        (
            "  of them with an adapter coming and no prompt",
            sum(step.adapters > 0 and not step.prompt for step in long),
            "",
        ),
        ("  of them decode only", sum(not step.prompt for step in long), ""),
        ("longest decode-only step", max(plain, default=float("nan")), "ms"),
    ]


def checked(engine: AsyncLLMEngine, model: str, answers: list[Answer]) -> Check:
    """Some of `answers`, drawn by chance, against the reference."""
    picked = random.Random(0).sample(answers, min(4, len(answers)))
    outputs = [answer.output for answer in picked]
    return reference_of(engine, model).check(outputs, [output.lora_request for output in outputs])


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    adapters = make_adapters(args.adapters_dir, args.model, args.adapters)
    room = args.slots * shape.adapter_nbytes(16) * (2 if args.dtype == "float32" else 1)
    engine_args = EngineArgs(
        **started_on(args.adapters_dir, args.model),  # type: ignore[arg-type]
        dtype=args.dtype,
        max_num_seqs=256,
        max_model_len=2048,
        enable_lora=True,
        max_loras=args.slots,
        max_lora_rank=16,
        max_cpu_loras=args.adapters,
        lora_memory=room,
        kv_cache_memory=256 * 1024 * shape.kv_nbytes * (2 if args.dtype == "float32" else 1),
    )
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        for lora in [] if args.cold else adapters:
            await engine.add_lora(lora)
        await asyncio.gather(*(ask(engine, [300 + n] * 64, 8, adapters[n % args.adapters]) for n in range(32)))
        watch = Watch()
        watch.attach(core_of(engine))
        start = time.perf_counter()
        answers = await drive(args, adapters, engine)
        rows = report(answers, watch.steps, time.perf_counter() - start)
        check = checked(engine, args.model, answers)
    with (args.out / "online_steps.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["ms", "tokens", "firsts", "adapters"])
        lines.writerows([f"{step.ms:.3f}", step.tokens, step.firsts, step.adapters] for step in watch.steps)
    said = f"{args.model}, {args.dtype}, {args.rate} requests/s, {args.adapters} adapters, {args.slots} slots"
    tell(args.out / "online.csv", said, rows, check)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16, help="adapters on the device at a time")
    parser.add_argument("--inputs", type=between, default=(128, 512))
    parser.add_argument("--outputs", type=between, default=(64, 128))
    parser.add_argument("--cold", action="store_true", help="adapters are read from disk as they come")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(measure(parse(parser)))


if __name__ == "__main__":
    main()
