"""`aiolora demo`: every adapter of a folder and the base answer the same prompts, side by side, from one batch."""

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from aiolora.errors import AdapterError, ConfigError
from aiolora.types import LoRARequest, SamplingParams

PROMPTS = (
    "Tell me about a cat.",
    "CREATE TABLE boats (captain TEXT, crew INT, harbor TEXT, length INT)\n"
    "Which boats have crew greater than 12? Show the captain.",
    "Clara is 47 years old, works as a dentist and lives in Lisbon.",
)


@dataclass
class _Stream:
    """One prompt to one model, as it comes."""

    prompt: str
    adapter: str | None
    text: str = ""
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    reason: str = ""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("demo", help="base and adapters side by side, from one batch", allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", help="the base model (default: %(default)s)")
    parser.add_argument(
        "--adapters", type=Path, default=Path("examples/adapters"), help="folder of adapters (default: %(default)s)"
    )
    parser.add_argument("--prompt", action="append", help="a prompt of your own; may be given again")
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Stream everything at once, then print a table of what each stream took."""
    folders = sorted(path.parent for path in args.adapters.glob("*/adapter_config.json"))
    if not folders:
        raise ConfigError(f"--adapters {args.adapters}: no folder in it holds an adapter_config.json")
    asyncio.run(_demo(args, folders, Console()))
    return 0


async def _demo(args: argparse.Namespace, folders: list[Path], console: Console) -> None:
    from aiolora.config import EngineArgs
    from aiolora.engine.async_engine import AsyncLLMEngine

    console.print(f"loading {args.model} (the first time it is fetched and converted) ...")
    began = time.perf_counter()
    engine_args = EngineArgs(
        model=args.model, enable_lora=True, max_loras=max(8, len(folders)), max_num_seqs=64, max_model_len=2048
    )
    async with AsyncLLMEngine.from_engine_args(engine_args) as engine:
        console.print(f"loaded in {time.perf_counter() - began:.1f} s on {engine.plan.device}")
        served: list[str | None] = [None]
        for number, folder in enumerate(folders, start=1):
            try:
                version = await engine.add_lora(LoRARequest(folder.name, number, str(folder)))
                console.print(f"adapter {version.label}: rank {version.rank}, {version.nbytes / 2**20:.1f} MiB")
                served.append(folder.name)
            except AdapterError as error:
                console.print(f"refused: {error}")
        streams = [_Stream(prompt, adapter) for prompt in args.prompt or PROMPTS for adapter in served]
        params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
        start = time.perf_counter()

        async def follow(stream: _Stream) -> None:
            messages: list[dict[str, object]] = [{"role": "user", "content": stream.prompt}]
            async for token in engine.stream(messages, params, lora=stream.adapter):
                now = time.perf_counter() - start
                stream.first_s = stream.first_s or now
                stream.last_s = now
                stream.tokens += 1
                stream.text += token.text
                stream.reason = token.finish_reason or ""

        with Live(console=console, refresh_per_second=10, transient=True) as live:
            tasks = [asyncio.ensure_future(follow(stream)) for stream in streams]
            while not all(task.done() for task in tasks):
                live.update(_side_by_side(streams))
                await asyncio.wait(tasks, timeout=0.1)
            await asyncio.gather(*tasks)
        console.print(_side_by_side(streams))
        console.print(_figures(streams))
        total, seconds = sum(s.tokens for s in streams), max(s.last_s for s in streams)
        console.print(
            f"{len(streams)} streams over base and {len(served) - 1} adapters in one batch: "
            f"{total} tokens in {seconds:.2f} s, {total / seconds:.0f} tokens/s"
        )
    modules = " ".join(f"{folder.name}={folder}" for folder in folders if folder.name in served)
    console.print(
        "\nThe same on a page, with prompts of your own:\n"
        f"  {sys.argv[0]} serve {args.model} --lora-modules {modules}\n"
        "then open http://127.0.0.1:8000/",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _side_by_side(streams: list[_Stream]) -> Table:
    """A row a prompt, a column a model."""
    adapters = list(dict.fromkeys(stream.adapter for stream in streams))
    table = Table("prompt", *(adapter or "base" for adapter in adapters), show_lines=True, expand=True)
    for prompt in dict.fromkeys(stream.prompt for stream in streams):
        answers = [stream.text.strip() for stream in streams if stream.prompt == prompt]
        table.add_row(prompt, *answers)
    return table


def _figures(streams: list[_Stream]) -> Table:
    """Tokens, time to the first, pace, of each stream."""
    table = Table("model", "prompt", "tokens", "first token ms", "tokens/s", "ended by")
    for stream in streams:
        pace = (stream.tokens - 1) / (stream.last_s - stream.first_s) if stream.tokens > 1 else 0.0
        short = " ".join(stream.prompt.split())[:32]
        first, rate = f"{stream.first_s * 1e3:.0f}", f"{pace:.1f}"
        table.add_row(stream.adapter or "base", short, str(stream.tokens), first, rate, stream.reason)
    return table
