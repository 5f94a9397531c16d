"""Reader: a prompt with media in, the same with placeholder tokens out, and what stands behind those."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct, structs

from aiolora.errors import RequestError
from aiolora.media.content import Given, modalities_in, parted
from aiolora.media.fetch import Fetcher
from aiolora.media.items import Processor
from aiolora.media.processing import processors_of
from aiolora.types import MediaItem, Messages, Prompt, Rotary

MAX_ITEMS = 32  # of a request


class Spelling(Protocol):
    """What is asked of a tokenizer."""

    @property
    def chat_template(self) -> object: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Read(Struct, frozen=True):
    """A prompt whose media were read."""

    prompt: Prompt | Messages  # with a placeholder for each
    items: tuple[MediaItem, ...]  # in the order of their placeholders within a modality

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(item.modality for item in self.items)


class Placed(Struct, frozen=True):
    """Token ids with as many placeholders as each item has rows."""

    ids: list[int]
    items: tuple[MediaItem, ...]  # by their starts
    rotary: Rotary | None


class MediaReader:
    """Reads the media of prompts for one model. Any thread; nothing in it changes."""

    def __init__(self, processors: Mapping[str, Processor], fetcher: Fetcher, *, model: str) -> None:
        self._processors = processors
        self._fetcher = fetcher
        self._model = model

    @classmethod
    def of(cls, folder: Path, model: str, *, domains: tuple[str, ...], max_pixels: int) -> "MediaReader":
        """That of the model in `folder`. Raises `ModelError`."""
        return cls(processors_of(folder, max_pixels=max_pixels), Fetcher(domains), model=model)

    @property
    def modalities(self) -> frozenset[str]:
        """What the model takes besides text."""
        return frozenset(self._processors)

    def samples(self) -> list[MediaItem]:
        """A small one and a large one of each modality, to warm an encoder up with."""
        return [processor.item(source, "") for processor in self._processors.values() for source in processor.blanks]

    def modalities_in(self, prompt: Prompt | Messages) -> frozenset[str]:
        """What `prompt` brings besides text, which `read` is for. Raises `RequestError`."""
        return modalities_in(prompt)

    def worded(self, prompt: Prompt | Messages, spelling: Spelling) -> Prompt | Messages:
        """A prompt without media as the model's chat template expects it."""
        if not self._processors or not _knows_parts(spelling.chat_template):
            return prompt
        return parted(prompt, {}, parts=True)[0]

    def read(self, prompt: Prompt | Messages, spelling: Spelling) -> Read:
        """Fetch, decode and process; blocks. Raises `RequestError`, and `MissingExtraError` without Pillow."""
        texts = {modality: spelling.decode([one.token_id]) for modality, one in self._processors.items()}
        rest, given = parted(prompt, texts, parts=_knows_parts(spelling.chat_template))
        if len(given) > MAX_ITEMS:
            raise RequestError(f"{len(given)} images and recordings, the limit is {MAX_ITEMS}", param=given[0].param)
        return Read(rest, tuple(map(self._item, given)))

    def place(self, ids: Sequence[int], items: Sequence[MediaItem]) -> Placed:
        """Each item's placeholder in `ids` becomes as many as it has rows. Raises `RequestError` where they differ."""
        left = {
            self._processors[modality].token_id: [item for item in items if item.modality == modality][::-1]
            for modality in {item.modality for item in items}
        }
        out: list[int] = []
        placed: list[MediaItem] = []
        for token in ids:
            if token not in left:
                out.append(token)
                continue
            if not left[token]:
                raise self._miscounted(ids, items)
            item = structs.replace(left[token].pop(), start=len(out))
            placed.append(item)
            out += [token] * item.count
        if any(left.values()):
            raise self._miscounted(ids, items)
        return Placed(out, tuple(placed), rotary_of(len(out), placed))

    def _item(self, given: Given) -> MediaItem:
        processor = self._processors.get(given.modality)
        if processor is None:
            taken = ", ".join(("text", *sorted(self._processors)))
            raise RequestError(f"the model {self._model!r} takes {taken}, no {given.modality}", param=given.param)
        source = given.source
        if isinstance(source, str):
            source = self._fetcher.bytes_of(source, given.param)
        return processor.item(source, given.param)

    def _miscounted(self, ids: Sequence[int], items: Sequence[MediaItem]) -> RequestError:
        counts = [
            f"{sum(token == processor.token_id for token in ids)} placeholders of {modality} for "
            f"{sum(item.modality == modality for item in items)} given"
            for modality, processor in self._processors.items()
        ]
        return RequestError(f"the prompt has {', '.join(counts)}; write one for each", param="prompt")


def rotary_of(length: int, items: Sequence[MediaItem]) -> Rotary | None:
    """Where `length` tokens stand on three axes; None: no item has a grid, and each stands at its number.

    Text goes on evenly on all three; an item's tokens by their place in its grid, from where it begins; what follows
    goes on behind the largest of them (M-RoPE, Qwen2-VL, arXiv 2409.12191).
    """
    if not any(item.grid for item in items):
        return None
    axes = np.empty((3, length), dtype=np.int32)
    token = position = 0
    for item in items:
        text = item.start - token
        axes[:, token : item.start] = position + np.arange(text)
        position += text
        assert item.grid is not None, "a model has three axes for all its items or for none"
        axes[:, item.start : item.start + item.count] = position + np.indices(item.grid).reshape(3, -1)
        position += max(item.grid)
        token = item.start + item.count
    axes[:, token:] = position + np.arange(length - token)
    return Rotary(axes, position - token)


def _knows_parts(template: object) -> bool:
    """Whether a chat template (Jinja) asks for the type of content parts."""
    texts = template.values() if isinstance(template, Mapping) else [template]
    return any(quoted in str(text) for text in texts for quoted in ("'type'", '"type"', ".type"))
