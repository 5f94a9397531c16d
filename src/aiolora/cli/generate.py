"""`aiolora generate MODEL --prompt ...`: answers on the terminal, streamed."""

import argparse
import sys

from aiolora.cli.flags import add_engine_flags, engine_args, lora_modules
from aiolora.errors import ConfigError
from aiolora.types import SamplingParams


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("generate", help="answer prompts on the terminal", allow_abbrev=False)
    add_engine_flags(parser)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", action="append", default=[], help="a prompt; may be given again (default: stdin)")
    group.add_argument("--lora", metavar="NAME", help="answer with this adapter of --lora-modules")
    group.add_argument("--chat", action="store_true", help="put each prompt through the chat template")
    group.add_argument("--max-tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--sampling-seed", type=int, default=None)
    group.add_argument("--stop", nargs="+", default=(), help="strings that end an answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer each prompt in turn, every token as it comes."""
    import asyncio

    from aiolora.engine.async_engine import AsyncLLMEngine

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

    async def answer() -> None:
        async with AsyncLLMEngine.from_engine_args(said) as engine:
            for module in modules:
                await engine.add_lora(module)
            for prompt in args.prompt or [sys.stdin.read()]:
                asked = [{"role": "user", "content": prompt}] if args.chat else prompt
                async for token in engine.stream(asked, params, lora=args.lora):
                    print(token.text, end="", flush=True)
                print()

    asyncio.run(answer())
    return 0
