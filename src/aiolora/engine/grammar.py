"""Grammars: what an answer must match, compiled by llguidance; the only home of that library.

SamplingParams -> Grammars.take or .wait -> CompiledGrammar (any thread) -> begin() -> TokenMatcher (one answer's).
"""

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from msgspec import structs

from aiolora.engine.beside import beside, takes_long
from aiolora.errors import RequestError
from aiolora.types import SamplingParams, StructuredOutputsParams

COMPILE_TIMEOUT_S = 10.0  # the worst of 256 KB that was tried takes 0.8 s of one core
MAX_SOURCE = 256 << 10  # characters
MAX_GBNF = 16 << 10  # its conversion is Python, and quadratic: a chain of 900 rules takes 2 s
_LARK = re.compile(r"(?m)^[ \t]*(%llguidance\b|start[ \t]*:)")  # what tells Lark's notation from GBNF
_CACHE_NBYTES = 128 << 20
_COMPILERS = 2
# of one answer: 200k of fuel are some 15 ms a token; a state takes 1 to 2 KB, and no schema of benchmarks.schemas 1,000
_LIMITS = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)
# pretty-printed or not, but no model can put off its answer by blanks without end
WHITESPACE = r"[ ]?|\n {0,40}"

_Wish: TypeAlias = tuple[str, str]  # its kind, and the text of it


class TokenMatcher:
    """Where one answer is in its grammar. `bits` and `error` may be read while `ready`.

    `ends`: tokens that end the answer wherever `end` may. `advance` is called by one thread at a time.
    """

    __slots__ = ("_end", "_ends", "_matcher", "bits", "error", "ready", "took_s")

    def __init__(self, matcher: LLMatcher, bits: bytes, end: int, ends: Collection[int]) -> None:
        self._matcher = matcher
        self._end, self._ends = end, ends
        self.bits = self._with_ends(bits)  # int32 words, a bit a token from the lowest on: which may come next
        self.error: str | None = None
        self.ready = True
        self.took_s = 0.0  # the most that a token has taken, a tenth less with each since

    def advance(self, token: int) -> None:
        """Take `token` in and compute the next mask, without the GIL; `ready` afterwards, be it with an `error`."""
        begun = time.perf_counter()
        try:
            if self._matcher.consume_token(token):
                self.bits = self._with_ends(self._matcher.compute_bitmask())
            self.error = self._matcher.get_error() or None
        except BaseException as error:  # a panic of the library is one: it is nobody else's business
            self.error = repr(error)
        self.took_s = max(time.perf_counter() - begun, 0.9 * self.took_s)
        self.ready = True

    def _with_ends(self, bits: bytes) -> bytes:
        """As many words more as the ends need: those of an adapter may be tokens that the base has not."""
        if not self._ends or not bits[self._end // 8] >> self._end % 8 & 1:
            return bits
        more = bytearray(bits.ljust(4 * (max(self._ends) // 32 + 1), b"\0"))
        for end in self._ends:
            more[end // 8] |= 1 << end % 8
        return bytes(more)


class CompiledGrammar:
    """A grammar at its beginning, over the base's tokens, one of which ends a text: `end`. Immutable; any thread."""

    def __init__(self, matcher: LLMatcher, end: int) -> None:
        self._matcher = matcher
        self._bits = matcher.compute_bitmask()
        self._end = end

    def begin(self, ends: Collection[int] | None = None) -> TokenMatcher:
        """A matcher for one more answer; copies nothing large (1 us).

        `ends`: of an adapter with a tokenizer of its own. What it adds else to the base's tokens is never allowed.
        """
        return TokenMatcher(self._matcher.deep_copy(), self._bits, self._end, ends or ())


class Grammars:
    """Compiles grammars in threads of its own, each once, and keeps those used last, up to some bytes.

    Owned by the loop, or by a blocking caller.
    """

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """Holds the GIL for about a second a 50k tokens: call it where nobody is served yet."""
        ends = sorted(end for end in eos_token_ids if end < vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._why_not = "the model names no token that ends a text"
        if ends:
            try:
                self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
            except Exception as error:  # whatever llguidance does not read: everything else is served all the same
                self._why_not = f"its tokenizer is not one that can be constrained: {error}"
        self._pool = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="aiolora-grammar")
        self._cache: OrderedDict[_Wish, Future[CompiledGrammar | str]] = OrderedDict()
        self._nbytes = 0

    async def take(self, params: SamplingParams | None) -> CompiledGrammar | None:
        """What answers must match, if anything. Raises `RequestError` where that cannot be compiled, or not in time."""
        if params is None or params.structured_outputs is None:
            return None
        wanted = params.structured_outputs
        compiled = asyncio.wrap_future(self._compiled(await beside(takes_long(wanted), _wish, wanted)))
        try:
            return _usable(await asyncio.wait_for(asyncio.shield(compiled), COMPILE_TIMEOUT_S))
        except TimeoutError:
            raise _too_slow() from None

    def wait(self, params: SamplingParams | None) -> CompiledGrammar | None:
        """As `take`; blocks."""
        if params is None or params.structured_outputs is None:
            return None
        try:
            return _usable(self.compile(params.structured_outputs).result(COMPILE_TIMEOUT_S))
        except TimeoutError:
            raise _too_slow() from None

    def compile(self, wanted: StructuredOutputsParams) -> Future[CompiledGrammar | str]:
        """The grammar, once it is compiled, or why it cannot be. Others may wait for it, too: never cancel it.

        Raises `RequestError` for what need not be tried.
        """
        return self._compiled(_wish(wanted))

    def _compiled(self, wish: _Wish) -> Future[CompiledGrammar | str]:
        if self._tokenizer is None:
            raise RequestError(f"structured_outputs cannot be had: {self._why_not}", param="structured_outputs")
        found = self._cache.get(wish)
        if found is not None:
            self._cache.move_to_end(wish)
            return found
        compiled = self._cache[wish] = self._pool.submit(_compile, self._tokenizer, wish)
        self._nbytes += _nbytes(wish[1])
        while self._nbytes > _CACHE_NBYTES and len(self._cache) > 1:
            (_, dropped), _ = self._cache.popitem(last=False)
            self._nbytes -= _nbytes(dropped)
        return compiled


def _compile(tokenizer: LLTokenizer, wish: _Wish) -> CompiledGrammar | str:
    """In a worker thread; drops the GIL but for GBNF, which is converted in Python."""
    try:
        matcher = LLMatcher(tokenizer, _source(*wish), log_level=0, limits=_LIMITS)
        compiled = None if matcher.is_error() else CompiledGrammar(matcher, tokenizer.eos_token)
    except BaseException as error:  # what is malformed raises several kinds, a panic of the library among them
        return _brief(str(error) or repr(error))
    return _brief(matcher.get_error()) if matcher.is_error() or compiled is None else compiled


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
    if kind == "json":
        source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    elif kind == "regex":
        source = LLMatcher.grammar_from_regex(text)
    elif kind == "choice":
        source = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in json.loads(text)))
    else:
        source = LLMatcher.grammar_from_lark(gbnf_to_lark(text) if kind == "gbnf" else text)
    return str(source)


def _nbytes(text: str) -> int:
    """About what a grammar compiled from `text` takes: 70 KB to 210 KB for schemas of 120 to 1,400 characters."""
    return 100 * (1024 + len(text))


def _brief(message: str) -> str:
    return message.split("\n<state>")[0].strip()[:500]
