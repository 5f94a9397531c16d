"""Images and recordings in a conversation: the parts of a message as the engine takes them."""

from litestar.exceptions import HTTPException

from aiolora.api.wire import ContentPart
from aiolora.errors import RequestError

MAX_BODY = 32 << 20  # bytes of a conversation: some images, in base64
MAX_TEXT_BODY = 4 << 20  # of one for a model that takes text only: a context of 256k tokens


def check_size(body: bytes, modalities: frozenset[str]) -> None:
    """Raises 413 for more than text can be where the model takes nothing else."""
    if not modalities and len(body) > MAX_TEXT_BODY:
        raise HTTPException(f"the limit is {MAX_TEXT_BODY} bytes", status_code=413)


def content_of(parts: list[ContentPart], place: str) -> str | list[dict[str, object]]:
    """One text where there is nothing else, else all parts in their order. Raises `RequestError`."""
    worded = [_part(part, f"{place}.content[{number}]") for number, part in enumerate(parts)]
    if all(part.type == "text" for part in parts):
        return "".join(part.text or "" for part in parts)
    return worded


def _part(part: ContentPart, where: str) -> dict[str, object]:
    if part.type == "text" and part.text is not None:
        return {"type": "text", "text": part.text}
    if part.type == "image_url" and part.image_url is not None:
        return {"type": "image_url", "image_url": part.image_url.url}
    if part.type == "audio_url" and part.audio_url is not None:
        return {"type": "audio_url", "audio_url": part.audio_url.url}
    if part.type == "input_audio" and part.input_audio is not None:
        given = part.input_audio
        return {"type": "input_audio", "input_audio": {"data": given.data, "format": given.format}}
    raise RequestError(
        f"{where}: a content part of type {part.type!r} is not served, only text, image_url, input_audio and "
        "audio_url, each with its field of that name",
        param=where,
    )
