"""The answer of /v1/responses as it grows: its items, and an event for everything that happens to them."""

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import structs

from aiolora.api.chat import scored
from aiolora.api.errors import ErrorBody
from aiolora.api.responses_wire import (
    Incomplete,
    Item,
    ModelResponse,
    OutputCall,
    OutputMessage,
    OutputText,
    ResponsesRequest,
    ResponseUsage,
    StreamEvent,
    TextFormat,
    TextOptions,
)
from aiolora.api.sse import named_frames
from aiolora.api.tool_calls import CallArguments, CallBegins, Content, Event
from aiolora.api.tools import ToolUse, call_id
from aiolora.api.wire import ChatTokenLogprob, Usage
from aiolora.engine.output import Assembler
from aiolora.types import TokenOutput


class ResponseReply:
    """Words one answer."""

    def __init__(self, said: ResponsesRequest, response_id: str, assembler: Assembler, use: ToolUse | None) -> None:
        self._said = said
        self._id = response_id
        self._created = int(time.time())
        self._assembler = assembler
        self._parser = None if use is None else use.parser()
        self._number = 0
        self._output: list[Item] = []
        self._logprobs: list[ChatTokenLogprob] = []

    def opening(self) -> bytes:
        return named_frames(
            self._event(kind, response=self._response("in_progress"))
            for kind in ("response.created", "response.in_progress")
        )

    def token(self, position: int, output: TokenOutput) -> bytes:
        logprobs: list[ChatTokenLogprob] = []
        if self._said.wants_logprobs:
            logprobs = scored([output.token_id], [output.top_logprobs], self._said.top_logprobs or 0)
        return named_frames(self._take(output.text, logprobs))

    def closing(self) -> bytes:
        ended = list(self._end())
        return named_frames([*ended, self._event("response.completed", response=self._ended())])

    def failed(self, error: ErrorBody) -> bytes:
        detail = error.error
        return named_frames([self._event("error", code=detail.code, message=detail.message, param=detail.param)])

    def whole(self) -> ModelResponse:
        [answer] = self._assembler.output().outputs
        logprobs = scored(answer.token_ids, answer.logprobs or [], self._said.top_logprobs or 0)
        for _ in (*self._take(answer.text, logprobs), *self._end()):
            pass
        return self._ended()

    def _take(self, text: str, logprobs: list[ChatTokenLogprob]) -> Iterator[StreamEvent]:
        """`text` with the tokens that brought it."""
        self._logprobs += logprobs
        events: list[Event] = self._parser.feed(text) if self._parser is not None else [Content(text)] if text else []
        for event in events:
            yield from self._told(event, logprobs)

    def _end(self) -> Iterator[StreamEvent]:
        for event in self._parser.end() if self._parser is not None else ():
            yield from self._told(event, [])
        if not self._output:
            yield from self._told(Content(""), [])
        yield from self._finish()

    def _told(self, event: Event, logprobs: list[ChatTokenLogprob]) -> Iterator[StreamEvent]:
        if isinstance(event, Content):
            yield from self._content(event.text, logprobs)
        elif isinstance(event, CallBegins):
            yield from self._call(event)
        else:
            yield from self._arguments(event)

    # ---- items ----

    def _content(self, text: str, logprobs: list[ChatTokenLogprob]) -> Iterator[StreamEvent]:
        message = self._output[-1] if self._output else None
        if not isinstance(message, OutputMessage):
            yield from self._finish()
            message = OutputMessage(f"msg_{uuid.uuid4().hex}", [], "in_progress")
            self._output.append(message)
            yield self._of_item("response.output_item.added", item=message)
            part = OutputText("", [])
            yield self._of_item("response.content_part.added", item_id=message.id, content_index=0, part=part)
            message = structs.replace(message, content=[part])
        if text:
            where = {"item_id": message.id, "content_index": 0}
            yield self._of_item("response.output_text.delta", **where, delta=text, logprobs=logprobs)
        part = OutputText(message.content[0].text + text, self._logprobs if self._said.wants_logprobs else None)
        self._output[-1] = structs.replace(message, content=[part])

    def _call(self, event: CallBegins) -> Iterator[StreamEvent]:
        yield from self._finish()
        call = OutputCall(f"fc_{uuid.uuid4().hex}", call_id(), event.name, "", "in_progress")
        self._output.append(call)
        yield self._of_item("response.output_item.added", item=call)

    def _arguments(self, event: CallArguments) -> Iterator[StreamEvent]:
        call = self._output[-1]
        assert isinstance(call, OutputCall)
        self._output[-1] = structs.replace(call, arguments=call.arguments + event.text)
        yield self._of_item("response.function_call_arguments.delta", item_id=call.id, delta=event.text)

    def _finish(self) -> Iterator[StreamEvent]:
        """The item that was under way, if any, is done."""
        if not self._output or self._output[-1].status != "in_progress":
            return
        item = self._output[-1] = structs.replace(self._output[-1], status="completed")
        if isinstance(item, OutputMessage):
            [part] = item.content
            where = {"item_id": item.id, "content_index": 0}
            yield self._of_item("response.output_text.done", **where, text=part.text, logprobs=part.logprobs or [])
            yield self._of_item("response.content_part.done", **where, part=part)
        else:
            yield self._of_item(
                "response.function_call_arguments.done", item_id=item.id, name=item.name, arguments=item.arguments
            )
        yield self._of_item("response.output_item.done", item=item)

    # ---- words ----

    def _of_item(self, kind: str, **fields: Any) -> StreamEvent:
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        self._number += 1
        return StreamEvent(type=kind, sequence_number=self._number - 1, **fields)

    def _ended(self) -> ModelResponse:
        output = self._assembler.output()
        usage = Usage.of([output])
        cut = output.outputs[0].finish_reason == "length"
        return self._response(
            "incomplete" if cut else "completed",
            ResponseUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
        )

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete"], usage: ResponseUsage | None = None
    ) -> ModelResponse:
        said = self._said
        form = said.text.format if said.text is not None else None
        return ModelResponse(
            id=self._id,
            created_at=self._created,
            model=said.model,
            status=status,
            output=list(self._output),
            usage=usage,
            incomplete_details=Incomplete() if status == "incomplete" else None,
            instructions=said.instructions,
            max_output_tokens=said.max_output_tokens,
            metadata=said.metadata or {},
            parallel_tool_calls=said.parallel_tool_calls is not False,
            temperature=1.0 if said.temperature is None else said.temperature,
            text=TextOptions(form or TextFormat()),
            tool_choice=said.tool_choice or ("auto" if said.tools else "none"),
            tools=said.tools or [],
            top_logprobs=said.top_logprobs,
            top_p=1.0 if said.top_p is None else said.top_p,
            user=said.user,
            presence_penalty=said.presence_penalty or 0.0,
            frequency_penalty=said.frequency_penalty or 0.0,
        )
