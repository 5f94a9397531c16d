"""POST /v1/chat/completions: a conversation, through the model's own template, and its next turn."""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping

from litestar import Response, post
from msgspec import UNSET, structs

from aiolora.api.decode import LONG, decode, sampling, structure
from aiolora.api.document import GENERATES
from aiolora.api.errors import ErrorBody, HTTPRequest, naming
from aiolora.api.leaving import answered_before_leaving
from aiolora.api.media import MAX_BODY, check_size
from aiolora.api.messages import conversation, messages_of
from aiolora.api.scores import check_scored
from aiolora.api.serving import Served, Serving
from aiolora.api.sse import DONE, HOLE, Mould, frames
from aiolora.api.tool_calls import CallBegins, Content, Event, ToolCallParser
from aiolora.api.tools import ToolUse, call_id
from aiolora.api.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenLogprob,
    FunctionCall,
    FunctionDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from aiolora.engine.beside import beside
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError
from aiolora.types import CompletionOutput, FinishReason, Logprob, SamplingParams, TokenOutput


@post(
    "/v1/chat/completions",
    status_code=200,
    operation_id="chat_completions",
    tags=["generation"],
    request_max_body_size=MAX_BODY,
    opt={"reads": ChatRequest, "streams": ChatChunk, "fails": GENERATES},
)
async def chat_completions(request: HTTPRequest, serving: Served) -> Response[ChatCompletion]:
    """Answer a conversation, n times."""
    body = await request.body()
    check_size(body, serving.engine.intake.media.modalities)
    return await answered_before_leaving(request, _answer(serving, body))


async def _answer(serving: Serving, body: bytes) -> Response[ChatCompletion]:
    long = len(body) > LONG
    said = await beside(long, decode, ChatRequest, body)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    assembler, use = await prepare(serving, said, answer_id, long=long)
    reply = _Reply(said, answer_id, assembler, use)
    return await serving.respond([assembler], reply, stream=bool(said.stream))


async def prepare(
    serving: Serving, said: ChatRequest, answer_id: str, *, long: bool
) -> tuple[Assembler, ToolUse | None]:
    """The request of a conversation, checked but not yet running, and its tools. Raises `RequestError`.

    `long`: it is nothing that the loop should word itself.
    """
    limit = "max_tokens" if said.max_completion_tokens is None else "max_completion_tokens"
    messages = await beside(long, messages_of, said.messages)
    settled = await serving.settle(said, await beside(long, serving.engine.intake.media.modalities_in, messages))
    template = settled.tokenizer.tool_template
    use = await beside(long, ToolUse.of, said, template)
    field = "tools" if use is not None and use.forced else structure(said)[0]
    with naming(prompt="messages", max_tokens=limit, structured_outputs=field):
        params = await beside(long, _params, said, use)
        offered = None if use is None else use.tools
        prompt = await beside(long, conversation, said, messages, offered, template)
        [assembler] = await serving.prepare(answer_id, said, settled, [prompt], params)
        check_scored([assembler], param="prompt_logprobs")
    return assembler, use


def _params(said: ChatRequest, use: ToolUse | None) -> SamplingParams:
    if said.top_logprobs is not None and not said.logprobs:
        raise RequestError("top_logprobs is only for logprobs=true", param="top_logprobs")
    max_tokens = said.max_tokens if said.max_completion_tokens is None else said.max_completion_tokens
    logprobs = said.top_logprobs or 0 if said.logprobs else None
    params = sampling(said, max_tokens=max_tokens, logprobs=logprobs, structured=None if use is None else use.grammar())
    shown = use is not None and use.wording.shows_special
    return structs.replace(params, skip_special_tokens=False) if shown else params


class _Reply:
    """Words the answers to one conversation."""

    def __init__(self, said: ChatRequest, answer_id: str, assembler: Assembler, use: ToolUse | None) -> None:
        self._said = said
        self._assembler = assembler
        self._use = use
        self._parsers = [use.parser() for _ in range(said.n or 1)] if use is not None else None
        usage = None if said.wants_usage else UNSET
        self._chunk = ChatChunk(answer_id, int(time.time()), said.model, [], usage)
        self._mould = Mould(self._with(ChatChunkChoice(0, ChatDelta(content=HOLE))))
        self._plain = use is None and not said.logprobs  # tokens are nothing but text

    def opening(self) -> bytes:
        return frames(
            self._with(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
            for index in range(self._said.n or 1)
        )

    def token(self, position: int, output: TokenOutput) -> bytes:
        if self._plain and output.finish_reason is None:
            return self._mould.frame(output.index, output.text)
        return frames(map(self._with, self._choices(output)))

    def closing(self) -> bytes:
        if not self._said.wants_usage:
            return DONE
        return frames([structs.replace(self._chunk, usage=Usage.of([self._assembler.output()]))]) + DONE

    def failed(self, error: ErrorBody) -> bytes:
        return frames([error])

    def whole(self) -> ChatCompletion:
        output = self._assembler.output()
        choices = [
            ChatChoice(
                answer.index,
                *self._message(answer),
                self._logprobs(answer.token_ids, answer.logprobs or []),
                answer.stop_reason,
            )
            for answer in output.outputs
        ]
        return ChatCompletion(
            self._chunk.id,
            self._chunk.created,
            self._chunk.model,
            choices,
            Usage.of([output]),
            prompt_logprobs=UNSET if output.prompt_logprobs is None else output.prompt_logprobs,
        )

    def _message(self, answer: CompletionOutput) -> tuple[ChatMessage, ChatFinishReason | None]:
        if self._use is None:
            return ChatMessage(answer.text), answer.finish_reason
        parser = self._use.parser()
        content, calls = "", list[tuple[str, list[str]]]()
        for event in parser.feed(answer.text) + parser.end():
            if isinstance(event, Content):
                content += event.text
            elif isinstance(event, CallBegins):
                calls.append((event.name, []))
            else:
                calls[event.index][1].append(event.text)
        if not calls:
            return ChatMessage(content), answer.finish_reason
        worded = [ToolCall(call_id(), FunctionCall(name, "".join(parts))) for name, parts in calls]
        return ChatMessage(content or None, tool_calls=worded), _why(answer.finish_reason, parser)

    def _choices(self, output: TokenOutput) -> Iterator[ChatChunkChoice]:
        """The token, and where it is the last a choice of its own to say why; a bare end of text has only that one."""
        logprobs = self._logprobs([output.token_id], [output.top_logprobs])
        reason: ChatFinishReason | None = output.finish_reason
        if self._parsers is None:
            if output.text or logprobs or reason is None:
                yield ChatChunkChoice(output.index, ChatDelta(content=output.text), logprobs)
        else:
            parser = self._parsers[output.index]
            events = parser.feed(output.text) + (parser.end() if reason is not None else [])
            deltas = [_delta(event) for event in events] or ([ChatDelta(content="")] if logprobs else [])
            for delta in deltas:
                yield ChatChunkChoice(output.index, delta, logprobs)
                logprobs = None
            reason = _why(output.finish_reason, parser)
        if reason is not None:
            yield ChatChunkChoice(output.index, ChatDelta(), None, reason, output.stop_reason)

    def _with(self, choice: ChatChunkChoice) -> ChatChunk:
        return structs.replace(self._chunk, choices=[choice])

    def _logprobs(self, tokens: Iterable[int], likely: Iterable[Mapping[int, Logprob] | None]) -> ChatLogprobs | None:
        return ChatLogprobs(scored(tokens, likely, self._said.top_logprobs or 0)) if self._said.logprobs else None


def _why(reason: FinishReason | None, parser: ToolCallParser) -> ChatFinishReason | None:
    """An answer that stops after calls stops for them."""
    return "tool_calls" if reason == "stop" and parser.num_calls else reason


def _delta(event: Event) -> ChatDelta:
    if isinstance(event, Content):
        return ChatDelta(content=event.text)
    if isinstance(event, CallBegins):
        begun = ToolCallDelta(event.index, call_id(), "function", FunctionDelta(event.name, ""))
        return ChatDelta(tool_calls=[begun])
    return ChatDelta(tool_calls=[ToolCallDelta(event.index, function=FunctionDelta(arguments=event.text))])


def scored(tokens: Iterable[int], likely: Iterable[Mapping[int, Logprob] | None], count: int) -> list[ChatTokenLogprob]:
    """The tokens with their `count` likeliest, best first."""
    content = []
    for token, candidates in zip(tokens, likely):
        if candidates is None:
            continue
        own = _scored(candidates[token])
        best = sorted((one for one in candidates.values() if one.rank <= count), key=lambda one: one.rank)
        content.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, [_scored(one) for one in best[:count]]))
    return content


def _scored(candidate: Logprob) -> TokenLogprob:
    text = candidate.decoded_token or ""
    return TokenLogprob(text, candidate.logprob, None if "\ufffd" in text else list(text.encode()))
