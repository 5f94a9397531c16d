"""`aiolora chat MODEL | --url URL`: a conversation on the terminal, with whichever adapter."""

import argparse
import asyncio
import contextlib
import importlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Protocol

import msgspec
from rich.console import Console

from aiolora.cli.client import Server
from aiolora.cli.flags import add_engine_flags, engine_args, lora_modules
from aiolora.cli.start import started
from aiolora.errors import AioloraError, ConfigError
from aiolora.types import Messages, SamplingParams

if TYPE_CHECKING:
    from aiolora.engine.async_engine import AsyncLLMEngine

_HELP = """/adapter NAME   answer with this adapter; /adapter alone: with the base
/adapters       what can be named
/system TEXT    begin again, under these instructions
/clear          begin again
/quit           leave (or Ctrl-D); Ctrl-C stops an answer"""


class Partner(Protocol):
    """Who answers."""

    async def models(self) -> list[str]:
        """What can be named, the base first."""
        ...

    def answer(self, messages: Messages, model: str) -> AsyncIterator[str]:
        """The next turn, piece by piece."""
        ...


class _Engine:
    """An engine of our own."""

    def __init__(self, engine: "AsyncLLMEngine", params: SamplingParams) -> None:
        self._engine = engine
        self._params = params

    async def models(self) -> list[str]:
        return [self._engine.args.model, *self._engine.intake.registry.names()]

    async def answer(self, messages: Messages, model: str) -> AsyncIterator[str]:
        async for token in self._engine.stream(messages, self._params, lora=model):
            yield token.text


class _Remote:
    """A server."""

    def __init__(self, server: Server, params: SamplingParams) -> None:
        self._server = server
        self._params = params

    async def models(self) -> list[str]:
        return await self._server.models()

    async def answer(self, messages: Messages, model: str) -> AsyncIterator[str]:
        body = {
            "model": model,
            "messages": messages,
            "stream": True,
            "max_tokens": self._params.max_tokens,
            "temperature": self._params.temperature,
        }
        async with aclosing(self._server.stream("/v1/chat/completions", body)) as events:
            async for event in events:
                for choice in msgspec.json.decode(event)["choices"]:
                    yield choice["delta"].get("content") or ""


class Conversation:
    """What has been said, and with whom. `say` writes to the terminal."""

    def __init__(self, partner: Partner, models: list[str], say: Callable[[str], None]) -> None:
        self.model = models[0]
        self._models = models
        self._partner = partner
        self._say = say
        self._messages: Messages = []

    async def hear(self, line: str) -> bool:
        """Do what a line asks for; False: it was goodbye."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/adapter":
            await self._switch(rest)
        elif command == "/adapters":
            self._models = await self._partner.models()
            self._say("\n".join(f"{'*' if name == self.model else ' '} {name}" for name in self._models) + "\n")
        elif command in ("/clear", "/system"):
            self._messages = [{"role": "system", "content": rest}] if rest else []
        elif command.startswith("/"):
            self._say(_HELP + "\n")
        elif line.strip():
            await self._answer(line)
        return True

    async def _switch(self, name: str) -> None:
        self._models = await self._partner.models()
        if name and name not in self._models:
            self._say(f"no {name!r} here; there are: {', '.join(self._models)}\n")
        else:
            self.model = name or self._models[0]

    async def _answer(self, line: str) -> None:
        """Stream the next turn. It is kept as far as it came, however it ends."""
        self._messages.append({"role": "user", "content": line})
        began, text, pieces = time.perf_counter(), "", 0
        try:
            async for piece in self._partner.answer(list(self._messages), self.model):
                text += piece
                pieces += 1
                self._say(piece)
        except AioloraError as error:
            self._say(f"[{error}]")
        finally:
            if text:
                self._messages.append({"role": "assistant", "content": text})
            else:
                self._messages.pop()
        self._say(f"\n[{pieces / (time.perf_counter() - began):.0f} tokens/s]\n")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "chat",
        help="talk on the terminal; /adapter NAME switches",
        description="With a MODEL an engine of its own is started; with --url the server there answers.\n\n" + _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_engine_flags(parser, model="smollm2-135m")
    group = parser.add_argument_group("chat")
    group.add_argument("--url", help="of a running server, such as http://localhost:8000, in place of MODEL")
    group.add_argument("--key", help="the server's API key")
    group.add_argument("--adapter", metavar="NAME", help="answer with this adapter from the start")
    group.add_argument("--max-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.7, help="0: greedy (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until goodbye."""
    console = Console(highlight=False)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)
    with asyncio.Runner() as runner:
        return _talk(runner, args, params, console)


def _talk(runner: asyncio.Runner, args: argparse.Namespace, params: SamplingParams, console: Console) -> int:
    """Lines are read while the loop stands still, so that Ctrl-C stops an answer and not the conversation."""
    stack = AsyncExitStack()

    async def meet() -> Conversation:
        partner: Partner
        if args.url is not None:
            partner = _Remote(Server(args.url, args.key), params)
        else:
            engine = started(engine_args(args), lora_modules(args.lora_modules), quiet=True)
            partner = _Engine(await stack.enter_async_context(engine), params)
        models = await partner.models()
        talk = Conversation(partner, models, lambda text: console.print(text, end="", markup=False, soft_wrap=True))
        if args.adapter is not None:
            if args.adapter not in models:
                raise ConfigError(f"--adapter {args.adapter}: there are {', '.join(models)}")
            talk.model = args.adapter
        return talk

    talk = runner.run(meet())
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # arrows bring back what was typed
        if console.is_terminal:
            console.print("/help says what can be done here", style="dim")
        while True:
            try:
                line = input(f"{talk.model}> ")
            except (EOFError, KeyboardInterrupt):
                return 0
            try:
                if not runner.run(talk.hear(line)):
                    return 0
            except KeyboardInterrupt:
                console.print("\n[stopped]", markup=False)
    finally:
        runner.run(stack.aclose())
