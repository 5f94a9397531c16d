"""`aiolora serve MODEL`: the OpenAI-compatible server."""

import argparse
import asyncio

from msgspec.structs import fields

from aiolora.cli.flags import add_engine_flags, add_flags, engine_args, lora_modules, lora_policies, server_args
from aiolora.cli.logs import set_up_logging
from aiolora.cli.start import started
from aiolora.config import ServerArgs
from aiolora.errors import ConfigError, MissingExtraError


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("serve", help="serve the OpenAI API over HTTP", allow_abbrev=False)
    add_engine_flags(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    group.add_argument("--served-model-name", help="name of the base model in the API (default: MODEL)")
    add_flags(group, ServerArgs, [field.name for field in fields(ServerArgs)])
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of the log on stderr (default: %(default)s)"
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30,
        metavar="SECONDS",
        help="for requests under way after SIGTERM; new ones get 503 meanwhile (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, then serve until SIGINT or SIGTERM; open streams get `--shutdown-timeout` to end."""
    try:
        from aiolora.api import create_app
        from aiolora.cli.server import Server, config, new_event_loop
    except ImportError as error:
        raise MissingExtraError("aiolora serve", "server") from error
    set_up_logging(args.log_format)
    said, modules = engine_args(args), lora_modules(args.lora_modules)
    settings, base = server_args(args), args.served_model_name or args.model
    policies = lora_policies(args.lora_modules)
    if base in [module.lora_name for module in modules]:
        raise ConfigError(f"--lora-modules: {base!r} is the name of the base model; choose another")

    async def serve() -> None:
        async with started(said, modules, policies=policies) as engine:
            app = create_app(engine, served_model_name=base, args=settings)
            await Server(config(app, args.host, args.port), app, args.shutdown_timeout).serve()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())
    return 0
