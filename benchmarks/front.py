"""What the front costs a chunk: the real app over an engine that only pretends, beside a bare ASGI app, in one run.

    python -m benchmarks.front [--streams 256] [--chunks 200] [--step-ms 20] [--profile FILE]

Each server is a process of its own with the server's settings of `aiolora serve`, the client another one. `free`: every
stream brings its next token as soon as the loop comes round. `paced`: a step wakes all streams, as an engine does.
"""

import argparse
import asyncio
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from aiolora.api import create_app
from aiolora.api.wire import ChatChunk, ChatChunkChoice, ChatDelta
from aiolora.cli.server import config, new_event_loop
from aiolora.config import EngineArgs, ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.core import Snapshot
from aiolora.engine.intake import Intake, Limits, Settled
from aiolora.engine.output import Assembler
from aiolora.lora.registry import AdapterRegistry
from aiolora.media.fetch import Fetcher
from aiolora.media.reader import MediaReader
from aiolora.models.weights import locate
from aiolora.tokenizer import Tokenizer
from aiolora.types import FinishReason, Messages, Prompt, Request, SamplingParams, TokenDelta, TokenOutput
from benchmarks.harness import machine

MODEL = "smollm2-135m"
TOKENS = (28, 357, 253, 1165, 282, 260)  # words of the embedded model
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}


class Clock:
    """When the next token of a stream is there."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._step: asyncio.Future[None] | None = None

    async def tick(self) -> None:
        """Wait for the next step."""
        if not self._step_s:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        if self._step is None or self._step.done():
            step = self._step = loop.create_future()
            at = (loop.time() // self._step_s + 1) * self._step_s
            loop.call_at(at, lambda: None if step.done() else step.set_result(None))
        await asyncio.shield(self._step)


class Pretender(AsyncLLMEngine):
    """An engine without a model. `whole`: its tokens pass the assembler, as an engine's do; else they are made."""

    def __init__(self, chunks: int, clock: Clock, *, whole: bool) -> None:
        super().__init__(EngineArgs(model=MODEL))
        limits = Limits(8192, 49152)
        registry, media = AdapterRegistry(MODEL), MediaReader({}, Fetcher(()), model=MODEL)
        self._intake = Intake(Tokenizer(locate(MODEL)), registry, limits, media, model=MODEL, lora_enabled=False)
        self._chunks, self._clock, self._whole = chunks, clock, whole

    @property
    def started(self) -> bool:
        return True

    @property
    def intake(self) -> Intake:
        return self._intake

    async def start(self, report: object = None) -> None:
        pass

    async def probe(self) -> Snapshot:
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        numbers: dict[str, Any] = dict.fromkeys(Snapshot.__struct_fields__, 1)
        return Snapshot(**numbers | {"resident_adapters": ()})

    async def settle(self, lora: object = None, *, modalities: object = (), permits: object = None) -> Settled:
        return self._intake.settled((), None)

    async def prepare(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        lora: object = None,
        request_id: str | None = None,
        priority: int = 0,
        owner: str | None = None,
    ) -> Request:
        assert isinstance(lora, Settled)
        split = self._intake.media.split(prompt, lora.tokenizer)
        return self._intake.request(split, sampling_params, lora, request_id=request_id)

    async def run(self, assemblers: Sequence[Assembler]) -> AsyncGenerator[list[tuple[int, TokenOutput]], None]:
        [assembler] = assemblers
        for number in range(self._chunks):
            await self._clock.tick()
            end: FinishReason | None = "length" if number == self._chunks - 1 else None
            token = TOKENS[number % len(TOKENS)]
            if self._whole:
                output = assembler.feed(TokenDelta(assembler.request.id, 0, token, -1.0, 1, finish_reason=end))
                assert output is not None
            else:
                output = TokenOutput(text=" word", token_id=token, logprob=-1.0, finish_reason=end)
            yield [(0, output)]


def bare(chunks: int, clock: Clock) -> Any:
    """What nobody can be faster than: the same frames from an ASGI app of its own, without anything around them."""
    encode = msgspec.json.Encoder().encode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for stage in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{stage}.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(chunks + 2):  # as many as the app's: the role, the tokens, the end
            await clock.tick()
            chunk = ChatChunk("chatcmpl-0", 0, MODEL, [ChatChunkChoice(0, ChatDelta(content=" word"))])
            body = b"data: " + encode(chunk) + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


def serve(kind: str, chunks: int, step_s: float, pipe: Connection, profile: str | None) -> None:
    """The process of a server: tells its port, then for each "used" the CPU seconds so far."""
    import uvicorn

    clock = Clock(step_s)
    app = bare(chunks, clock) if kind == "bare" else None
    if app is None:
        app = create_app(Pretender(chunks, clock, whole=kind == "whole"), args=ServerArgs(access_log=False))

    async def main() -> None:
        server = uvicorn.Server(config(app, "127.0.0.1", 0))
        running = asyncio.ensure_future(server.serve())
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        while await asyncio.to_thread(pipe.recv) == "used":
            pipe.send(time.process_time())
        server.should_exit = True
        await running

    def run() -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())

    if profile is None:
        run()
        return
    import cProfile

    cProfile.runctx("run()", {}, {"run": run}, f"{profile}.{kind}")


async def load(port: int, streams: int) -> tuple[int, float]:
    """(Frames received, seconds) of `streams` clients at once."""
    body = msgspec.json.encode(BODY)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        frames = 0
        while data := await reader.read(1 << 16):
            frames += data.count(b"data: {")
        writer.close()
        return frames

    began = time.perf_counter()
    frames = sum(await asyncio.gather(*(one() for _ in range(streams))))
    return frames, time.perf_counter() - began


def measure(kind: str, args: argparse.Namespace, step_s: float, rounds: int) -> tuple[float, float]:
    """(chunks/s, CPU us a chunk) of the server, the medians of `rounds`."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    target = (kind, args.chunks, step_s, theirs, args.profile)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=target)
    process.start()
    port = ours.recv()
    rates, costs = [], []
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for number in range(rounds + 1):
            ours.send("used")
            before = ours.recv()
            frames, seconds = runner.run(load(port, args.streams))
            ours.send("used")
            assert frames >= args.streams * args.chunks, f"{kind}: {frames} frames came"
            if number:  # the first warms up
                rates.append(frames / seconds)
                costs.append(1e6 * (ours.recv() - before) / frames)
            else:
                ours.recv()
    ours.send("end")
    process.join()
    return statistics.median(rates), statistics.median(costs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", help="write profiles of the servers beside this name")
    args = parser.parse_args()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert files > 2 * args.streams, f"{files} open files are allowed, too few for {args.streams} streams"
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; {args.streams} streams x {args.chunks} chunks")
    for mode, step_s in (("free", 0.0), ("paced", args.step_ms / 1e3)):
        found = {kind: measure(kind, args, step_s, args.rounds) for kind in ("bare", "app", "whole")}
        rate, cost = found["bare"]
        for kind, (own_rate, own_cost) in found.items():
            share = f"{own_rate / rate:4.0%} of the rate, {cost / own_cost:4.0%} by CPU"
            print(f"{mode:6} {kind:6} {own_rate:8.0f} chunks/s {own_cost:6.1f} us CPU a chunk   {share}")


if __name__ == "__main__":
    main()
