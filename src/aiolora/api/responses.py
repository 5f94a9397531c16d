"""POST /v1/responses: one answer, text and calls, to a conversation that the request holds whole. Nothing is kept."""

import uuid
from collections.abc import Sequence

from litestar import Response, post
from msgspec import structs

from aiolora.api.chat import prepare
from aiolora.api.decode import LONG, NOTHING, parse
from aiolora.api.document import GENERATES
from aiolora.api.errors import HTTPRequest, naming
from aiolora.api.leaving import answered_before_leaving
from aiolora.api.responses_reply import ResponseReply
from aiolora.api.responses_wire import InputItem, ModelResponse, NamedFunction, ResponsesRequest, StreamEvent
from aiolora.api.serving import Served, Serving
from aiolora.api.wire import (
    ChatRequest,
    ContentPart,
    Function,
    FunctionCall,
    FunctionName,
    JSONSchemaFormat,
    Message,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)
from aiolora.engine.beside import beside
from aiolora.errors import RequestError

_UNSERVED = ("previous_response_id", "conversation", "prompt", "background")
_TEXT_PARTS = ("input_text", "output_text", "text")
_OTHERWISE = {"tools", "tool_choice", "stream", "top_logprobs"}
_SAME = set(ResponsesRequest.__struct_fields__) & set(ChatRequest.__struct_fields__) - _OTHERWISE


@post(
    "/v1/responses",
    status_code=200,
    operation_id="responses",
    tags=["generation"],
    opt={"reads": ResponsesRequest, "streams": StreamEvent, "fails": GENERATES},
)
async def responses(request: HTTPRequest, serving: Served) -> Response[ModelResponse]:
    """Answer a conversation."""
    return await answered_before_leaving(request, _answer(serving, await request.body()))


async def _answer(serving: Serving, body: bytes) -> Response[ModelResponse]:
    long = len(body) > LONG
    said = await beside(long, parse, ResponsesRequest, body)
    for name in _UNSERVED:
        if getattr(said, name) not in NOTHING:
            raise RequestError(f"{name} is not served: send the whole conversation as input", param=name)
    response_id = f"resp_{uuid.uuid4().hex}"
    with naming(messages="input", max_completion_tokens="max_output_tokens", response_format="text.format"):
        chat = await beside(long, _as_chat, said)
        assembler, use = await prepare(serving, chat, response_id, long=long)
    reply = ResponseReply(said, response_id, assembler, use)
    return await serving.respond([assembler], reply, stream=bool(said.stream))


def _as_chat(said: ResponsesRequest) -> ChatRequest:
    """The same request, as chat puts it."""
    messages = [] if said.instructions is None else [Message("system", said.instructions)]
    messages += _messages([InputItem(role="user", content=said.input)] if isinstance(said.input, str) else said.input)
    form = said.text.format if said.text is not None else None
    choice = said.tool_choice
    return ChatRequest(
        **{name: getattr(said, name) for name in _SAME},
        messages=messages,
        max_completion_tokens=said.max_output_tokens,
        logprobs=said.wants_logprobs,
        top_logprobs=said.top_logprobs if said.wants_logprobs else None,
        tools=[
            Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in said.tools or []
        ],
        tool_choice=NamedTool("function", FunctionName(choice.name)) if isinstance(choice, NamedFunction) else choice,
        response_format=None
        if form is None
        else ResponseFormat(form.type, JSONSchemaFormat(form.name or None, form.schema or None)),
    )


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """A call belongs to the assistant's message before it."""
    messages: list[Message] = []
    for number, item in enumerate(items):
        place = f"input[{number}]"
        if item.type in (None, "message") and item.role is not None:
            messages.append(Message(item.role, _text(item.content, f"{place}.content")))
        elif item.type == "function_call" and item.call_id is not None and item.name is not None:
            call = ToolCall(item.call_id, FunctionCall(item.name, item.arguments or "{}"))
            before = messages[-1] if messages and messages[-1].role == "assistant" else None
            if before is None:
                messages.append(Message("assistant", tool_calls=[call]))
            elif before.tool_calls is None:
                messages[-1] = structs.replace(before, tool_calls=[call])
            else:
                before.tool_calls.append(call)
        elif item.type == "function_call_output" and item.call_id is not None:
            messages.append(Message("tool", _text(item.output, f"{place}.output"), tool_call_id=item.call_id))
        elif item.type != "reasoning":
            raise RequestError(
                f"{place} of type {item.type!r} is no whole message, function_call or function_call_output",
                param=f"{place}.type",
            )
    return messages


def _text(content: str | list[ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type not in _TEXT_PARTS or part.text is None:
            raise RequestError(
                f"{place}[{number}] of type {part.type!r} is not served, only {', '.join(_TEXT_PARTS)}",
                param=f"{place}[{number}]",
            )
    return "".join(part.text or "" for part in content)
