"""POST /v1/completions: a text, or several, go on."""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from litestar import Response, post
from msgspec import UNSET, structs

from aiolora.api.decode import LONG, decode, sampling, structure
from aiolora.api.document import GENERATES
from aiolora.api.errors import ErrorBody, HTTPRequest, naming
from aiolora.api.leaving import answered_before_leaving
from aiolora.api.scores import check_scored
from aiolora.api.serving import Served, Serving
from aiolora.api.sse import DONE, HOLE, Mould, frames
from aiolora.api.wire import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from aiolora.engine.beside import beside
from aiolora.engine.output import Assembler
from aiolora.errors import RequestError
from aiolora.types import FinishReason, Logprob, Prompt, RequestOutput, SamplingParams, TokenOutput

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_CHOICES = 2048  # prompts times n

Scored: TypeAlias = tuple[int, dict[int, Logprob] | None]  # a token, and what was likely in its place
End: TypeAlias = tuple[FinishReason | None, int | str | None]  # finish reason, stop reason


@post(
    "/v1/completions",
    status_code=200,
    operation_id="completions",
    tags=["generation"],
    opt={"reads": CompletionRequest, "streams": Completion, "fails": GENERATES},
)
async def completions(request: HTTPRequest, serving: Served) -> Response[Completion]:
    """Continue one prompt or several, each n times; choice i of prompt p has the index p * n + i."""
    return await answered_before_leaving(request, _answer(serving, await request.body()))


async def _answer(serving: Serving, body: bytes) -> Response[Completion]:
    said, prompts, params = await beside(len(body) > LONG, _read, body)
    if len(prompts) * params.n > _MAX_CHOICES:
        raise RequestError(f"{len(prompts)} prompts with n={params.n}: at most {_MAX_CHOICES} answers", param="prompt")
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    with naming(structured_outputs=structure(said)[0]):
        assemblers = await serving.prepare(answer_id, said, await serving.settle(said), prompts, params)
    field = "logprobs" if said.prompt_logprobs is None else "prompt_logprobs"
    check_scored(assemblers, copies=params.n, param=field)
    reply = _Reply(said, answer_id, assemblers)
    return await serving.respond(assemblers, reply, stream=bool(said.stream))


def _read(body: bytes) -> tuple[CompletionRequest, list[Prompt], SamplingParams]:
    said = decode(CompletionRequest, body)
    return said, _prompts(said), _params(said)


def _prompts(said: CompletionRequest) -> list[Prompt]:
    """One text, one list of token ids, or a list of either."""
    given = said.prompt
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    if not ids and given:
        return [item for item in given if not isinstance(item, int)]
    if len(ids) != len(given):
        raise RequestError("prompt mixes token ids with prompts; send a list of one kind", param="prompt")
    return [ids]


def _params(said: CompletionRequest) -> SamplingParams:
    if said.best_of is not None and said.best_of != (said.n or 1):
        raise RequestError(f"best_of={said.best_of} is not served, only n={said.n or 1}", param="best_of")
    max_tokens = _DEFAULT_MAX_TOKENS if said.max_tokens is None else said.max_tokens
    if max_tokens == 0 and not said.echo:
        raise RequestError("max_tokens=0 brings nothing without echo=true", param="max_tokens")
    params = sampling(said, max_tokens=max_tokens or 1, logprobs=said.logprobs)  # a step brings at least one token
    if said.echo and said.logprobs is not None:
        return structs.replace(params, prompt_logprobs=max(said.logprobs, params.prompt_logprobs or 0))
    return params


class _Reply:
    """Words one completion request: all its prompts and all their answers."""

    def __init__(self, said: CompletionRequest, answer_id: str, assemblers: Sequence[Assembler]) -> None:
        self._said = said
        self._assemblers = assemblers
        self._tokenizer = assemblers[0].tokenizer  # of one model
        self._n = said.n or 1
        self._silent = said.max_tokens == 0  # only the prompt is wanted
        self._offsets: dict[int, int] = {}  # choice -> characters so far; a choice is absent before its first token
        usage = None if said.wants_usage else UNSET
        self._body = Completion(answer_id, int(time.time()), said.model, [], usage)
        self._mould = Mould(self._with(CompletionChoice(0, HOLE, None, None)))
        # tokens are nothing but text
        self._plain = said.logprobs is None and said.prompt_logprobs is None and not said.echo

    def opening(self) -> bytes:
        return b""

    def token(self, position: int, output: TokenOutput) -> bytes:
        index = position * self._n + output.index
        if self._plain and output.finish_reason is None:
            return self._mould.frame(index, output.text)
        begins = index not in self._offsets and (self._said.echo or self._said.prompt_logprobs is not None)
        source = self._assemblers[position].output() if begins else None
        scored: list[Scored] = [(output.token_id, output.top_logprobs)]
        end = (output.finish_reason, output.stop_reason)
        return frames([self._with(self._choice(index, output.text, scored, end, source))])

    def closing(self) -> bytes:
        if not self._said.wants_usage:
            return DONE
        usage = self._usage(assembler.output() for assembler in self._assemblers)
        return frames([structs.replace(self._body, usage=usage)]) + DONE

    def failed(self, error: ErrorBody) -> bytes:
        return frames([error])

    def whole(self) -> Completion:
        outputs = [assembler.output() for assembler in self._assemblers]
        choices = []
        for position, output in enumerate(outputs):
            for answer in output.outputs:
                scored: list[Scored] = list(zip(answer.token_ids, answer.logprobs or ()))
                end = (answer.finish_reason, answer.stop_reason)
                choices.append(self._choice(position * self._n + answer.index, answer.text, scored, end, output))
        return structs.replace(self._body, choices=choices, usage=self._usage(outputs))

    def _with(self, choice: CompletionChoice) -> Completion:
        return structs.replace(self._body, choices=[choice])

    def _choice(
        self, index: int, text: str, scored: list[Scored], end: End, source: RequestOutput | None
    ) -> CompletionChoice:
        """`source`: the request so far, where the choice begins and its prompt may belong to it."""
        if self._silent:
            text, scored, end = "", [], ("length", None)
        if source is not None and self._said.echo:
            text = self._prompt(source) + text
            scored = [*zip(source.prompt_token_ids, source.prompt_logprobs or ()), *scored]
        wants_prompt = source is not None and self._said.prompt_logprobs is not None
        offset = self._offsets.setdefault(index, 0)
        logprobs = None if self._said.logprobs is None else self._logprobs(scored, offset, self._said.logprobs)
        self._offsets[index] += sum(map(len, logprobs.tokens)) if logprobs else 0
        finish_reason, stop_reason = end
        return CompletionChoice(
            index,
            text,
            logprobs,
            finish_reason,
            stop_reason=stop_reason if finish_reason else UNSET,
            prompt_logprobs=source.prompt_logprobs or [] if source and wants_prompt else UNSET,
        )

    def _logprobs(self, scored: Iterable[Scored], offset: int, count: int) -> CompletionLogprobs:
        """OpenAI's four lists; the token itself is always among the likely ones, by its text."""
        lists = CompletionLogprobs()
        for token, likely in scored:
            own = likely[token] if likely else None
            text = (own.decoded_token if own else None) or self._tokenizer.decode([token])
            top: dict[str, float] = {}
            for candidate in sorted((likely or {}).values(), key=lambda one: one.rank):
                if candidate.rank <= count or candidate is own:
                    top.setdefault(candidate.decoded_token or "", candidate.logprob)
            lists.tokens.append(text)
            lists.token_logprobs.append(own.logprob if own else None)
            lists.top_logprobs.append(top if likely else None)
            lists.text_offset.append(offset)
            offset += len(text)
        return lists

    def _prompt(self, source: RequestOutput) -> str:
        return self._tokenizer.decode(source.prompt_token_ids) if source.prompt is None else source.prompt

    def _usage(self, outputs: Iterable[RequestOutput]) -> Usage:
        usage = Usage.of(outputs)
        return Usage(usage.prompt_tokens, 0, usage.prompt_tokens) if self._silent else usage
