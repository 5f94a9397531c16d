"""Messages as chat templates expect them, tools among them, or told in words where a template knows no tools."""

import contextlib
import json
from collections.abc import Sequence
from typing import Protocol

from msgspec import to_builtins

from aiolora.api.media import content_of
from aiolora.api.wire import Message, Tool, ToolCall
from aiolora.errors import RequestError
from aiolora.types import Conversation, Messages

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PREAMBLE = """\
You can call functions. Here they are, one a line, each with a JSON schema of its parameters:
<tools>
{tools}
</tools>
To call one, write its name and arguments as JSON between tags:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>"""


class Told(Protocol):
    """What a request says of the template."""

    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, object] | None: ...


def messages_of(messages: Sequence[Message]) -> Messages:
    """The conversation as templates expect it; a content is a string, or parts with media. Raises `RequestError`."""
    if not messages:
        raise RequestError("messages is empty; send at least one", param="messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, object]:
    if message.role not in _ROLES:
        raise RequestError(f"{place}: role {message.role!r} is none of {', '.join(_ROLES)}", param=f"{place}.role")
    given = message.content
    content = content_of(given, place) if isinstance(given, list) else given
    if content is None and not message.tool_calls:
        raise RequestError(f"{place} has no content", param=f"{place}.content")
    if isinstance(content, list) and message.role != "user":
        raise RequestError(f"{place}: images and recordings are what a user sends", param=f"{place}.content")
    worded: dict[str, object] = {"role": _ROLES[message.role], "content": content or ""}
    if message.tool_calls:
        worded["tool_calls"] = [_call(call) for call in message.tool_calls]
    others = {"name": message.name, "tool_call_id": message.tool_call_id}
    return worded | {name: value for name, value in others.items() if value is not None}


def _call(call: ToolCall) -> dict[str, object]:
    """As templates expect it: the arguments an object, where they are one."""
    arguments: object = call.function.arguments
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(call.function.arguments)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def conversation(said: Told, messages: Messages, offered: Sequence[Tool] | None, template: str) -> Conversation:
    """The messages for the model's template, which may know nothing of tools: then they are told in words."""
    tools: list[dict[str, object]] | None = to_builtins(offered) if offered else None
    if "tools" not in template:
        messages, tools = _in_words(messages, tools or []), None
    return Conversation(
        messages=messages,
        tools=tools,
        add_generation_prompt=said.add_generation_prompt is not False,
        continue_final_message=said.continue_final_message is True,
        template_kwargs=said.chat_template_kwargs or {},
    )


def _in_words(messages: Messages, tools: Sequence[dict[str, object]]) -> Messages:
    worded = [_message_in_words(message) for message in messages]
    if tools:
        told = _PREAMBLE.format(tools="\n".join(_json(tool["function"]) for tool in tools))
        if worded and worded[0]["role"] == "system":
            told = f"{worded.pop(0)['content']}\n\n{told}"
        worded.insert(0, {"role": "system", "content": told})
    return worded


def _message_in_words(message: dict[str, object]) -> dict[str, object]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    texts = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join(filter(None, [str(message["content"] or ""), *texts]))}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
