"""Tokenizers of adapters that bring their own: added tokens, another end of the answer, another chat template."""

import hashlib
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

import msgspec
from msgspec import Struct

from aiolora.errors import AdapterFormatError, ModelError
from aiolora.tokenizer import Tokenizer
from aiolora.types import AdapterVersion, Mix

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json", "added_tokens.json")
_MAX_BYTES = 64 << 20


class _Token(Struct):
    id: int
    content: str


class _Added(Struct):
    """What is looked at in tokenizer.json."""

    added_tokens: list[_Token] = []


class _Content(Struct):
    content: str


class _Settings(Struct):
    """What is looked at in tokenizer_config.json."""

    eos_token: str | _Content | None = None
    chat_template: str | list[object] | None = None


class Tokenizers:
    """The base's tokenizer, and for each version that brings one that means something else, its own.

    Kept as long as somebody holds the version; adapters with the same files share one. Any thread.
    """

    def __init__(self, base: Tokenizer) -> None:
        self.base = base
        self._of: WeakKeyDictionary[AdapterVersion, Tokenizer] = WeakKeyDictionary()
        self._by_content: WeakValueDictionary[bytes, Tokenizer] = WeakValueDictionary()

    def of(self, mix: Mix | None) -> Tokenizer:
        """The tokenizer of requests with `mix`: the adapter's own; the base's where several do not agree."""
        found = [self.base] if mix is None else [self._of.get(version, self.base) for version in mix.versions]
        return found[0] if all(one is found[0] for one in found) else self.base

    def read(self, version: AdapterVersion, folder: Path) -> None:
        """Look for a tokenizer of the version's own in the `folder` that it came from. Blocks.

        Raises `AdapterFormatError` for one that cannot be read.
        """
        if not (folder / TOKENIZER).is_file() or not (folder / SETTINGS).is_file():
            return
        try:
            if not self._differs(folder):
                return
            content = hashlib.sha256()
            for file in FILES:
                data = (folder / file).read_bytes() if (folder / file).is_file() else b""
                content.update(f"{file} {len(data)}\n".encode() + data)
            own = self._by_content.get(content.digest())
            if own is None:
                own = Tokenizer(folder, like=self.base)
                self._by_content[content.digest()] = own
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ModelError) as error:
            raise AdapterFormatError(version.name, f"its own tokenizer cannot be read: {error}") from error
        self._of[version] = own

    def _differs(self, folder: Path) -> bool:
        """Whether it has tokens, an end or a template that the base's has not; without making one of it."""
        if any((folder / file).is_file() and (folder / file).stat().st_size > _MAX_BYTES for file in FILES):
            raise OSError(f"a file of it is over {_MAX_BYTES} bytes")
        added = msgspec.json.decode((folder / TOKENIZER).read_bytes(), type=_Added).added_tokens
        settings = msgspec.json.decode((folder / SETTINGS).read_bytes(), type=_Settings)
        template: object = settings.chat_template
        if (folder / TEMPLATE).is_file():
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
        end = settings.eos_token.content if isinstance(settings.eos_token, _Content) else settings.eos_token
        return (
            any(self.base.added_tokens.get(token.id) != token.content for token in added)
            or (template is not None and template != self.base.chat_template)
            or (end is not None and end != self.base.eos_token)
        )
