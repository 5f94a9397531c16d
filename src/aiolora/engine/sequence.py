"""Sequence: one answer in the making, inside the engine."""

import enum
import random
from array import array
from hashlib import blake2b

from aiolora.types import FinishReason, Matcher, Mix, Request, SamplingParams

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
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.stop_token_ids = frozenset(request.params.stop_token_ids)
        self.max_length = max_length  # it ends when it has that many tokens
        self.num_computed = 0
        self.num_landed = 0
        self.num_pending = 0  # sampled by steps that have not landed: token ids not known yet
        self.num_flights = 0  # steps launched with it and not landed
        self.pages = array("i")  # C integers: a step copies them by the hundred
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.holds = False  # pages and leases still to be given back once the last flight has landed
        self.matcher: Matcher | None = None if request.grammar is None else request.grammar.begin()
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
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    def page_key(self, page_index: int, page_size: int) -> bytes:
        """What the keys and values of that page depend on: the mix and all tokens up to the page's end.

        A chain of keyed digests, so equal keys mean equal prefixes under equal adapters. The one place that makes keys.
        """
        while len(self._keys) <= page_index:
            start = len(self._keys) * page_size
            page_tokens = self.tokens[start : start + page_size]
            assert len(page_tokens) == page_size, "a page is not full"
            before = self._keys[-1] if self._keys else b"base" if self.mix is None else b"mix:" + self.mix.key
            content = array("i", page_tokens).tobytes()
            self._keys.append(blake2b(before + content, digest_size=16, key=_PROCESS_SECRET).digest())
        return self._keys[page_index]
