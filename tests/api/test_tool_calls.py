"""Tool calls in texts of each family: whole, in pieces of any size, truncated, malformed."""

import json
import random

import pytest

from aiolora.api.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    CallArguments,
    CallBegins,
    Content,
    Event,
    ToolCallParser,
    ToolFormat,
    format_of,
)

ARGS = {"city": 'Li"sb}on', "deep": {"a": [1, {"b": "\\"}]}, "ü": None}
TEXT = json.dumps(ARGS)
CALL = f'{{"name": "weather", "arguments": {TEXT}}}'
LLAMA_CALL = f'{{"name": "weather", "parameters": {TEXT}}}'
BACKWARDS = f'{{"arguments": {TEXT}, "name": "weather"}}'
NOTHING = '{"name": "now", "arguments": {}}'

CASES: dict[str, tuple[ToolFormat, str, str, list[tuple[str, object]]]] = {  # text -> content, calls
    "one": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", ARGS)]),
    "after words": (HERMES, f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.\n", [("weather", ARGS)]),
    "two": (
        HERMES,
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{NOTHING}\n</tool_call>\n",
        "",
        [("weather", ARGS), ("now", {})],
    ),
    "words between": (
        HERMES, f"a<tool_call>{CALL}</tool_call>b<tool_call>{NOTHING}</tool_call>c", "abc",
        [("weather", ARGS), ("now", {})],
    ),
    "backwards": (HERMES, f"<tool_call>{BACKWARDS}</tool_call>", "", [("weather", ARGS)]),
    "no call": (HERMES, 'a < b, <tool {"name": "x"}', 'a < b, <tool {"name": "x"}', []),
    "no JSON": (HERMES, "<tool_call>weather(1)</tool_call>", "weather(1)</tool_call>", []),
    "no escape": (HERMES, r'<tool_call>{"name": "\q", "arguments": {}} b', r'{"name": "\q", "arguments": {}} b', []),
    "half a character": (
        HERMES, r'<tool_call>{"name": "\ud800", "arguments": {}} b', r'{"name": "\ud800", "arguments": {}} b', [],
    ),
    "backwards, half a character": (
        HERMES, r'<tool_call>{"arguments": {"a": "\ud800"}, "name": "x"}', "", [("x", {"a": "\ud800"})],
    ),
    "no name": (HERMES, '<tool_call>{"nom": 1}</tool_call>', '{"nom": 1}</tool_call>', []),
    "llama": (LLAMA, LLAMA_CALL, "", [("weather", ARGS)]),
    "llama, two": (LLAMA, f" {LLAMA_CALL}; {NOTHING}", "", [("weather", ARGS), ("now", {})]),
    "llama, words": (LLAMA, 'Look: {"name": "x", "parameters": {}}', 'Look: {"name": "x", "parameters": {}}', []),
    "llama, JSON that is no call": (LLAMA, ' {"a": 1} and so on', '{"a": 1} and so on', []),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{CALL}, {NOTHING}]", "", [("weather", ARGS), ("now", {})]),
    "mistral, words": (MISTRAL, "[TOOLS] are [TOOL_", "[TOOLS] are [TOOL_", []),
}  # fmt: skip


def told(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


def parsed(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    content, calls = told([event for piece in pieces for event in parser.feed(piece)] + parser.end())
    assert parser.num_calls == len(calls)
    return content, [(name, json.loads(text)) for name, text in calls]


@pytest.mark.parametrize("case", CASES)
def test_content_and_calls_are_the_same_in_pieces_of_any_size(case: str) -> None:
    wording, text, *expected = CASES[case]
    rng = random.Random(0)
    for size in (1, 2, 3, 7, 10**6, None, None):
        pieces, rest = [], text
        while rest:
            cut = size or rng.randrange(1, 12)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        assert list(parsed(ToolCallParser(wording), pieces)) == expected


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(HERMES)
    parser.feed('<tool_call>\n{"name": "write"')
    assert parser.feed(', "arguments": {') == [CallBegins(0, "write"), CallArguments(0, "{")]
    assert parser.feed('"text": "a') == [CallArguments(0, '"text": "a')]
    assert parser.feed('b"}}\n</tool') == [CallArguments(0, 'b"}')]
    assert parser.feed("_call>") == parser.end() == []


def test_what_is_no_call_is_told_as_soon_as_it_is_known() -> None:
    parser = ToolCallParser(HERMES)
    assert told(parser.feed("one two <tool")) == ("one two ", [])
    assert told(parser.feed("box> three")) == ("<toolbox> three", [])
    parser = ToolCallParser(LLAMA)
    assert told(parser.feed(" Hi")) == (" Hi", [])


@pytest.mark.parametrize("wording", [HERMES, LLAMA, MISTRAL])
@pytest.mark.parametrize("cut", [10, 30, 45, 60])
def test_a_truncated_call_loses_nothing_that_was_said(wording: ToolFormat, cut: int) -> None:
    text = f"{wording.marker}{wording.opening}{CALL}"[: len(wording.marker) + cut]
    parser = ToolCallParser(wording)
    content, calls = told(parser.feed(text) + parser.end())
    said = content + "".join(arguments for _, arguments in calls)
    assert said
    assert text.endswith(said)


def test_forced_answers_begin_with_calls_and_a_limit_drops_the_rest() -> None:
    for wording in (HERMES, MISTRAL, LLAMA):
        text = wording.opening + wording.between.join(f"{wording.begin}{CALL}{wording.end}" for _ in "ab")
        forced = ToolCallParser(wording, forced=True)
        assert parsed(forced, list(text + wording.closing)) == ("", [("weather", ARGS)] * 2)
        assert parsed(ToolCallParser(wording, forced=True, limit=1), list(text)) == ("", [("weather", ARGS)])


def test_a_template_shows_its_family() -> None:
    assert format_of("{{ '<tool_call>' }}") is format_of("") is HERMES
    assert format_of("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert format_of("{{ '<|python_tag|>' }}") is LLAMA


def test_a_nest_of_braces_is_no_trouble() -> None:
    parser = ToolCallParser(HERMES)
    text = '{"a":' * 50_000
    assert told([*parser.feed("<tool_call>" + text), *parser.end()]) == (text, [])
