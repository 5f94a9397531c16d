"""Assembler: token deltas of one request become text, stop strings end it, answers become a RequestOutput."""

import time

from aiolora.tokenizer import Tokenizer
from aiolora.types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    TokenDelta,
    TokenOutput,
)


class Assembler:
    """One request on its way out. Serves the blocking faces and the async one; not shared between threads."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self._answers = [_Answer(request, index, tokenizer) for index in range(request.params.n)]
        self._unfinished = request.params.n
        self._scored = request.params.logprobs is not None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._metrics = RequestMetrics(arrival_time=request.arrival_s)

    @property
    def finished(self) -> bool:
        """Whether every answer has ended."""
        return self._unfinished == 0

    @property
    def metrics(self) -> RequestMetrics:
        """The times known so far."""
        return self._metrics

    def feed(self, delta: TokenDelta) -> TokenOutput | None:
        """Take one delta in; None where it brings nothing to an answer that has ended.

        Raises the delta's error: this request failed, others did not.
        """
        if delta.error is not None:
            try:
                raise delta.error
            finally:
                del delta  # the error leads to this frame, which must not lead to the error
        answer = self._answers[delta.index]
        if answer.finish_reason is not None:
            return None
        if delta.token_id is None:  # ended from outside
            answer.finish_reason = delta.finish_reason
            self._end_of_one()
            return None
        if self._metrics.first_token_time is None:
            self._metrics.first_token_time = time.monotonic()
            self._metrics.scheduled_time = delta.started_s
        if delta.prompt_logprobs is not None:
            self.take_prompt(delta)
        top = self._top(delta.token_id, delta) if self._scored else None
        output = answer.feed(delta.token_id, delta, top)
        if output.finish_reason is not None:
            self._end_of_one()
        return output

    def take_prompt(self, delta: TokenDelta) -> None:
        """Word the scores of the prompt, which may take a second, ahead of `feed`: that needs not do it then."""
        if self._prompt_logprobs is None and delta.prompt_logprobs is not None:
            self._prompt_logprobs = [
                None if chosen is None else {token: self._logprob(token, value, rank) for token, value, rank in chosen}
                for chosen in delta.prompt_logprobs
            ]

    def output(self) -> RequestOutput:
        """The request and its answers as they stand."""
        request = self.request
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[answer.output() for answer in self._answers],
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            lora_request=request.lora_request,
            adapter="+".join(version.label for version in request.mix.versions) if request.mix else None,
            metrics=self._metrics,
        )

    def _end_of_one(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._metrics.finished_time = time.monotonic()

    def _top(self, token_id: int, delta: TokenDelta) -> dict[int, Logprob]:
        top = {token_id: self._logprob(token_id, delta.logprob, delta.rank)}
        for rank, (token, value) in enumerate(delta.top, start=1):
            top.setdefault(token, self._logprob(token, value, rank))
        return top

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self.tokenizer.decode([token]))


class _Answer:
    """Text and tokens of one of the n answers."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer) -> None:
        params = request.params
        self._index = index
        self._stops = tuple(params.stop)
        self._begin = frozenset("".join(stop[:-1] for stop in self._stops))  # characters that a held text may end with
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        self._stream = tokenizer.stream(request.prompt_token_ids, skip_special=params.skip_special_tokens)
        self._sent: list[str] = []
        self._held = ""  # the end of the text, not sent: it may be the beginning of a stop string
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative = 0.0
        self.finish_reason: FinishReason | None = None
        self._stop_reason: int | str | None = None

    def feed(self, token_id: int, delta: TokenDelta, top: dict[int, Logprob] | None) -> TokenOutput:
        self._token_ids.append(token_id)
        self._cumulative += delta.logprob
        if self._logprobs is not None and top is not None:
            self._logprobs.append(top)
        self.finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        silent = delta.finish_reason == "stop" and not self._shows_stop  # a stop token, or the end of the text
        text = "" if silent else self._stream.push(token_id)
        if self.finish_reason is not None:
            text += self._stream.flush()
        if self._stops:
            text = self._before_stop(text)
        if text:
            self._sent.append(text)
        return TokenOutput(
            text=text,
            token_id=token_id,
            logprob=delta.logprob,
            top_logprobs=top,
            index=self._index,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def output(self) -> CompletionOutput:
        self._sent = ["".join(self._sent)]
        return CompletionOutput(
            index=self._index,
            text=self._sent[0],
            token_ids=list(self._token_ids),
            cumulative_logprob=self._cumulative,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )

    def _before_stop(self, newest: str) -> str:
        """What may be sent now that `newest` has come; a stop string that it completes ends the answer."""
        text, before = self._held + newest, len(self._held)
        if not text:
            return ""
        self._held = ""
        if len(self._token_ids) >= self._min_tokens:
            # whatever could begin a stop string was held, so none begins in what was sent
            found = [stop for stop in self._stops if text.find(stop, max(0, before - len(stop) + 1)) >= 0]
            if found:
                at, stop = min((text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in found)
                self.finish_reason, self._stop_reason = "stop", stop
                return text[: at + len(stop) if self._shows_stop else at]
        if self.finish_reason is not None or text[-1] not in self._begin:
            return text
        ready = len(text) - _beginning_of_any(self._stops, text)
        self._held = text[ready:]
        return text[:ready]


def _beginning_of_any(stops: tuple[str, ...], text: str) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        size = min(len(stop) - 1, len(text))
        while size > longest:  # only where the beginning ends as the text does
            size = stop.rfind(text[-1], 0, size) + 1
            if size > longest and text.endswith(stop[:size]):
                longest = size
                break
            size -= 1
    return longest
