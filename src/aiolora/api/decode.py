"""The strict way in: a wrong type is refused by its place, an unknown field is let pass, as OpenAI's clients expect."""

import re
from typing import TypeVar

import msgspec

from aiolora.api.errors import MalformedBodyError, naming
from aiolora.api.wire import GenerationRequest
from aiolora.errors import RequestError
from aiolora.types import SamplingParams, StructuredOutputsParams

LONG = 16 << 10  # bytes of a body, of which the worst are read and worded in about a millisecond

# lists and objects of a body, brackets in its texts among them: a context of 256k tokens has no more. The parser keeps
# Python to itself: 4 MiB of empty lists are 0.23 s of it, so many are 0.04 s
MAX_NESTED = 256 << 10

T = TypeVar("T")
G = TypeVar("G", bound=GenerationRequest)

_PLACE = re.compile(r" - at `(?:key` in `)?\$\.?(?P<place>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<field>\w+)`")

NOTHING: tuple[object, ...] = (None, False, "", [], {})  # values of a field that is not served which ask for nothing
_UNSERVED: dict[str, tuple[object, ...]] = {  # field -> values that ask for nothing either
    "allowed_token_ids": (),
    "bad_words": (),
    "truncate_prompt_tokens": (),
    "suffix": (),
    "functions": (),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "documents": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
# fields of a body that have the name and the meaning of one there
SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"max_tokens", "logprobs", "structured_outputs"}
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def parse(shape: type[T], body: bytes) -> T:
    """A struct from its JSON. Raises `RequestError` with the field's place (`messages[0].role`) as `param`."""
    if body.count(b"[") + body.count(b"{") > MAX_NESTED:
        raise MalformedBodyError(f"the body has over {MAX_NESTED} lists and objects; send less at a time")
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), param=_place(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedBodyError(f"the body is no valid JSON: {error}") from None
    except RecursionError:
        raise MalformedBodyError("the body is nested too deep") from None


def decode(shape: type[G], body: bytes) -> G:
    """A request to generate, as `parse`; what it asks for is served, or a `RequestError` says what is not."""
    request = parse(shape, body)
    for name, value in msgspec.structs.asdict(request).items():
        if name in _UNSERVED and value not in NOTHING and value not in _UNSERVED[name]:
            raise RequestError(f"{name} is not served; leave it out", param=name)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for stream=true", param="stream_options")
    return request


def sampling(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    structured: StructuredOutputsParams | None = None,
) -> SamplingParams:
    """How the request wants its tokens chosen; `structured`: what its tools ask for, in place of `structured_outputs`.

    Raises `RequestError` for a value out of bounds.
    """
    said = msgspec.structs.asdict(request).items()
    given = {name: value for name, value in said if name in SAMPLING and value is not None}
    structured = structured or structure(request)[1]
    return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs, structured_outputs=structured)


def structure(request: GenerationRequest) -> tuple[str, StructuredOutputsParams | None]:
    """What the answers must match, and the field that says so. Raises `RequestError` where two fields do."""
    wanted: dict[str, StructuredOutputsParams] = {}
    form = request.response_format
    if form is not None and form.type != "text":
        schema = None if form.json_schema is None else form.json_schema.schema
        if form.type == "json_schema" and schema is None:
            raise RequestError("response_format has no json_schema.schema", param="response_format.json_schema")
        wanted["response_format"] = (
            StructuredOutputsParams(json=schema)
            if form.type == "json_schema"
            else StructuredOutputsParams(json_object=True)
        )
    if request.structured_outputs is not None:
        wanted["structured_outputs"] = request.structured_outputs
    for field, value in msgspec.structs.asdict(request).items():
        if field in _GUIDED and value is not None:
            with naming(structured_outputs=field):
                wanted[field] = StructuredOutputsParams(**{_GUIDED[field]: value})
    if len(wanted) > 1:
        raise RequestError(f"{' and '.join(wanted)} cannot both say what the answer is", param=list(wanted)[1])
    return next(iter(wanted.items()), ("structured_outputs", None))


def _place(message: str) -> str | None:
    """The field that msgspec's message is about."""
    place, missing = _PLACE.search(message), _MISSING.search(message)
    return ".".join(filter(None, (place and place["place"], missing and missing["field"]))) or None
