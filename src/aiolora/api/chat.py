"""POST /v1/chat/completions: a conversation, through the model's own template, and its next turn."""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from litestar import Response, post
from msgspec import UNSET, structs

from aiolora.api.decode import decode, sampling
from aiolora.api.errors import HTTPRequest, naming
from aiolora.api.media import MAX_BODY, check_size, content_of
from aiolora.api.serving import Served
from aiolora.api.wire import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatTokenLogprob,
    Message,
    TokenLogprob,
    Usage,
)
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError
from aiolora.types import Logprob, Messages, SamplingParams, TokenOutput

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@post(
    "/v1/chat/completions",
    status_code=200,
    operation_id="chat_completions",
    tags=["generation"],
    request_max_body_size=MAX_BODY,
)
async def chat_completions(request: HTTPRequest, serving: Served) -> Response[ChatCompletion]:
    """Answer a conversation, n times."""
    body = await request.body()
    check_size(body, serving.engine.intake.media.modalities)
    said = decode(ChatRequest, body)
    limit: Literal["max_tokens", "max_completion_tokens"]
    limit = "max_tokens" if said.max_completion_tokens is None else "max_completion_tokens"
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    with naming(prompt="messages", max_tokens=limit):
        messages, params = _messages(said), _params(said)
        [assembler] = await serving.prepare(answer_id, said, [messages], params)
    return await serving.respond(request, [assembler], _Reply(said, answer_id, assembler), stream=bool(said.stream))


def _messages(said: ChatRequest) -> Messages:
    """The conversation as templates expect it: every content a string."""
    if not said.messages:
        raise RequestError("messages is empty; send at least one", param="messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(said.messages)]


def _message(message: Message, place: str) -> dict[str, object]:
    if message.role not in _ROLES:
        raise RequestError(f"{place}: role {message.role!r} is none of {', '.join(_ROLES)}", param=f"{place}.role")
    content: str | list[dict[str, object]]
    if isinstance(message.content, str):
        content = message.content
    else:
        content = content_of(message.content, place)
    worded: dict[str, object] = {"role": _ROLES[message.role], "content": content}
    return worded if message.name is None else {**worded, "name": message.name}


def _params(said: ChatRequest) -> SamplingParams:
    if said.top_logprobs is not None and not said.logprobs:
        raise RequestError("top_logprobs is only for logprobs=true", param="top_logprobs")
    max_tokens = said.max_tokens if said.max_completion_tokens is None else said.max_completion_tokens
    return sampling(said, max_tokens=max_tokens, logprobs=said.top_logprobs or 0 if said.logprobs else None)


class _Reply:
    """Words the answers to one conversation."""

    def __init__(self, said: ChatRequest, answer_id: str, assembler: Assembler) -> None:
        self._said = said
        self._assembler = assembler
        usage = None if said.wants_usage else UNSET
        self._chunk = ChatChunk(answer_id, int(time.time()), said.model, [], usage)

    def opening(self) -> Iterator[ChatChunk]:
        for index in range(self._said.n or 1):
            yield self._with(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))

    def token(self, position: int, output: TokenOutput) -> Iterator[ChatChunk]:
        """The token, and where it is the last a chunk of its own to say why; a bare end of text has only that one."""
        logprobs = self._logprobs([output.token_id], [output.top_logprobs])
        if output.text or logprobs or output.finish_reason is None:
            yield self._with(ChatChunkChoice(output.index, ChatDelta(content=output.text), logprobs))
        if output.finish_reason is not None:
            end = ChatChunkChoice(output.index, ChatDelta(), None, output.finish_reason, output.stop_reason)
            yield self._with(end)

    def closing(self) -> Iterator[ChatChunk]:
        if self._said.wants_usage:
            yield structs.replace(self._chunk, usage=Usage.of([self._assembler.output()]))

    def whole(self) -> ChatCompletion:
        output = self._assembler.output()
        choices = [
            ChatChoice(
                answer.index,
                ChatMessage(answer.text),
                self._logprobs(answer.token_ids, answer.logprobs or []),
                answer.finish_reason,
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

    def _with(self, choice: ChatChunkChoice) -> ChatChunk:
        return structs.replace(self._chunk, choices=[choice])

    def _logprobs(self, tokens: Iterable[int], likely: Iterable[Mapping[int, Logprob] | None]) -> ChatLogprobs | None:
        """The tokens with their `top_logprobs` likeliest, best first."""
        if not self._said.logprobs:
            return None
        count = self._said.top_logprobs or 0
        content = []
        for token, candidates in zip(tokens, likely):
            if candidates is None:
                continue
            own = _scored(candidates[token])
            best = sorted((one for one in candidates.values() if one.rank <= count), key=lambda one: one.rank)
            content.append(ChatTokenLogprob(own.token, own.logprob, own.bytes, [_scored(one) for one in best[:count]]))
        return ChatLogprobs(content)


def _scored(candidate: Logprob) -> TokenLogprob:
    text = candidate.decoded_token or ""
    return TokenLogprob(text, candidate.logprob, None if "\ufffd" in text else list(text.encode()))
