"""The way out: deltas become answers."""

from pathlib import Path

import pytest

from aiolora import SamplingParams
from aiolora.engine.output import Assembler
from aiolora.tokenizer import Tokenizer
from aiolora.types import Request, TokenDelta


@pytest.fixture
def three(byte_model: Path) -> Assembler:
    request = Request(id="r", prompt_token_ids=(65, 66), params=SamplingParams(n=3, max_tokens=2))
    return Assembler(request, Tokenizer(byte_model))


def test_a_delta_without_a_token_ends_its_own_answer_only(three: Assembler) -> None:
    assert three.feed(TokenDelta("r", 1, token_id=None, finish_reason="abort")) is None
    assert not three.finished
    for reason in (None, "length"):
        for index in (0, 2):
            output = three.feed(TokenDelta("r", index, token_id=67, finish_reason=reason))  # type: ignore[arg-type]
            assert output is not None
            assert (output.index, output.finish_reason) == (index, reason)
    ends = [(len(answer.token_ids), answer.finish_reason) for answer in three.output().outputs]
    assert ends == [(2, "length"), (0, "abort"), (2, "length")]
    assert three.finished
    assert three.output().metrics.finished_time is not None


def test_what_comes_for_an_answer_that_has_ended_changes_nothing(three: Assembler) -> None:
    for _ in range(2):
        assert three.feed(TokenDelta("r", 0, token_id=None, finish_reason="abort")) is None
    assert three.feed(TokenDelta("r", 0, token_id=67)) is None
    assert not three.finished
    assert three.output().outputs[0].token_ids == []
