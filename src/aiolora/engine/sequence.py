"""Sequence: one answer in the making, inside the engine."""

import enum
import random
from array import array
from hashlib import blake2b

from aiolora.types import FinishReason, Matcher, Mix, Request, SamplingParams

PRIORITY_S = 10.0  # of waiting that a unit of priority is worth: nobody is overtaken for ever by those that come later
_PROCESS_SECRET = random.SystemRandom().randbytes(32)  # so that nobody can craft prompts that collide in the cache


class Status(enum.Enum):
    """Where a sequence is. It holds pages and leases exactly while RUNNING, or while a step with it has not landed."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One of a request's n answers: its tokens, its pages, how far it is. Engine thread only.

    tokens[:num_computed] have their keys and values in `pages` as soon as every launched step has landed.
    """

    def __init__(self, request: Request, index: int, *, seed: int, number: int, max_length: int) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.number = number  # order of arrival
        self.turn = (request.arrival_s + PRIORITY_S * request.priority, number)  # its place among those of its mix
        # and among all that run: they give way from the end, and nobody's priority is at the cost of other mixes
        self.seniority = (request.arrival_s + PRIORITY_S * max(request.priority, 0), number)
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.active_from = request.active_from  # position; tokens before it are the base's
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.max_length = max_length  # it ends when it has that many tokens
        self.num_computed = 0
        self.num_landed = 0
        self.num_pending = 0  # sampled by steps that have not landed: token ids not known yet
        self.missed = False  # a step has computed its last token, and there was no mask to choose the next one by
        self.num_flights = 0  # steps launched with it and not landed
        self.pages = array("i")  # C integers: a step copies them by the hundred
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.started_s: float | None = None  # when it first left the queue, on the scheduler's clock
        self.holds = False  # pages and leases still to be given back once the last flight has landed
        grammar = request.grammar
        self.matcher: Matcher | None = None if grammar is None else grammar.begin(request.eos_token_ids)
        self.prompt_logprobs: list[tuple[tuple[int, float, int], ...] | None] = [None]
        self._keys: list[bytes] = []

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def mix(self) -> Mix | None:
        return self.request.mix

    @property
    def length(self) -> int:
        """Tokens known plus tokens in flight."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def unsure(self) -> bool:
        """Whether nobody knows yet what may come next: its grammar has not seen the token in flight, or has no mask."""
        return self.matcher is not None and (self.num_pending > 0 or not self.matcher.ready)

    @property
    def sits_out(self) -> bool:
        """Whether the next step is without it: `unsure`, and its mask is not likely to come while the step computes."""
        return self.unsure and (self.num_pending > 0 or self.missed or self.matcher is None or self.matcher.slow)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def page_key(self, page_index: int, page_size: int) -> bytes:
        """What the keys and values of that page depend on: all tokens up to its end, and from which of them on the mix.

        A chain of keyed digests, so equal keys mean equal prefixes under equal adapters at work from equal positions;
        pages before that position have the base's keys. An image or a recording is told by its digest in the page in
        which it begins, whatever tokens stand for it. The one place that makes keys.
        """
        joins, offset = divmod(self.active_from, page_size)
        while len(self._keys) <= page_index:
            start = len(self._keys) * page_size
            page_tokens = self.tokens[start : start + page_size]
            assert len(page_tokens) == page_size, "a page is not full"
            before = self._keys[-1] if self._keys else b"base"
            if self.mix is not None and len(self._keys) == joins:
                before += b"mix:" + self.mix.key + offset.to_bytes(4)
            content = array("i", page_tokens).tobytes()
            for item in self.request.media:
                if start <= item.start < start + page_size:
                    content += item.start.to_bytes(8) + item.digest
            self._keys.append(blake2b(before + content, digest_size=16, key=_PROCESS_SECRET).digest())
        return self._keys[page_index]
