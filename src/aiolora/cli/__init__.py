"""The command line. Parsing is quick; torch is imported by the command that needs it."""

import argparse
import sys
from collections.abc import Sequence

from aiolora import __version__
from aiolora.cli import demo, generate, inspect, pull, serve
from aiolora.cli.sources import with_sources
from aiolora.errors import AioloraError

_COMMANDS = (serve, generate, inspect, pull, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 with one line on stderr for an error of the user's."""
    parser = argparse.ArgumentParser(
        prog="aiolora", description="One base language model, many LoRA adapters at once.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"aiolora {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in commands.choices:
            words[1:] = with_sources(commands.choices[words[0]], words[1:])
        args = parser.parse_args(words)
        status: int = args.run(args)
    except AioloraError as error:
        print(f"aiolora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
