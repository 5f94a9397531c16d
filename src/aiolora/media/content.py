"""Finding images and recordings in a prompt: what there is, and the prompt with bare placeholders in their stead."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct, structs

from aiolora.errors import RequestError
from aiolora.media.data_urls import is_data_url
from aiolora.types import Conversation, Messages, Prompt

IMAGE, AUDIO = "image", "audio"

# type of a content part -> (modality, field with its source); OpenAI's parts and those of transformers' templates
_PARTS = {
    "image_url": (IMAGE, "image_url"),
    "image": (IMAGE, "image"),
    "input_audio": (AUDIO, "input_audio"),
    "audio_url": (AUDIO, "audio_url"),
    "audio": (AUDIO, "audio"),
}


class Given(Struct, frozen=True):
    """One image or recording as a caller gave it."""

    modality: str
    source: object  # a decoded one (PIL, array, (samples, rate)), its file's bytes, or the URL where they are
    param: str  # the field that it came in


class Split(Struct, frozen=True):
    """A prompt with bare placeholders, and what is to stand behind those."""

    prompt: Prompt | Messages
    given: tuple[Given, ...] = ()  # in the order of their placeholders within a modality

    @property
    def urls(self) -> dict[str, str]:
        """Where files are still to be fetched from, each with the field that it came in."""
        sources = ((one.source, one.param) for one in self.given)
        return {source: param for source, param in sources if isinstance(source, str) and not is_data_url(source)}

    def with_files(self, files: Mapping[str, bytes]) -> "Split":
        """The same with those in the place of their URLs."""
        given = (
            structs.replace(one, source=files.get(one.source, one.source)) if isinstance(one.source, str) else one
            for one in self.given
        )
        return Split(self.prompt, tuple(given))


Parted: TypeAlias = tuple[Prompt | Messages, list[Given]]


def modalities_in(prompt: Prompt | Messages) -> frozenset[str]:
    """What `prompt` brings besides text. Raises `RequestError` where `multi_modal_data` is none."""
    if isinstance(prompt, Conversation):
        return modalities_in(prompt.messages)
    if isinstance(prompt, Mapping):
        return frozenset(given.modality for given in _listed(prompt))
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return frozenset()
    return frozenset(
        _PARTS[str(part["type"])][0]
        for message in prompt
        if isinstance(message, Mapping)
        for part in _parts(message)
        if isinstance(part, Mapping) and part.get("type") in _PARTS
    )


def parted(prompt: Prompt | Messages, placeholders: Mapping[str, str], *, parts: bool) -> Parted:
    """`prompt` without its media, and those in their order.

    In a conversation a placeholder takes the place of each: a part of its type where the chat template knows `parts`,
    else the modality's text in `placeholders`. Raises `RequestError` for what is no image or recording.
    """
    if isinstance(prompt, Conversation):
        messages, given = parted(prompt.messages, placeholders, parts=parts)
        return structs.replace(prompt, messages=messages), given
    if isinstance(prompt, Mapping):
        rest: dict[str, object] = {key: value for key, value in prompt.items() if key != "multi_modal_data"}
        return rest, _listed(prompt)
    if isinstance(prompt, str) or not any(isinstance(message, Mapping) for message in prompt):
        return prompt, []
    found: list[Given] = []
    messages = [
        _message(message, f"messages[{place}]", placeholders if not parts else None, found)
        for place, message in enumerate(prompt)
        if isinstance(message, Mapping)
    ]
    return messages, found


def _listed(prompt: Mapping[str, object]) -> list[Given]:
    """Of each modality one or a list; a pair of samples and their rate is one."""
    data = prompt.get("multi_modal_data") or {}
    if not isinstance(data, Mapping):
        raise RequestError("multi_modal_data is no mapping of a modality to its data", param="multi_modal_data")
    return [
        Given(str(modality), one, "multi_modal_data")
        for modality, value in data.items()
        for one in (value if isinstance(value, list) else [value])
    ]


def _parts(message: Mapping[str, object]) -> Sequence[object]:
    content = message.get("content")
    return content if isinstance(content, Sequence) and not isinstance(content, str) else ()


def _message(
    message: Mapping[str, object], place: str, placeholders: Mapping[str, str] | None, found: list[Given]
) -> dict[str, object]:
    content = message.get("content")
    if isinstance(content, str) or content is None:
        worded = content if placeholders is not None else [{"type": "text", "text": content or ""}]
        return {**message, "content": worded}
    parts: list[dict[str, object]] = []
    for number, part in enumerate(_parts(message)):
        where = f"{place}.content[{number}]"
        if not isinstance(part, Mapping):
            raise RequestError(f"{where} is no content part", param=where)
        kind = str(part.get("type"))
        if kind == "text":
            parts.append({"type": "text", "text": str(part.get("text") or "")})
        elif kind in _PARTS:
            modality, field = _PARTS[kind]
            found.append(Given(modality, _source(part.get(field, part.get("url")), where), where))
            parts.append({"type": modality})
        else:
            served = ", ".join(("text", *_PARTS))
            raise RequestError(f"{where}: a part of type {kind!r} is not served, only {served}", param=where)
    if placeholders is None:
        return {**message, "content": parts}
    text = "".join(str(part.get("text", "")) or placeholders.get(str(part["type"]), "") for part in parts)
    return {**message, "content": text}


def _source(value: object, where: str) -> object:
    """What is within OpenAI's {"url": ...} and {"data": ..., "format": ...}."""
    if isinstance(value, Mapping):
        if "data" in value:
            return f"data:audio/{value.get('format') or 'wav'};base64,{value['data']}"
        value = value.get("url")
    if value is None:
        raise RequestError(f"{where} brings no data and no URL", param=where)
    return value
