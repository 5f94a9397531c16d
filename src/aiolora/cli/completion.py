"""`aiolora completion SHELL`: print the script that completes commands and flags."""

import argparse
import sys

from aiolora.errors import MissingExtraError

_SHELLS = ("bash", "zsh", "tcsh")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in a shell",
        description='Bash: eval "$(aiolora completion bash)" in ~/.bashrc. '
        "Zsh: aiolora completion zsh > a folder of $fpath, as _aiolora.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("aiolora completion", "completion") from error
    sys.stdout.write(shtab.complete(args.whole, shell=args.shell) + "\n")
    return 0
