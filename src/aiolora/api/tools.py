"""Tools of a request: which may be called, and what an answer must match where one must."""

import json
import uuid

from msgspec import Struct

from aiolora.api.tool_calls import ToolCallParser, ToolFormat, format_of
from aiolora.api.wire import ChatRequest, NamedTool, Tool
from aiolora.engine.grammar import WHITESPACE
from aiolora.errors import RequestError
from aiolora.types import StructuredOutputsParams


class ToolUse(Struct, frozen=True):
    """The tools of a request, and how its answers are to use them."""

    tools: list[Tool]
    wording: ToolFormat
    forced: bool  # an answer is nothing but calls
    limit: int | None  # calls of an answer

    @classmethod
    def of(cls, said: ChatRequest, template: str) -> "ToolUse | None":
        """None: no answer calls anything. Raises `RequestError` where `tool_choice` names what is not there."""
        choice, tools = said.tool_choice, said.tools or []
        if choice not in (None, "none", "auto") and not tools:
            raise RequestError("tool_choice needs tools", param="tool_choice")
        if not tools or choice == "none":
            return None
        for place, tool in enumerate(tools):
            if not tool.function.name:
                raise RequestError("a function has no name", param=f"tools[{place}].function.name")
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
            if not tools:
                raise RequestError(
                    f"tool_choice names {choice.function.name!r}, which is none of the tools", param="tool_choice"
                )
        limit = 1 if isinstance(choice, NamedTool) or said.parallel_tool_calls is False else None
        return cls(tools, format_of(template), choice not in (None, "auto"), limit)

    def parser(self) -> ToolCallParser:
        """For one answer."""
        return ToolCallParser(self.wording, forced=self.forced, limit=self.limit)

    def grammar(self) -> StructuredOutputsParams | None:
        """What an answer must match where calls are forced: the family's wording, arguments by their schemas."""
        if not self.forced:
            return None
        wording = self.wording
        more = "" if self.limit == 1 else f"({_text(wording.between)} call)*"
        kinds = " | ".join(f"call{number}" for number in range(len(self.tools)))
        rules = [
            f"start: {_text(wording.opening)} call {more} {_text(wording.closing)}",
            f"call: {_text(wording.begin)} ({kinds}) {_text(wording.end)}",
            *(f"call{number}: %json {json.dumps(self._schema(tool))}" for number, tool in enumerate(self.tools)),
        ]
        return StructuredOutputsParams(grammar="\n".join(rules))

    def _schema(self, tool: Tool) -> dict[str, object]:
        """Of a whole call. `$ref` counts from the root of a schema, so what is defined there moves there."""
        key, schema = self.wording.arguments, tool.function.parameters or {"type": "object"}
        return {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, key: schema},
            "required": ["name", key],
            "additionalProperties": False,
            **{key: schema[key] for key in ("$defs", "definitions") if key in schema},
            "x-guidance": {"whitespace_pattern": WHITESPACE},
        }


def call_id() -> str:
    """Nine characters, as Mistral's templates demand."""
    return uuid.uuid4().hex[:9]


def _text(text: str) -> str:
    """A literal of a grammar; none for an empty text."""
    return json.dumps(text) if text else ""
