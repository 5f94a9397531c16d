"""`aiolora generate --input FILE`: prompts as lines of JSON in, answers as lines of JSON out, in the same order."""

import asyncio
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

import msgspec
from msgspec import UNSET, Struct, UnsetType

from aiolora.errors import AioloraError, ConfigError
from aiolora.types import SamplingParams

if TYPE_CHECKING:
    from aiolora.engine.async_engine import AsyncLLMEngine

_AHEAD = 256  # lines in the engine at a time: more than it runs at once, few enough to hold


class Line(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked. The other fields of `SamplingParams` are taken from the command line where they are left out."""

    prompt: str | list[int] | UnsetType = UNSET
    messages: list[dict[str, object]] | UnsetType = UNSET
    id: str | int | None = None  # comes back with the answer
    lora: str | None = None
    max_tokens: int | UnsetType = UNSET
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    stop: str | list[str] | UnsetType = UNSET


class Answer(Struct, frozen=True, omit_defaults=True):
    """What came of it: a text, or an error."""

    line: int  # of the input, from 1
    id: str | int | None = None
    adapter: str | None = None  # NAME@DIGEST12
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    error: str | None = None


def read(source: Iterable[str], name: str) -> Iterator[Line]:
    """Raises `ConfigError` naming the line."""
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
            if (line.prompt is UNSET) == (line.messages is UNSET):
                raise ValueError("give a prompt or messages")
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigError(f"{name}, line {number}: {error}") from None
        yield line


async def answer_all(
    engine: "AsyncLLMEngine", lines: Iterable[Line], params: SamplingParams, lora: str | None, out: TextIO
) -> int:
    """Answer side by side, write in order; how many failed. `params` and `lora` are for lines without their own."""
    pending: list[asyncio.Task[Answer]] = []
    failed = 0

    async def write_first() -> None:
        nonlocal failed
        answer = await pending.pop(0)
        failed += answer.error is not None
        out.write(msgspec.json.encode(answer).decode() + "\n")
        out.flush()

    for number, line in enumerate(lines, start=1):
        pending.append(asyncio.ensure_future(_answer(engine, number, line, params, line.lora or lora)))
        if len(pending) >= _AHEAD:
            await write_first()
    while pending:
        await write_first()
    return failed


async def _answer(
    engine: "AsyncLLMEngine", number: int, line: Line, params: SamplingParams, lora: str | None
) -> Answer:
    own = {
        name: value
        for name, value in msgspec.structs.asdict(line).items()
        if name not in ("prompt", "messages", "id", "lora") and value is not UNSET
    }
    prompt = line.messages if line.prompt is UNSET else line.prompt
    assert prompt is not UNSET, "read() lets none through"
    try:
        output = await engine.generate(prompt, msgspec.structs.replace(params, **own), lora=lora)
    except AioloraError as error:
        return Answer(number, line.id, error=str(error))
    [answer] = output.outputs
    return Answer(
        number,
        line.id,
        output.adapter,
        answer.text,
        answer.finish_reason,
        len(output.prompt_token_ids),
        len(answer.token_ids),
    )
