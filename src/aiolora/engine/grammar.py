"""Grammars: what an answer must match, compiled by llguidance; the only home of that library.

SamplingParams -> Grammars.take or .wait -> CompiledGrammar (any thread) -> begin() -> TokenMatcher (one answer's).

What can be interrupted of llguidance (1.9): nothing. To compile is one call into Rust, without the GIL, that takes no
deadline and hears no cancellation (the handle that its C interface has is for masks, and not in its Python one). What
bounds it is its fuel: so a time limit is when the caller stops waiting, and what runs is left to end.
"""

import asyncio
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
from msgspec import structs

from aiolora.engine.beside import beside, takes_long
from aiolora.engine.lines import Lines
from aiolora.errors import GrammarBusyError, RequestError
from aiolora.types import Matcher, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:  # imported in a worker thread when it is first needed
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

COMPILE_TIMEOUT_S = (
    10.0  # from its begin, wherever it waited; the worst of 256 KB that was tried takes 0.8 s of one core
)
MAX_SOURCE = 256 << 10  # characters
MAX_GBNF = 16 << 10  # its conversion is Python, and quadratic: a chain of 900 rules takes 2 s
_LARK = re.compile(r"(?m)^[ \t]*(%llguidance\b|start[ \t]*:)")  # what tells Lark's notation from GBNF
_SLOW_S = 0.0005  # of a core; a token of most grammars takes some 20 us
_LATE_S, _EACH_S = 0.001, 0.00005  # for several together, and for each of them: more is late
_CACHE_NBYTES = 128 << 20
_COMPILERS = 2
_THREADS = 64  # with those that go on beyond their time
MAX_WAITING = 4 << 20  # characters of grammars in the line of one owner, each at least _LEAST
_LEAST = 1024
# of one answer: 200k of fuel are some 15 ms a token; a state takes 1 to 2 KB, and no schema of benchmarks.schemas 1,000
_LIMITS: dict[str, Any] = {"max_lexer_states": 10_000, "verbose_errors": False}
# pretty-printed or not, but no model can put off its answer by blanks without end
WHITESPACE = r"[ ]?|\n {0,40}"

T = TypeVar("T")
_Wish: TypeAlias = tuple[str, str]  # its kind, and the text of it


class TokenMatcher:
    """Where one answer is in its grammar. `bits` and `error` may be read while `ready`.

    `ends`: tokens that end the answer wherever `end` may. It is advanced by one thread at a time.
    """

    __slots__ = ("_end", "_ends", "_matcher", "_nbytes", "_took_s", "bits", "error", "ready", "slow", "suspect")

    def __init__(self, matcher: "LLMatcher", bits: bytes, end: int, ends: Collection[int]) -> None:
        self._matcher = matcher
        self._end, self._ends, self._nbytes = end, ends, len(bits)
        self.bits = self._with_ends(bits)  # int32 words, a bit a token from the lowest on: which may come next
        self.error: str | None = None
        self.ready = True
        self.slow = self.suspect = False
        self._took_s = 0.0  # the most that a token has taken, a tenth less with each since

    def advance(self, token: int) -> None:
        """Take `token` in and compute the next mask, without the GIL; `ready` afterwards, be it with an `error`."""
        begun = time.thread_time()
        try:
            if self._matcher.consume_token(token):
                self.bits = self._with_ends(self._matcher.compute_bitmask()[: self._nbytes])
            self.error = self._matcher.get_error() or None
        except BaseException as error:  # a panic of the library is one: it is nobody else's business
            self.error = repr(error)
        self._took_s = max(time.thread_time() - begun, 0.9 * self._took_s)
        self.slow, self.suspect = self._took_s > _SLOW_S, False
        self.ready = True

    def _with_ends(self, bits: bytes) -> bytes:
        """As many words more as the ends need: those of an adapter may be tokens that the base has not."""
        if not self._ends or not bits[self._end // 8] >> self._end % 8 & 1:
            return bits
        more = bytearray(bits.ljust(4 * (max(self._ends) // 32 + 1), b"\0"))
        for end in self._ends:
            more[end // 8] |= 1 << end % 8
        return bytes(more)


class Together:
    """`TokenMatcher.advance` of several at once: two calls for all, in threads of the library's, without the GIL.

    For one thread at a time. A panic over one of them is the library's own affair: it becomes that one's error.
    """

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def __call__(self, landed: Sequence[tuple[Matcher, int]]) -> None:
        begun = time.perf_counter()
        batch = [(cast("TokenMatcher", matcher), token) for matcher, token in landed]
        try:
            self._advance(batch)
        except BaseException as error:  # what should not happen; nobody is to wait for ever
            for matcher, _ in batch:
                matcher.error = repr(error)
        late = time.perf_counter() - begun > _LATE_S + len(batch) * _EACH_S
        for matcher, _ in batch:
            matcher.suspect = late
            matcher.ready = True

    def _advance(self, batch: list[tuple[TokenMatcher, int]]) -> None:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        taken = self._executor.consume_token_par([(matcher._matcher, token) for matcher, token in batch])
        going = [matcher for (matcher, _), well in zip(batch, taken) if well]
        if going:
            nbytes = going[0]._nbytes  # of one tokenizer, all of them
            masks = np.empty((len(going), nbytes), dtype=np.uint8)
            places = [(matcher._matcher, row) for row, matcher in enumerate(going)]
            self._executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, nbytes, len(going))
            for matcher, bits in zip(going, masks):
                matcher.bits = matcher._with_ends(bits.tobytes())
        for matcher, _ in batch:
            matcher.error = matcher._matcher.get_error() or None


class CompiledGrammar:
    """A grammar at its beginning, over the base's tokens, one of which ends a text. Immutable; any thread."""

    def __init__(self, matcher: "LLMatcher", tokenizer: "LLTokenizer") -> None:
        self._matcher = matcher
        self._bits = matcher.compute_bitmask()[: 4 * -(-tokenizer.vocab_size // 32)]  # it adds a word to whole ones
        self._end = tokenizer.eos_token

    def begin(self, ends: Collection[int] | None = None) -> TokenMatcher:
        """A matcher for one more answer; copies nothing large (1 us).

        `ends`: of an adapter with a tokenizer of its own. What it adds else to the base's tokens is never allowed.
        """
        return TokenMatcher(self._matcher.deep_copy(), self._bits, self._end, ends or ())


class _Work(NamedTuple):
    """A grammar that is being compiled, or was. Others may wait for it, too: never cancel it."""

    done: "Future[CompiledGrammar | str]"  # why it cannot be
    until: float  # time.monotonic() at which one no longer waits


class Grammars:
    """Compiles grammars in threads of its own, each once, and keeps those used last, up to some bytes.

    An owner's are compiled one after another, and owners take turns. Owned by the loop, or by a blocking caller.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        ends = sorted(end for end in eos_token_ids if end < vocab_size)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="aiolora-grammar")
        self._read: Callable[[], LLTokenizer | str] = partial(_read, tokenizer_json, vocab_size, ends)
        self._tokenizer: Future[LLTokenizer | str] | None = None
        self._lines: Lines[_Wish] = Lines(_COMPILERS, most=MAX_WAITING, patience_s=COMPILE_TIMEOUT_S)
        self._cache: OrderedDict[_Wish, _Work] = OrderedDict()
        self._nbytes = 0

    def load(self) -> "Future[LLTokenizer | str]":
        """Import the library and read the tokenizer, once, in a thread; or why that cannot be.

        Holds the GIL for about a second a 150k tokens: best begun where nobody is served yet.
        """
        if self._tokenizer is None:
            self._tokenizer = self._pool.submit(self._read)
        return self._tokenizer

    async def take(self, params: SamplingParams | None, owner: str = "") -> CompiledGrammar | None:
        """What answers must match, if anything. `owner`: behind whose grammars it has to wait.

        Raises `RequestError` where it cannot be compiled, or not in time, and `GrammarBusyError`.
        """
        if params is None or params.structured_outputs is None:
            return None
        wanted = params.structured_outputs
        wish = await beside(takes_long(wanted), _wish, wanted)
        tokenizer = _readable(await _ended(self.load()))
        work = self._kept(wish)
        if work is None:
            self._check_room(owner, wish)
            work = await self._lines.begin(owner, wish, lambda: self._compiled(tokenizer, wish))
        try:
            return _usable(await _ended(work.done, work.until))
        except TimeoutError:
            raise _too_slow() from None

    def wait(self, params: SamplingParams | None) -> CompiledGrammar | None:
        """As `take`, for who is the only one to ask; blocks."""
        if params is None or params.structured_outputs is None:
            return None
        wish = _wish(params.structured_outputs)
        work = self._compiled(_readable(self.load().result()), wish)
        try:
            return _usable(work.done.result(max(work.until - time.monotonic(), 0.0)))
        except TimeoutError:
            raise _too_slow() from None

    def _kept(self, wish: _Wish) -> _Work | None:
        found = self._cache.get(wish)
        if found is not None:
            self._cache.move_to_end(wish)
        return found

    def _compiled(self, tokenizer: "LLTokenizer", wish: _Wish) -> _Work:
        """What there is of it, or the beginning of that."""
        found = self._kept(wish)
        if found is not None:
            return found
        done = self._pool.submit(_compile, tokenizer, wish)
        work = self._cache[wish] = _Work(done, time.monotonic() + COMPILE_TIMEOUT_S)
        self._nbytes += _nbytes(wish)
        while self._nbytes > _CACHE_NBYTES and len(self._cache) > 1:
            dropped, _ = self._cache.popitem(last=False)
            self._nbytes -= _nbytes(dropped)
        return work

    def _check_room(self, owner: str, wish: _Wish) -> None:
        much = self._lines.overfull(owner, wish, _size)
        if much is not None:
            raise GrammarBusyError(
                f"structured_outputs: with this one {much} characters of grammars would wait to be compiled; the limit "
                f"is {MAX_WAITING}: ask again when some have been answered, or for grammars that are equal",
                param="structured_outputs",
            )


def _read(tokenizer_json: str, vocab_size: int, ends: list[int]) -> "LLTokenizer | str":
    """In a worker thread: what llguidance knows of the tokens, or why it cannot."""
    if not ends:
        return "the model names no token that ends a text"
    try:
        from llguidance import LLTokenizer

        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
    except ImportError as error:
        return f"the package llguidance cannot be imported ({error}); install it with: pip install llguidance"
    except BaseException as error:  # whatever it does not read, or panics of: everything else is served all the same
        return f"its tokenizer is not one that can be constrained: {error}"


def _readable(tokenizer: "LLTokenizer | str") -> "LLTokenizer":
    """Raises `RequestError` where it is none."""
    if isinstance(tokenizer, str):
        raise RequestError(f"structured_outputs cannot be had: {tokenizer}", param="structured_outputs")
    return tokenizer


def _compile(tokenizer: "LLTokenizer", wish: _Wish) -> CompiledGrammar | str:
    """In a worker thread; drops the GIL but for GBNF, which is converted in Python."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        matcher = LLMatcher(tokenizer, _source(*wish), log_level=0, limits=LLParserLimits(**_LIMITS))
        compiled = None if matcher.is_error() else CompiledGrammar(matcher, tokenizer)
    except BaseException as error:  # what is malformed raises several kinds, a panic of the library among them
        return _brief(str(error) or repr(error))
    return _brief(matcher.get_error()) if matcher.is_error() or compiled is None else compiled


async def _ended(work: Future[T], until: float = math.inf) -> T:
    """Its result. Raises `TimeoutError` when it is `until` on the clock of `time.monotonic`; the work goes on."""
    if not work.done():
        left = None if until == math.inf else max(until - time.monotonic(), 0.0)
        await asyncio.wait([asyncio.wrap_future(work)], timeout=left)
    return work.result(0)


def _usable(compiled: CompiledGrammar | str) -> CompiledGrammar:
    """What was compiled. Raises `RequestError`, one of each caller's own, where it is no grammar."""
    if isinstance(compiled, str):
        raise RequestError(f"structured_outputs: {compiled}", param="structured_outputs")
    return compiled


def _too_slow() -> RequestError:
    return RequestError(
        f"structured_outputs was not compiled within {COMPILE_TIMEOUT_S:g} s; make it smaller or try again",
        param="structured_outputs",
    )


def _wish(wanted: StructuredOutputsParams) -> _Wish:
    """Equal wishes mean equal grammars. Raises `RequestError` for one that is too long."""
    given = {name: value for name, value in structs.asdict(wanted).items() if value is not None and value != ()}
    kind, said = next((name, value) for name, value in given.items() if (name, value) != ("json_object", False))
    if kind == "json_object":
        kind, said = "json", {"type": "object"}
    if kind == "grammar" and _LARK.search(said) is None:
        kind = "gbnf"
    try:
        text = said if isinstance(said, str) else json.dumps(said)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs: {error}", param="structured_outputs") from None
    limit = MAX_GBNF if kind == "gbnf" else MAX_SOURCE
    if len(text) > limit:
        raise RequestError(
            f"structured_outputs: {kind} has {len(text)} characters; the limit is {limit}", param="structured_outputs"
        )
    return kind, text


def _source(kind: str, text: str) -> str:
    """What llguidance compiles. Raises what its converters raise."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if kind == "json":
        source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    elif kind == "regex":
        source = LLMatcher.grammar_from_regex(text)
    elif kind == "choice":
        source = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in json.loads(text)))
    else:
        source = LLMatcher.grammar_from_lark(gbnf_to_lark(text) if kind == "gbnf" else text)
    return str(source)


def _size(wish: _Wish) -> int:
    return max(len(wish[1]), _LEAST)


def _nbytes(wish: _Wish) -> int:
    """About what it takes when it is compiled: 70 KB to 210 KB for schemas of 120 to 1,400 characters."""
    return 100 * (1024 + len(wish[1]))


def _brief(message: str) -> str:
    return message.split("\n<state>")[0].strip()[:500]
