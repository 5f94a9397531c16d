"""The command line. Parsing is quick; torch is imported by the command that needs it."""

import argparse
import sys
from collections.abc import Sequence

from aiolora import __version__
from aiolora.cli import bench, chat, completion, demo, doctor, generate, inspect, key, pull, serve
from aiolora.cli.sources import completed
from aiolora.errors import AioloraError

_COMMANDS = (serve, chat, generate, bench, demo, inspect, pull, doctor, key, completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 1 with one line on stderr for an error of the user's."""
    parser, words = make_parser(), list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser.parse_args(completed(parser, words))
        status: int = args.run(args)
    except AioloraError as error:
        print(f"aiolora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has left, as `head` does
        sys.stderr.close()
        return 141
    return status


def make_parser() -> argparse.ArgumentParser:
    """All commands with their flags."""
    parser = argparse.ArgumentParser(
        prog="aiolora",
        description="One base language model, many LoRA adapters at once.",
        epilog="`aiolora COMMAND --help` says what a command takes; `aiolora doctor` what this machine can do.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aiolora {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.register(commands)
    parser.set_defaults(whole=parser)  # for the command that writes completions of it
    return parser
