"""`aiolora chat`: what is typed, who answers, and what they have heard before."""

import builtins
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiolora.cli import main
from aiolora.cli.chat import Conversation
from aiolora.errors import AioloraError, RequestError
from aiolora.types import Messages


class Echo:
    """Answers with the model's name and the last words; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Messages]] = []
        self.failure: AioloraError | None = None

    async def models(self) -> list[str]:
        return ["base", "sql", "org/pirate"]

    async def answer(self, messages: Messages, model: str) -> AsyncIterator[str]:
        self.asked.append((model, messages))
        yield f"{model}: "
        if self.failure is not None:
            raise self.failure
        yield str(messages[-1]["content"])


class Talk:
    def __init__(self) -> None:
        self.partner, self.said = Echo(), ""
        self.conversation = Conversation(self.partner, ["base", "sql"], self._say)

    def _say(self, text: str) -> None:
        self.said += text

    async def __call__(self, *lines: str) -> str:
        self.said = ""
        for line in lines:
            assert await self.conversation.hear(line)
        return self.said


async def test_an_answer_is_streamed_and_remembered() -> None:
    talk = Talk()
    assert (await talk("hello")).startswith("base: hello\n[")
    await talk("again")
    roles = [(message["role"], message["content"]) for message in talk.partner.asked[-1][1]]
    assert roles == [("user", "hello"), ("assistant", "base: hello"), ("user", "again")]


async def test_slash_adapter_switches_and_alone_goes_back_to_the_base() -> None:
    talk = Talk()
    await talk("/adapter org/pirate", "hello", "/adapter", "hello")
    assert [model for model, _ in talk.partner.asked] == ["org/pirate", "base"]
    assert "no 'sqll' here; there are: base, sql" in await talk("/adapter sqll")
    assert talk.conversation.model == "base"


async def test_slash_adapters_marks_the_one_that_answers() -> None:
    assert await Talk()("/adapter sql", "/adapters") == "  base\n* sql\n  org/pirate\n"


async def test_system_and_clear_begin_again() -> None:
    talk = Talk()
    await talk("hello", "/system be brief", "hi")
    assert talk.partner.asked[-1][1][0] == {"role": "system", "content": "be brief"}
    assert len(talk.partner.asked[-1][1]) == 2
    await talk("/clear", "hi")
    assert len(talk.partner.asked[-1][1]) == 1


async def test_a_failure_is_told_and_the_conversation_goes_on() -> None:
    talk = Talk()
    talk.partner.failure = RequestError("too long")
    assert "[too long]" in await talk("hello")
    talk.partner.failure = None
    await talk("again")
    assert talk.partner.asked[-1][1][-1]["content"] == "again"


async def test_quit_ends_it_and_an_unknown_command_helps() -> None:
    talk = Talk()
    assert "/adapter NAME" in await talk("/what")
    assert not await talk.conversation.hear("/quit")
    assert talk.partner.asked == []


def test_the_command_answers_from_an_engine_of_its_own(
    talking_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "/quit"])
    prompts = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    monkeypatch.setattr(builtins, "input", typed)
    assert main(["chat", str(talking_model), "--dtype", "float32", "--max-tokens", "4"]) == 0
    assert prompts == [f"{talking_model}> "] * 2
    assert "tokens/s]" in capsys.readouterr().out
