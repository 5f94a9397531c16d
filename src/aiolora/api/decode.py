"""The strict way in: a wrong type is refused by its place, an unknown field is let pass, as OpenAI's clients expect."""

import re
from typing import TypeVar

import msgspec

from aiolora.api.errors import MalformedBodyError
from aiolora.api.wire import GenerationRequest
from aiolora.errors import RequestError
from aiolora.types import SamplingParams

T = TypeVar("T")
G = TypeVar("G", bound=GenerationRequest)

_PLACE = re.compile(r" - at `(?:key` in `)?\$\.?(?P<place>[^`]*)`")
_MISSING = re.compile(r"missing required field `(?P<field>\w+)`")

_NOTHING: tuple[object, ...] = (None, False, "", [], {})
_UNSERVED: dict[str, tuple[object, ...]] = {  # field -> values that ask for nothing, besides the empty ones
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "allowed_token_ids": (),
    "bad_words": (),
    "truncate_prompt_tokens": (),
    "suffix": (),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "continue_final_message": (),
}
_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"max_tokens", "logprobs"}  # same name, same meaning


def parse(shape: type[T], body: bytes) -> T:
    """A struct from its JSON. Raises `RequestError` with the field's place (`messages[0].role`) as `param`."""
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
        if name in _UNSERVED and value not in _NOTHING and value not in _UNSERVED[name]:
            raise RequestError(f"{name} is not served; leave it out", param=name)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for stream=true", param="stream_options")
    return request


def sampling(request: GenerationRequest, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """How the request wants its tokens chosen. Raises `RequestError` for a value out of bounds."""
    said = msgspec.structs.asdict(request).items()
    given = {name: value for name, value in said if name in _SAMPLING and value is not None}
    return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs)


def _place(message: str) -> str | None:
    """The field that msgspec's message is about."""
    place, missing = _PLACE.search(message), _MISSING.search(message)
    return ".".join(filter(None, (place and place["place"], missing and missing["field"]))) or None
