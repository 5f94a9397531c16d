"""`aiolora generate MODEL --prompt ...`: answers on the terminal; or a batch, lines of JSON in and out."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from aiolora.cli.batch import answer_all, read
from aiolora.cli.flags import add_engine_flags, engine_args, lora_modules
from aiolora.cli.start import started
from aiolora.config import EngineArgs
from aiolora.errors import ConfigError
from aiolora.types import LoRARequest, SamplingParams


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="answer prompts on the terminal, or a batch of lines of JSON",
        description='A line of a batch is {"prompt": ... or "messages": ..., "id": ..., "lora": ..., "max_tokens": '
        "...}; its answer is a line of the output, in the same order. Exit status 1: some failed.",
        allow_abbrev=False,
    )
    add_engine_flags(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again (default: stdin)")
    group.add_argument("--input", metavar="FILE", help="a batch, - for stdin")
    group.add_argument("--output", metavar="FILE", type=Path, help="of a batch (default: stdout)")
    group.add_argument("--lora", metavar="NAME", help="answer with this adapter of --lora-modules")
    group.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    group.add_argument("--max-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument("--sampling-seed", type=int, default=None, help="same seed, same tokens")
    group.add_argument("--stop", nargs="+", default=(), help="strings that end an answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer each prompt in turn, every token as it comes; or all lines of a batch side by side."""
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.sampling_seed,
        stop=args.stop,
    )
    said, modules = engine_args(args), lora_modules(args.lora_modules)
    if args.lora is not None and args.lora not in [module.lora_name for module in modules]:
        raise ConfigError(f"--lora {args.lora}: --lora-modules names no such adapter")
    if args.input is not None and args.prompt:
        raise ConfigError("--prompt and --input: give one of them")

    if args.input is not None:
        return _batch(said, modules, args, params)

    async def answer() -> None:
        async with started(said, modules, quiet=True) as engine:
            for prompt in args.prompt or [sys.stdin.read()]:
                asked = [{"role": "user", "content": prompt}] if args.chat else prompt
                async for token in engine.stream(asked, params, lora=args.lora):
                    print(token.text, end="", flush=True)
                print()

    asyncio.run(answer())
    return 0


def _batch(said: EngineArgs, modules: Sequence[LoRARequest], args: argparse.Namespace, params: SamplingParams) -> int:
    with ExitStack() as files:
        try:
            source = sys.stdin if args.input == "-" else files.enter_context(open(args.input))
            lines = list(read(source, "stdin" if args.input == "-" else args.input))  # a wrong one is told at once
            out = sys.stdout if args.output is None else files.enter_context(open(args.output, "w"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(str(error)) from None

        async def answer() -> int:
            async with started(said, modules, quiet=True) as engine:
                return await answer_all(engine, lines, params, args.lora, out)

        return 1 if asyncio.run(answer()) else 0
