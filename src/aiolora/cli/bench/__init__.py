"""`aiolora bench serve | throughput | latency`: how fast it is, by the clock of who asks."""

import argparse
import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import Progress

from aiolora.cli.bench.report import percentile, show, summary, write_csv
from aiolora.cli.bench.workload import Ask, Outcome, Send, drive, workload
from aiolora.cli.client import Server
from aiolora.cli.flags import add_engine_flags, engine_args, lora_modules
from aiolora.cli.start import started
from aiolora.errors import ConfigError, MissingExtraError
from aiolora.types import SamplingParams

if TYPE_CHECKING:
    from aiolora.engine.async_engine import AsyncLLMEngine


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its three."""
    parser = commands.add_parser("bench", help="measure a server, or an engine of its own", allow_abbrev=False)
    kinds = parser.add_subparsers(title="what", required=True, metavar="WHAT")
    serve = kinds.add_parser("serve", help="a running server: requests that arrive at random times", allow_abbrev=False)
    group = serve.add_argument_group("server")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    group.add_argument("--key", help="its API key")
    group.add_argument(
        "--models", nargs="+", metavar="NAME", help="base and adapters to ask for (default: every adapter it lists)"
    )
    _add_workload(serve, requests=100)
    group = serve.add_argument_group("arrivals")
    group.add_argument("--rate", type=float, default=math.inf, help="requests a second, Poisson (default: all at once)")
    group.add_argument("--at-once", type=int, help="requests under way at most")
    serve.set_defaults(run=_serve)
    throughput = kinds.add_parser("throughput", help="an engine of its own: everything at once", allow_abbrev=False)
    add_engine_flags(throughput, model="smollm2-135m")
    _add_workload(throughput, requests=100)
    throughput.set_defaults(run=_throughput)
    latency = kinds.add_parser("latency", help="an engine of its own: one batch, again and again", allow_abbrev=False)
    add_engine_flags(latency, model="smollm2-135m")
    _add_workload(latency, requests=8)
    latency.add_argument_group("rounds").add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    latency.set_defaults(run=_latency)


def _add_workload(parser: argparse.ArgumentParser, *, requests: int) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--num-requests", type=int, default=requests, help="(default: %(default)s)")
    group.add_argument("--input-len", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    group.add_argument("--output-len", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    group.add_argument(
        "--popularity",
        choices=("distinct", "uniform", "zipf", "identical"),
        default="distinct",
        help="of the adapters: each in turn, by chance, few asked for most, or only the first (default: %(default)s)",
    )
    group.add_argument("--workload-seed", type=int, default=0, help="same seed, same requests (default: %(default)s)")
    group = parser.add_argument_group("report")
    group.add_argument("--csv", type=Path, metavar="FILE", help="a line a request")
    group.add_argument("--json", type=Path, metavar="FILE", help="every figure")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="pictures; needs the extra plots")


def _serve(args: argparse.Namespace) -> int:
    server = Server(args.url, args.key)

    async def measure() -> tuple[list[Outcome], float]:
        listed = args.models or await server.models()
        models = listed if args.models else listed[1:] or listed
        asks = _asks(args, models, rate=args.rate)
        send = _to_server(server)
        await drive(asks[:1], send)  # the first brings what is made once
        return await _timed(asks, send, at_once=args.at_once)

    return _tell(args, *asyncio.run(measure()))


def _throughput(args: argparse.Namespace) -> int:
    async def measure(engine: "AsyncLLMEngine", models: Sequence[str]) -> tuple[list[Outcome], float]:
        asks, send = _asks(args, models), _to_engine(engine)
        await drive(_asks(args, models)[: len(models)], send)
        return await _timed(asks, send)

    return _tell(args, *_with_engine(args, measure))


def _latency(args: argparse.Namespace) -> int:
    async def measure(engine: "AsyncLLMEngine", models: Sequence[str]) -> tuple[list[Outcome], float]:
        send, outcomes, rounds = _to_engine(engine), [], []
        await drive(_asks(args, models), send)
        for number in range(args.rounds):
            args.workload_seed += 1  # else the prefix cache has every prompt
            found, seconds = await _timed(_asks(args, models), send)
            outcomes += found
            rounds.append(seconds)
            Console(stderr=True).print(f"round {number + 1}: {seconds * 1e3:.1f} ms")
        print(f"batch of {args.num_requests}: {percentile(rounds, 50) * 1e3:.1f} ms (median of {args.rounds} rounds)")
        return outcomes, sum(rounds)

    return _tell(args, *_with_engine(args, measure))


def _with_engine(
    args: argparse.Namespace,
    measure: Callable[["AsyncLLMEngine", Sequence[str]], Awaitable[tuple[list[Outcome], float]]],
) -> tuple[list[Outcome], float]:
    said, modules = engine_args(args), lora_modules(args.lora_modules)

    async def run() -> tuple[list[Outcome], float]:
        async with started(said, modules) as engine:
            for module in modules:
                await engine.resolve_lora(module.lora_name)  # none is read while the clock runs
            return await measure(engine, [module.lora_name for module in modules] or [args.model])

    return asyncio.run(run())


def _asks(args: argparse.Namespace, models: Sequence[str], rate: float = math.inf) -> list[Ask]:
    if min(args.num_requests, args.input_len, args.output_len) < 1 or not rate > 0:
        raise ConfigError("--num-requests, --input-len, --output-len and --rate must be over 0")
    return workload(
        models,
        count=args.num_requests,
        popularity=args.popularity,
        input_len=args.input_len,
        output_len=args.output_len,
        rate=rate,
        seed=args.workload_seed,
    )


async def _timed(asks: Sequence[Ask], send: Send, at_once: int | None = None) -> tuple[list[Outcome], float]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=len(asks))
        began = time.perf_counter()
        outcomes = await drive(asks, send, at_once=at_once, done=lambda: bar.advance(task))
        return outcomes, time.perf_counter() - began


def _to_server(server: Server) -> Send:
    async def send(ask: Ask) -> AsyncIterator[int]:
        body = {
            "model": ask.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "min_tokens": ask.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        async with aclosing(server.stream("/v1/completions", body)) as events:
            async for event in events:
                if b'"choices":[]' not in event:
                    yield 1

    return send


def _to_engine(engine: "AsyncLLMEngine") -> Send:
    async def send(ask: Ask) -> AsyncIterator[int]:
        params = SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True, temperature=0)
        async for _ in engine.stream(ask.prompt, params, lora=ask.model):
            yield 1

    return send


def _tell(args: argparse.Namespace, outcomes: list[Outcome], seconds: float) -> int:
    figures = summary(outcomes, seconds, args.input_len)
    show(figures, outcomes, Console(highlight=False))
    if args.csv is not None:
        write_csv(args.csv, outcomes)
    if args.json is not None:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")
    if args.plot is not None and figures["failed"] < len(outcomes):
        try:
            from aiolora.cli.bench.plots import draw
        except ImportError as error:
            raise MissingExtraError("--plot", "plots") from error
        title = f"{len(outcomes)} requests, {figures['output_tokens_per_s']:.0f} output tokens/s"
        draw(args.plot, outcomes, title)
    return 1 if figures["failed"] else 0
