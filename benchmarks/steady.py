"""Decode steps in a steady state: a batch that has begun, stepped and timed through the engine's own step."""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from msgspec import structs

from aiolora import LoRARequest, RequestOutput, SamplingParams
from aiolora.engine.output import Assembler
from benchmarks.session import Session

BANDWIDTH = 4.29e12  # bytes a second that one H200 reads
_ids = itertools.count(10**9)


class Steady:
    """Sequences that all decode; `step` brings each one token further."""

    def __init__(self, session: Session, assemblers: dict[str, Assembler], length: int) -> None:
        self._session = session
        self._assemblers = assemblers
        self._length = length

    def step(self, count: int = 1) -> float:
        """Seconds of `count` steps."""
        start = time.perf_counter()
        for _ in range(count):
            self._session.llm.engine.advance()
        return time.perf_counter() - start

    def outputs(self) -> list[RequestOutput]:
        """The answers so far, by the order of the requests."""
        return [assembler.output() for assembler in self._assemblers.values()]

    def kv_tokens(self) -> int:
        """Tokens whose keys and values a step reads now."""
        return sum(self._length + len(output.outputs[0].token_ids) for output in self.outputs())


@contextmanager
def decoding(
    session: Session, loras: Sequence[str | LoRARequest | None], *, length: int = 16, warm: int = 8
) -> Iterator[Steady]:
    """A request for each of `loras`, past its prompt and `warm` steps; all are aborted at the end."""
    engine, names = session.llm.engine, [f"steady-{next(_ids)}" for _ in loras]
    params = SamplingParams(temperature=0, max_tokens=1024, ignore_eos=True)
    for name, prompt, lora in zip(names, session.prompts(len(loras), length), loras):
        engine.add_request(name, prompt, params, lora)
    begun: dict[str, Assembler] = {}
    while len(begun) < len(names):
        begun |= {assembler.request.id: assembler for assembler in engine.advance()}
    steady = Steady(session, {name: begun[name] for name in names}, length)
    steady.step(warm)
    try:
        yield steady
    finally:
        for name in names:
            engine.abort_request(name)
        while session.core.has_work:
            session.core.step()


def publish(session: Session, files: Sequence[LoRARequest], count: int) -> list[LoRARequest]:
    """`count` adapters by name, each with its own pages on the device, of the bytes of the few in `files`."""
    engine = session.llm.engine
    read = [session.weights_of(request) for request in files]
    made = []
    for number in range(count):
        weights = read[number % len(read)]
        request = LoRARequest(f"sweep-{number}", 10**6 + number, files[number % len(files)].lora_path)
        digest = hashlib.sha256(request.lora_name.encode()).hexdigest()
        version = structs.replace(weights.version, id=next(_ids), name=request.lora_name, digest=digest)
        renamed = dataclasses.replace(weights, version=version)
        engine._names.publish(renamed, request.lora_int_id, replace=False)
        made.append(request)
    return made
