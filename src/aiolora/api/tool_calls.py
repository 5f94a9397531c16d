"""Tool calls in a model's text: how each family words them, and a parser that streams them."""

import json
import re
from collections.abc import Iterator
from typing import TypeAlias

from msgspec import Struct


class ToolFormat(Struct, frozen=True):
    """How a family words calls: opening, calls of `begin` {"name": ..., <arguments>: {...}} `end`, closing."""

    marker: str  # where calls begin in a text; empty: the text is nothing but calls, or has none
    begin: str
    end: str
    between: str
    arguments: str  # the key of the arguments
    opening: str = ""
    closing: str = ""
    shows_special: bool = False  # the marker is a special token, which is no part of a text otherwise


HERMES = ToolFormat("<tool_call>", "<tool_call>\n", "\n</tool_call>", "\n", "arguments")  # Qwen, Hermes, and by default
LLAMA = ToolFormat("", "", "", "; ", "parameters")
MISTRAL = ToolFormat("[TOOL_CALLS]", "", "", ", ", "arguments", "[", "]", shows_special=True)


def format_of(template: str) -> ToolFormat:
    """The format that a model with this chat template was trained on."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|python_tag|>" in template or '"parameters": dictionary of argument name' in template:
        return LLAMA
    return HERMES


class Content(Struct, frozen=True):
    """Text that is no call."""

    text: str


class CallBegins(Struct, frozen=True):
    """A call, known by its name; its arguments follow."""

    index: int
    name: str


class CallArguments(Struct, frozen=True):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event: TypeAlias = Content | CallBegins | CallArguments

_BETWEEN = re.compile(r"(?:\s|[\[\],;]|</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>)*")
_MARKERS = ("</tool_call>", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class ToolCallParser:
    """The text of one answer in, its content and calls out as they come. What is no call comes back as content.

    `forced`: the text begins with calls. `limit`: calls beyond so many are dropped.
    """

    def __init__(self, wording: ToolFormat, *, forced: bool = False, limit: int | None = None) -> None:
        self._format = wording
        self._limit = limit
        self._buffer = ""
        self._state = self._calls if forced or not wording.marker else self._content
        self._value = _Value()
        self._scanned = 0  # characters of the buffer that `_value` has seen
        self._num_calls = 0

    @property
    def num_calls(self) -> int:
        """Calls so far, dropped ones not counted."""
        return self._num_calls if self._limit is None else min(self._num_calls, self._limit)

    def feed(self, text: str) -> list[Event]:
        """What `text` brings."""
        self._buffer += text
        return self._run(final=False)

    def end(self) -> list[Event]:
        """What was held, now that no more comes."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        state = None
        while self._buffer and state != (self._state, len(self._buffer)):
            state = (self._state, len(self._buffer))
            events += self._state(final)
        return [event for event in events if isinstance(event, Content) or event.index < self.num_calls]

    # Each state takes what it can from the buffer and says which state comes next.

    def _content(self, final: bool) -> Iterator[Event]:
        marker = self._format.marker
        at = self._buffer.find(marker) if marker else -1
        if at >= 0:
            text, self._buffer = self._buffer[:at], self._buffer[at + len(marker) :]
            self._state = self._calls
        else:
            held = 0 if final or not marker else _beginning(marker, self._buffer)
            text, self._buffer = self._buffer[: len(self._buffer) - held], self._buffer[len(self._buffer) - held :]
        if text.strip() or (text and not self._num_calls):  # blanks between calls are nobody's
            yield Content(text)

    def _calls(self, final: bool) -> Iterator[Event]:
        match = _BETWEEN.match(self._buffer)
        assert match is not None
        rest = self._buffer[match.end() :]
        if rest.startswith("{"):
            self._buffer, self._value, self._scanned = rest, _Value(), 0
            self._state = self._object
        elif final or (rest and not any(one.startswith(rest) for one in _MARKERS)):
            self._buffer = rest if self._num_calls else self._buffer
            self._state = self._content
        return iter(())

    def _object(self, final: bool) -> Iterator[Event]:
        head = _HEAD.match(self._buffer)
        name = None if head is None else _name(head[1])
        if head is not None and name is not None:
            self._num_calls += 1
            yield CallBegins(self._num_calls - 1, name)
            self._buffer, self._value = self._buffer[head.end() :], _Value()
            self._state = self._arguments
            return
        self._scanned += self._value.take(self._buffer[self._scanned :])
        if self._value.ended or final:
            text, self._buffer = self._buffer[: self._scanned], self._buffer[self._scanned :]
            self._state = self._calls
            yield from self._whole(text)

    def _whole(self, text: str) -> Iterator[Event]:
        """An object in another order; content where it is no call."""
        try:
            said = json.loads(text, strict=False)
            name = _name(json.dumps(said["name"])) if isinstance(said["name"], str) else None
            arguments = said.get("arguments", said.get("parameters", {}))
        except (ValueError, RecursionError, KeyError):
            name = None
        if name is None:
            self._state = self._content
            yield Content(text)
            return
        self._num_calls += 1
        yield CallBegins(self._num_calls - 1, name)
        worded = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii="\\u" in text)
        yield CallArguments(self._num_calls - 1, worded.encode(errors="replace").decode())

    def _arguments(self, final: bool) -> Iterator[Event]:
        taken = self._value.take(self._buffer)
        text, self._buffer = self._buffer[:taken], self._buffer[taken:]
        if text:
            yield CallArguments(self._num_calls - 1, text)
        if self._value.ended:
            self._state = self._closing

    def _closing(self, final: bool) -> Iterator[Event]:
        """The brace of the call itself."""
        rest = self._buffer.lstrip()
        self._buffer = rest.removeprefix("}")
        if rest:
            self._state = self._calls
        return iter(())


def _name(text: str) -> str | None:
    """What a JSON string says; None: it has an escape that there is not, or half a character."""
    try:
        name = str(json.loads(text, strict=False))
        name.encode()
    except ValueError:
        return None
    return name


class _Value:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.ended = False

    def take(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return place + 1
        return len(text)


def _beginning(marker: str, text: str) -> int:
    """Characters at the end of `text` that may be the beginning of `marker`."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)
