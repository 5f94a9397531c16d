"""Frames whose constant bytes are encoded once are the frames of the whole chunk."""

from collections.abc import Callable

import pytest
from msgspec import Struct

from aiolora.api.sse import HOLE, Mould, frames
from aiolora.api.wire import ChatChunk, ChatChunkChoice, ChatDelta, Completion, CompletionChoice, Usage

TEXTS = ("", " word", '"quoted" \\ {"index":0}', "\n\r\t\x00\x1f\x7f", "é 漢字 🙂 \u2028", "%b %d", HOLE * 2)
MODELS = ("smollm2-135m", 'a"b\\c', f'"index":0 {HOLE} "index":0')


def chat(model: str, index: int, text: str) -> Struct:
    return ChatChunk("chatcmpl-0", 1, model, [ChatChunkChoice(index, ChatDelta(content=text))])


def chat_with_usage(model: str, index: int, text: str) -> Struct:
    return ChatChunk("chatcmpl-0", 1, model, [ChatChunkChoice(index, ChatDelta(content=text))], None)


def completion(model: str, index: int, text: str) -> Struct:
    return Completion("cmpl-0", 1, model, [CompletionChoice(index, text, None, None)])


@pytest.mark.parametrize("chunk", [chat, chat_with_usage, completion])
@pytest.mark.parametrize("model", MODELS)
def test_a_mould_makes_the_bytes_of_the_whole_chunk(chunk: Callable[[str, int, str], Struct], model: str) -> None:
    mould = Mould(chunk(model, 0, HOLE))
    for index in (0, 1, 10, 2047):
        for text in TEXTS:
            assert mould.frame(index, text) == frames([chunk(model, index, text)])


def test_a_chunk_without_a_hole_is_no_mould() -> None:
    with pytest.raises(AssertionError):
        Mould(ChatChunk("chatcmpl-0", 1, "m", [], Usage(1, 2, 3)))
