"""The words of the house: frozen values that cross threads. No torch here.

A request names an adapter; inside, it carries an `AdapterVersion` (which bytes) in a `Mix` (deltas that add up).
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

from msgspec import Meta, Struct, convert
from msgspec.structs import fields, force_setattr

from aiolora.errors import ConfigError, RequestError

if TYPE_CHECKING:  # it has more modules than all that is imported with `aiolora`
    from numpy.typing import NDArray

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
Messages: TypeAlias = list[dict[str, object]]

Report: TypeAlias = Callable[[str, int, int], None]  # progress of a long start: what, how many are done, of how many

MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_TOKEN_IDS = 1024
MAX_BIAS = 1e15  # whatever else a request wants of its logits, they stay finite in float32
NEVER = sys.maxsize  # a position that no sequence reaches

_fields = cache(fields)  # evaluates annotations, which takes longer than to check values against them


class Conversation(Struct, frozen=True, kw_only=True):
    """Messages and what the model's chat template is to make of them."""

    messages: Messages
    tools: Annotated[list[dict[str, object]] | None, Meta(description="functions that may be called")] = None
    add_generation_prompt: Annotated[bool, Meta(description="the model's turn begins")] = True
    continue_final_message: Annotated[bool, Meta(description="the last message is not closed")] = False
    template_kwargs: Annotated[Mapping[str, object], Meta(description="what else the template reads")] = {}


Prompt: TypeAlias = str | list[int] | Mapping[str, object] | Conversation


class StructuredOutputsParams(Struct, frozen=True, kw_only=True):
    """What an answer must match: exactly one of these. Raises `RequestError`."""

    json: Annotated[dict[str, object] | str | bool | None, Meta(description="a JSON schema, or its text")] = None
    regex: Annotated[str | None, Meta(description="a regular expression for the whole answer")] = None
    choice: Annotated[Sequence[str] | None, Meta(description="one of these texts")] = None
    grammar: Annotated[str | None, Meta(description="a grammar in Lark's notation or in llama.cpp's GBNF")] = None
    json_object: Annotated[bool | None, Meta(description="any JSON object")] = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) not in (None, (), [])]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give one of json, regex, choice, grammar "
                "and json_object",
                param="structured_outputs",
            )
        if self.choice is not None:
            force_setattr(self, "choice", tuple(self.choice))


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How to choose tokens, and when to stop.

    Raises `RequestError` (with `param`) for a value out of its bounds, NaN included.
    """

    n: Annotated[int, Meta(ge=1, le=MAX_N, description="answers to one prompt")] = 1
    temperature: Annotated[float, Meta(ge=0, le=100, description="0: greedy")] = 1.0
    top_k: Annotated[int, Meta(ge=-1, description="keep the k most likely tokens; 0 or -1: all")] = 0
    top_p: Annotated[float, Meta(gt=0, le=1, description="keep the smallest set of that probability")] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1, description="drop tokens under min_p times the likeliest")] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100, description="over prompt and output; 1: none")] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2, description="over the output; 0: none")] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2, description="over the output, per use; 0: none")] = 0.0
    logit_bias: Annotated[
        dict[int, Annotated[float, Meta(ge=-MAX_BIAS, le=MAX_BIAS)]] | None,
        Meta(description="token id -> added to its logit"),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None, Meta(description="same seed, same tokens")
    ] = None
    max_tokens: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="None: to the end of the context")] = None
    min_tokens: Annotated[int, Meta(ge=0, description="no stop of any kind before that many tokens")] = 0
    stop: Annotated[Sequence[str], Meta(description="strings that end the answer (not part of it)")] = ()
    stop_token_ids: Annotated[Sequence[int], Meta(description="tokens that end the answer")] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None, Meta(description="most likely tokens to report")
    ] = None
    prompt_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None, Meta(description="the same for the prompt")
    ] = None
    skip_special_tokens: bool = True
    structured_outputs: Annotated[StructuredOutputsParams | None, Meta(description="what the answer must match")] = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            force_setattr(self, "stop", (self.stop,))
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            try:
                convert(value, field.type)
            except Exception as error:
                raise RequestError(f"{field.name}={value!r}: {error}", param=field.name) from None
        force_setattr(self, "stop", tuple(self.stop))
        force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids))
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise RequestError(
                f"stop has {len(self.stop)} strings, the longest of {max(map(len, self.stop))} characters; give up to "
                f"{MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters",
                param="stop",
            )
        for name, given in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            if len(given) > MAX_TOKEN_IDS:
                raise RequestError(f"{name} has {len(given)} token ids, the limit is {MAX_TOKEN_IDS}", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is over max_tokens={self.max_tokens}", param="min_tokens")
        if self.structured_outputs is not None and (self.min_tokens or self.ignore_eos):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(f"{name} cannot be had: structured_outputs say where the answer ends", param=name)

    @property
    def penalised(self) -> bool:
        """Whether any of the three penalties is at work."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class LoRARequest(Struct, frozen=True):
    """Which adapter a request wants: a name, an id of your own (checked, never needed), a folder or hub repository.

    `load_inplace` reads the path again and publishes what it finds as a new version under the same name.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not self.lora_name or not self.lora_path:
            raise RequestError("a LoRARequest needs a lora_name and a lora_path", param="lora_request")
        if not 1 <= self.lora_int_id < 2**63:
            raise RequestError(f"lora_int_id={self.lora_int_id}: must be 1 to 2**63-1", param="lora_request")


class AdapterPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one adapter may take of an engine; it belongs to the adapter's name. Raises `RequestError`."""

    weight: Annotated[float, Meta(ge=0.01, le=100, description="its share while others wait too; 2: twice theirs")] = (
        1.0
    )
    max_concurrency: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="answers that run at a time; more wait")
    ] = None
    tokens_per_minute: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="of prompts and answers; more requests are refused")
    ] = None

    def __post_init__(self) -> None:
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            try:
                convert(value, field.type)
            except Exception as error:
                raise RequestError(f"policy: {field.name}={value!r}: {error}", param="policy") from None


class SitePages(Struct, frozen=True):
    """What an adapter needs of one kind of pages."""

    kind: int  # as `lora.kinds` numbers them
    count: int
    scale: float  # of rank pages, on the low-rank product


class BlockSpan(Struct, frozen=True):
    """Blocks [low, high) of a weight's rows (`ops.blocks`) that an adapter has in the place of the base's."""

    weight: int  # index in the layout: embedding, head, norms
    low: int
    high: int


class AdapterVersion(Struct, frozen=True, weakref=True):
    """One adapter as it was read at one time: immutable, named by the digest of what it means. No tensors.

    A reload under the same name is another version.
    """

    id: int  # unique in this process
    name: str
    digest: str  # hex sha256 over tensors, scales, places of rows and invocation
    source: str | None  # folder it came from; None: from memory, so it cannot be read again
    rank: int  # the largest rank of any module
    pages: tuple[SitePages, ...]
    nbytes: int  # of its pages on the device
    base_model_name: str | None = None
    loaded_at: float = 0.0  # time.time()
    additive: bool = True  # nothing but low-rank sums, which may be weighted and added to others'
    invocation: tuple[int, ...] = ()  # aLoRA: tokens of the prompt from which it is at work; (): it always is
    blocks: tuple[BlockSpan, ...] = ()  # in the order of its pages of blocks
    vocabulary: int = 0  # token ids that it knows, the first so many; 0: those of the base

    @property
    def label(self) -> str:
        """NAME@DIGEST12, the way a response names its adapter."""
        return f"{self.name}@{self.digest[:12]}"


class AnnouncedAdapter(Struct, frozen=True, kw_only=True):
    """A name that is known though nothing was read yet but the config and the header of the tensors."""

    request: LoRARequest
    rank: int
    nbytes: int  # of its pages; rows of its own are not counted yet
    announced_at: float  # time.time()

    @property
    def name(self) -> str:
        return self.request.lora_name

    @property
    def source(self) -> str:
        return self.request.lora_path

    @property
    def base_model_name(self) -> str | None:
        return self.request.base_model_name


def read_again(version: AdapterVersion) -> LoRARequest:
    """The request that reads a version's bytes a second time. The id plays no part in reading."""
    assert version.source is not None, "a version from memory is never evicted"
    return LoRARequest(version.name, 1, version.source, version.base_model_name)


class Mix(Struct, frozen=True, cache_hash=True):
    """Adapters whose deltas add up, each with a weight; one adapter is a mix of one. The base model is `None`.

    Raises `RequestError` where one that is not additive has company or a weight.
    """

    parts: tuple[tuple[AdapterVersion, float], ...]

    def __post_init__(self) -> None:
        if len(self.parts) == 1 and self.parts[0][1] == 1:
            return
        whole = next((version.name for version, _ in self.parts if not version.additive), None)
        if whole is not None:
            raise RequestError(
                f"lora: {whole!r} is more than a low-rank sum (DoRA, biases, whole modules, invocation tokens): "
                "name it alone, without a weight",
                param="lora",
            )

    @property
    def key(self) -> bytes:
        """What the KV of this mix depends on: contents and weights, never names."""
        return sha256(repr([(version.digest, weight) for version, weight in self.parts]).encode()).digest()

    @property
    def vocabulary(self) -> int:
        """Token ids that its requests may use; 0: those of the base."""
        return self.parts[0][0].vocabulary  # an adapter with its own is named alone

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        return tuple(version for version, _ in self.parts)

    def active_from(self, prompt: Sequence[int]) -> int:
        """Position of `prompt` from which the mix is at work; tokens before it are the base's.

        Of an activated LoRA (aLoRA, arXiv 2504.12397) where its invocation begins for the last time, as PEFT's
        `calculate_alora_offsets` finds it; `NEVER` where the prompt has none. What is generated changes nothing.
        """
        invocation = self.parts[0][0].invocation  # an aLoRA has no company
        for start in range(len(prompt) - len(invocation), -1, -1) if invocation else ():
            if prompt[start] == invocation[0] and tuple(prompt[start : start + len(invocation)]) == invocation:
                return start
        return NEVER if invocation else 0


class Matcher(Protocol):
    """Where one answer is in its grammar; moved on by one thread at a time."""

    ready: bool  # `bits` and `error` may be read
    bits: bytes  # int32 words, a bit a token from the lowest on: which may come next, beyond them none
    error: str | None  # why there is no next token
    slow: bool  # a token has taken long of late: no step is to count on the next mask
    suspect: bool  # or one beside it has: it is to be advanced by itself, so that one knows

    def advance(self, token: int) -> None: ...


class Grammar(Protocol):
    """A compiled grammar. Immutable; any thread."""

    def begin(self, ends: Collection[int] | None = None) -> Matcher:
        """A matcher for one more answer, which may end with any of `ends`; None: with those of the base's tokenizer."""
        ...


class MediaItem(Struct, frozen=True, kw_only=True, eq=False):
    """An image or a recording of a prompt, as the encoder will be given it."""

    modality: str
    digest: bytes  # of the modality and `features`: who has it has the same rows before the decoder
    features: "Mapping[str, NDArray[Any]]"  # what transformers' processor made of it, a batch of one
    count: int  # placeholder tokens that stand for it, one after the other
    start: int = 0  # where in the prompt
    grid: tuple[int, int, int] | None = None  # of its tokens in time, height and width, on a model with three axes


class Rotary(Struct, frozen=True, eq=False):
    """Where the tokens of one request stand on three rotary axes (M-RoPE)."""

    axes: "NDArray[Any]"  # [3, tokens of the prompt] int32
    shift: int  # from the number of a token behind the prompt to its position on all three


class Request(Struct, frozen=True, kw_only=True, weakref=True, dict=True):
    """What was asked, tokenised and checked; crosses from the loop to the engine thread."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    mix: Mix | None = None
    prompt: str | None = None
    lora_request: LoRARequest | None = None
    priority: int = 0  # lower is earlier, among those of the same mix
    arrival_s: float = 0.0  # time.monotonic()
    eos_token_ids: frozenset[int] | None = None  # None: those of the base's tokenizer
    grammar: Grammar | None = None  # what `params.structured_outputs` became
    media: tuple[MediaItem, ...] = ()  # by where they are in the prompt
    rotary: Rotary | None = None  # None: every token stands at its number
    held: object = None  # as long as this lives, the adapters of `mix` are not dropped

    @cached_property
    def active_from(self) -> int:
        """Position from which the tokens of all its answers are the mix's, and no more the base's."""
        return NEVER if self.mix is None else self.mix.active_from(self.prompt_token_ids)


class Logprob(Struct, frozen=True):
    """Log-softmax of the raw logits at one token, and its rank (1: the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class TokenDelta(Struct, frozen=True):
    """One token of one sequence, from the engine thread to the loop. A delta without a token only ends a sequence."""

    request_id: str
    index: int  # which of the request's n answers
    token_id: int | None
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()  # most likely tokens, best first
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id
    prompt_logprobs: tuple[tuple[tuple[int, float, int], ...] | None, ...] | None = None  # with the first token
    error: Exception | None = None  # with finish_reason "error"
    started_s: float | None = None  # with the first token: when the sequence left the queue, time.monotonic()


class TokenOutput(Struct, frozen=True, kw_only=True):
    """What `stream` yields for each token. `text` may be empty while bytes or a stop string are incomplete."""

    text: str
    token_id: int
    logprob: float
    top_logprobs: dict[int, Logprob] | None = None
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class CompletionOutput(Struct, kw_only=True):
    """One answer so far."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestMetrics(Struct, kw_only=True):
    """Times of one request in seconds of `time.monotonic()`."""

    arrival_time: float
    scheduled_time: float | None = None  # it left the queue; known with the first token
    first_token_time: float | None = None
    finished_time: float | None = None


class RequestOutput(Struct, kw_only=True):
    """A request and its answers so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    lora_request: LoRARequest | None = None
    adapter: str | None = None  # NAME@DIGEST12
    metrics: RequestMetrics


def unreported(what: str, done: int, of: int) -> None:
    """The `Report` to nobody."""


def check_fields(value: Struct) -> None:
    """Hold every field of a Struct against its annotation; `ConfigError` names the field, the value and the limit."""
    for field in fields(value):
        given = getattr(value, field.name)
        try:
            convert(given, field.type)
        except Exception as error:
            raise ConfigError(f"{field.name}={given!r}: {error}") from None
