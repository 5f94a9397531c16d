"""`aiolora key`: a new API key, and the hash that a config file may hold in its place."""

import argparse
import secrets
from hashlib import sha256


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("key", help="make an API key and its hash", allow_abbrev=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print both: the key for who asks, the hash for `api-key` or `admin-key` of the server."""
    key = f"ak-{secrets.token_urlsafe(32)}"
    print(f"key   {key}\nhash  sha256:{sha256(key.encode()).hexdigest()}")
    return 0
