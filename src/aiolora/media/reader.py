"""Reader: a prompt with media in, the same with placeholder tokens out, and what stands behind those."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct, structs

from aiolora.errors import RequestError
from aiolora.media.content import Given, Split, modalities_in, parted
from aiolora.media.data_urls import decoded
from aiolora.media.fetch import Fetcher
from aiolora.media.items import Opened, Processor
from aiolora.media.processing import processors_of
from aiolora.types import MediaItem, Messages, Prompt, Rotary

MAX_ITEMS = 32  # of a request


class Spelling(Protocol):
    """What is asked of a tokenizer."""

    @property
    def chat_template(self) -> object: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Placed(Struct, frozen=True):
    """Token ids with as many placeholders as each item has rows."""

    ids: list[int]
    items: tuple[MediaItem, ...] = ()  # by their starts
    rotary: Rotary | None = None


class MediaReader:
    """Reads the media of prompts for one model. Any thread; nothing in it changes."""

    def __init__(self, processors: Mapping[str, Processor], fetcher: Fetcher, *, model: str) -> None:
        self._processors = processors
        self._fetcher = fetcher
        self._model = model

    @classmethod
    def of(cls, folder: Path, model: str, *, domains: tuple[str, ...], max_pixels: int) -> "MediaReader":
        """That of the model in `folder`. Raises `ModelError`."""
        reader = cls(processors_of(folder, max_pixels=max_pixels), Fetcher(domains), model=model)
        reader.samples()  # whose sizes must be what is made of them
        return reader

    @property
    def modalities(self) -> frozenset[str]:
        """What the model takes besides text."""
        return frozenset(self._processors)

    def samples(self) -> list[MediaItem]:
        """A small one and a large one of each modality, to warm an encoder up with."""
        return [one.open(source, "").item() for one in self._processors.values() for source in one.blanks]

    def largest(self, max_tokens: int) -> list[MediaItem]:
        """About the largest of each modality of which a prompt of so many tokens has room."""
        found = []
        for processor in self._processors.values():
            share, one, larger = 1.0, processor.open(processor.blank(1.0), ""), 0
            while one.count > max_tokens and one.count != larger:  # some have as many tokens whatever they show
                share, larger = share * 0.95 * max_tokens / one.count, one.count
                one = processor.open(processor.blank(share), "")
            found.append(one.item())
        return found

    def modalities_in(self, prompt: Prompt | Messages) -> frozenset[str]:
        """What `prompt` brings besides text. Raises `RequestError`."""
        return modalities_in(prompt)

    def split(self, prompt: Prompt | Messages, spelling: Spelling) -> Split:
        """The prompt as the chat template of `spelling` expects it, and its media beside it. Raises `RequestError`."""
        parts = _knows_parts(spelling.chat_template)
        if not modalities_in(prompt):
            return Split(parted(prompt, {}, parts=True)[0] if self._processors and parts else prompt)
        texts = {modality: spelling.decode([one.token_id]) for modality, one in self._processors.items()}
        rest, given = parted(prompt, texts, parts=parts)
        if len(given) > MAX_ITEMS:
            raise RequestError(f"{len(given)} images and recordings, the limit is {MAX_ITEMS}", param=given[0].param)
        for one in given:
            if one.modality not in self._processors:
                taken = ", ".join(("text", *sorted(self._processors)))
                raise RequestError(f"the model {self._model!r} takes {taken}, no {one.modality}", param=one.param)
        return Split(rest, tuple(given))

    @asynccontextmanager
    async def fetched(self, split: Split, owner: str) -> AsyncIterator[Split]:
        """With the files in the place of their URLs, but for those in data URLs; leave when they have been decoded.

        On the loop; `owner` and errors as those of `Fetcher.files`.
        """
        async with self._fetcher.files(split.urls, owner) as files:
            yield split.with_files(files)

    def open(self, given: Sequence[Given]) -> list[Opened]:
        """What was given, by its sizes. Raises `RequestError`, and `MissingExtraError` without Pillow."""
        opened = [self._opened(one) for one in given]
        for modality, processor in self._processors.items():
            size = sum(one.size for one in opened if one.modality == modality)
            if size > processor.room:
                raise RequestError(
                    f"the prompt has {size:.0f} {processor.unit} of {modality} in all; the limit is "
                    f"{processor.room:.0f}; send fewer, or smaller ones",
                    param=given[0].param,
                )
        return opened

    def place(self, ids: Sequence[int], opened: Sequence[Opened]) -> Placed:
        """Each one's placeholder in `ids` becomes as many as it has rows, and it an item; blocks.

        Raises `RequestError` where there are more of the ones or the others.
        """
        if not opened:
            return Placed(list(ids))
        left = {
            self._processors[modality].token_id: [one for one in opened if one.modality == modality][::-1]
            for modality in {one.modality for one in opened}
        }
        out: list[int] = []
        starts: list[tuple[int, Opened]] = []
        for token in ids:
            if token not in left:
                out.append(token)
                continue
            if not left[token]:
                raise self._miscounted(ids, opened)
            one = left[token].pop()
            starts.append((len(out), one))
            out += [token] * one.count
        if any(left.values()):
            raise self._miscounted(ids, opened)
        items = [structs.replace(one.item(), start=start) for start, one in starts]
        return Placed(out, tuple(items), rotary_of(len(out), items))

    def _opened(self, given: Given) -> Opened:
        source = given.source
        if isinstance(source, str):
            source = decoded(source, self._fetcher.max_nbytes, given.param)
        return self._processors[given.modality].open(source, given.param)

    def _miscounted(self, ids: Sequence[int], opened: Sequence[Opened]) -> RequestError:
        counts = [
            f"{sum(token == processor.token_id for token in ids)} placeholders of {modality} for "
            f"{sum(one.modality == modality for one in opened)} given"
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
