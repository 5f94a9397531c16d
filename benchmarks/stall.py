"""What loading adapters does to those who are being served: time between tokens with loads and without, in one run.

    python -m benchmarks.stall --model llama-3.1-8b --rank 64 --loads 50 --out results
    python -m benchmarks.stall --model smollm2-135m --streams 8 --loads 20 --round 5 --threads 1 --nice 19 --pause 0.5

Streams over a few resident adapters and the base run all the time; half of it is quiet, in the other half adapters
are loaded one after another, each followed by one token of its own (so that it comes to the device, too). Halves take
turns. `--threads`, `--pause` and `--nice` throttle the loaders, as a machine of few cores wants them.
"""

import argparse
import asyncio
import csv
import os
import random
import sys
import threading
import time

from aiolora import AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams
from aiolora.engine.interpreter import SWITCH_INTERVAL
from aiolora.engine.output import Assembler
from aiolora.lora import compiled, paging
from benchmarks.adapters import make_adapters
from benchmarks.command import arguments, parse
from benchmarks.harness import machine
from benchmarks.online import at
from benchmarks.shapes import SHAPES, started_on

RESIDENT = 4


class Streams:
    """Streams that never end, and the times at which their tokens came."""

    def __init__(self, engine: AsyncLLMEngine, vocab: int, loras: list[LoRARequest | None]) -> None:
        self.gaps: list[tuple[float, float]] = []  # (when, milliseconds since the token before)
        self._engine = engine
        self._vocab = vocab
        self._tasks = [asyncio.ensure_future(self._run(number, lora)) for number, lora in enumerate(loras)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, number: int, lora: LoRARequest | None) -> None:
        chance = random.Random(number)
        params = SamplingParams(temperature=0, max_tokens=self._engine.plan.max_model_len - 100, ignore_eos=True)
        while True:
            ids = [chance.randrange(300, self._vocab) for _ in range(64)]
            request = await self._engine.prepare(ids, params, lora=lora)
            last = None
            async for burst in self._engine.run([Assembler(request, self._engine.intake.tokenizer)]):
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append((now, (now - last) * 1e3 / len(burst)))
                last = now


def throttle(args: argparse.Namespace) -> None:
    """Fewer threads that read adapters, and what other threads leave them.

    On Linux a thread has a niceness of its own, and those that it starts have the same.
    """
    paging._MAX_THREADS = args.threads
    paging.threads.cache_clear()
    threads = paging.threads()
    threads._initializer = lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), args.nice)
    vars(paging)["lay_out"] = lambda *given: threads.submit(compiled.lay_out, *given).result()


async def measure(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    adapters = make_adapters(args.adapters_dir, args.model, RESIDENT + args.loads, rank=args.rank)
    resident, fresh = adapters[:RESIDENT], adapters[RESIDENT:]
    double = 2 if args.dtype == "float32" else 1
    engine_args = EngineArgs(
        **started_on(args.adapters_dir, args.model),  # type: ignore[arg-type]
        dtype=args.dtype,
        max_num_seqs=2 * args.streams,
        max_model_len=2048,
        enable_lora=True,
        max_loras=RESIDENT + 2,
        max_lora_rank=args.rank,
        max_cpu_loras=args.host,
        lora_memory=(RESIDENT + 4) * shape.adapter_nbytes(args.rank) * double,
        kv_cache_memory=2 * args.streams * 2048 * shape.kv_nbytes * double,
    )
    took: list[float] = []
    throttle(args)
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        sys.setswitchinterval(args.switch / 1e3)
        kinds = [None, *resident]
        streams = Streams(engine, shape.vocab, [kinds[number % len(kinds)] for number in range(args.streams)])
        await asyncio.sleep(args.settle)
        quiet: list[float] = []
        loading: list[float] = []
        for start in range(0, args.loads, args.round):
            begun = time.perf_counter()
            for lora in fresh[start : start + args.round]:
                before = time.perf_counter()
                await engine.add_lora(lora)
                took.append((time.perf_counter() - before) * 1e3)
                await engine.generate([300], SamplingParams(max_tokens=1), lora=lora)
                await asyncio.sleep(args.pause)
            turned = time.perf_counter()
            await asyncio.sleep(turned - begun)
            ended = time.perf_counter()
            loading += [gap for when, gap in streams.gaps if begun <= when < turned]
            quiet += [gap for when, gap in streams.gaps if turned <= when < ended]
        await streams.stop()
    shares = (0.5, 0.9, 0.99, 0.999)
    rows = [(f"between tokens, p{share * 100:g}", at(quiet, share), at(loading, share)) for share in shares]
    with (args.out / "stall.csv").open("w", newline="") as stream:
        stream.write(f"# {machine()}, {args.model}, {args.dtype}, {args.streams} streams, rank {args.rank}\n")
        csv.writer(stream).writerows([("name", "quiet_ms", "loading_ms"), *rows])
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}, {args.model}, {args.streams} streams, "
          f"{args.loads} loads of rank {args.rank}, {args.threads} threads at {args.nice}, pause {args.pause} s, "
          f"switch {args.switch} ms, {args.host} in host memory, "
          f"{shape.adapter_nbytes(args.rank) / 1e6:.0f} MB each: one takes {at(took, 0.5):.0f} ms")  # fmt: skip
    for name, without, with_ in rows:
        print(f"{name:30} quiet {without:8.2f} ms, loading {with_:8.2f} ms, {100 * with_ / without - 100:+.1f} %")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--loads", type=int, default=50)
    parser.add_argument("--round", type=int, default=10, help="loads before a quiet while of the same length")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--host", type=int, default=32, help="adapters kept in host memory")
    parser.add_argument("--threads", type=int, default=paging._MAX_THREADS, help="that read an adapter")
    parser.add_argument("--nice", type=int, default=0, help="niceness of those threads, up to 19")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two loads")
    parser.add_argument("--switch", type=float, default=SWITCH_INTERVAL * 1e3, help="Python's, ms")
    parser.add_argument("--settle", type=float, default=3.0, help="seconds before measuring")
    asyncio.run(measure(parse(parser)))


if __name__ == "__main__":
    main()
