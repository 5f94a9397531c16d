"""Text to tokens and back. The only home of tokenizers; knows nothing of models."""

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from aiolora.errors import ModelError, RequestError
from aiolora.types import Messages

_TAIL = 6  # prompt tokens that a decoder may need before the first output token (spaces, byte sequences)


class Tokenizer:
    """A model's tokenizer and chat template. Encoding and decoding release the GIL; safe in several threads."""

    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` where `folder` holds no fast tokenizer."""
        try:
            self._hf = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} holds no tokenizer that can be read: {error}") from error
        if not self._hf.is_fast:
            raise ModelError(f"{folder} holds a slow tokenizer; save a tokenizer.json beside it")
        self._fast = self._hf.backend_tokenizer
        try:
            self.eos_token_ids = _eos_ids(folder, self._hf.eos_token_id)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder}/generation_config.json cannot be read: {error}") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a prompt (bos)."""
        ids: list[int] = self._hf.encode(text, add_special_tokens=special)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; incomplete bytes become U+FFFD."""
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special))

    def chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The prompt that the model's own chat template makes of `messages` (sandboxed by transformers).

        Raises `RequestError` where there is no template or it refuses the messages.
        """
        if not self._hf.chat_template:
            raise RequestError("the model has no chat template; send a prompt instead", param="messages")
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from None
        return str(text)

    def stream(self, prompt_ids: Sequence[int], *, skip_special: bool = True) -> "TextStream":
        """An incremental decoder of what follows `prompt_ids`."""
        return TextStream(self._fast, prompt_ids, skip_special)


class TextStream:
    """Tokens in, text out as soon as its bytes are complete."""

    def __init__(self, tokenizer: FastTokenizer, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        tail = list(prompt_ids[-_TAIL:])
        self._stream = DecodeStream(ids=tail, skip_special_tokens=skip_special)
        shown = str(tokenizer.decode(tail, skip_special_tokens=skip_special))
        # behind a prompt that may end within a character DecodeStream begins with the prompt's own text
        self._repeated = shown if shown.endswith("\ufffd") else ""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while bytes are missing."""
        self._held.append(token_id)
        text: str | None = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._held.clear()
        if self._repeated:
            before, self._repeated = self._repeated, ""
            return text.removeprefix(before if text.startswith(before) else before.rstrip("\ufffd"))
        return text

    def flush(self) -> str:
        """What is left at the end: incomplete bytes as U+FFFD."""
        held, self._held = self._held, []
        if not held:
            return ""
        return str(self._tokenizer.decode(held, skip_special_tokens=self._skip_special))


def _eos_ids(folder: Path, own: int | None) -> frozenset[int]:
    """The tokenizer's eos and those of generation_config.json (Llama 3 has three)."""
    ids = set() if own is None else {own}
    file = folder / "generation_config.json"
    if file.is_file():
        said = json.loads(file.read_text()).get("eos_token_id")
        ids |= set(said if isinstance(said, list) else [] if said is None else [said])
    return frozenset(ids)
