"""Text to tokens and back. The only home of tokenizers; knows nothing of models."""

import codecs
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jinja2
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel, DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aiolora.errors import ModelError, RequestError
from aiolora.types import Conversation

_TAIL = 6  # prompt tokens that a decoder may need before the first output token (spaces, byte sequences)


_OWN_OPTIONS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


class Tokenizer:
    """A model's tokenizer and chat template. Encoding and decoding release the GIL; safe in several threads."""

    def __init__(self, folder: Path, *, like: "Tokenizer | None" = None, config: object = None) -> None:
        """`like`: has the template where `folder` has none, and more ends. Its code, if any, is never run.

        `config`: transformers' of `folder`, where it was read already.

        Raises `ModelError` where `folder` holds no fast tokenizer.
        """
        try:
            self._hf = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        except Exception as error:  # of a file that anybody may have written
            raise ModelError(f"{folder} holds no tokenizer that can be read: {error}") from error
        if not self._hf.is_fast:
            raise ModelError(f"{folder} holds a slow tokenizer; save a tokenizer.json beside it")
        self._fast = self._hf.backend_tokenizer
        self._bytes = TokenBytes(self._fast) if isinstance(self._fast.decoder, ByteLevel) else None
        try:
            self.eos_token_ids = _eos_ids(folder, self._hf.eos_token_id)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder}/generation_config.json cannot be read: {error}") from error
        if not self._hf.chat_template:
            self._hf.chat_template = _template_beside(folder)
        if like is not None:
            self._hf.chat_template = self._hf.chat_template or like.chat_template
            self.eos_token_ids |= like.eos_token_ids

    @property
    def added_tokens(self) -> dict[int, str]:
        """Tokens beside those of its vocabulary, special ones among them."""
        return {number: token.content for number, token in self._fast.get_added_tokens_decoder().items()}

    @property
    def chat_template(self) -> object:
        """As transformers has it: Jinja, several by name, or None."""
        return self._hf.chat_template

    @property
    def eos_token(self) -> str | None:
        """What it says ends a text."""
        return self._hf.eos_token  # type: ignore[no-any-return]

    @property
    def json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return str(self._fast.to_str())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the tokenizer puts around a prompt (bos)."""
        ids: list[int] = self._hf.encode(text, add_special_tokens=special)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; incomplete bytes become U+FFFD."""
        if self._bytes is not None and len(ids) == 1:
            data, text, special = self._bytes(ids[0])
            return "" if special and skip_special else text if text is not None else data.decode(errors="replace")
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special))

    def spell(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them; empty where it has none of that id."""
        return [self._fast.id_to_token(token_id) or "" for token_id in ids]

    @property
    def tool_template(self) -> str:
        """The template for conversations with tools; empty: there is none at all."""
        template = self._hf.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return str(template)

    def chat(self, conversation: Conversation) -> str:
        """The prompt that the model's own chat template makes of a conversation (sandboxed by transformers).

        Raises `RequestError` where there is no template or it refuses the messages.
        """
        if not self._hf.chat_template:
            raise RequestError("the model has no chat template; send a prompt instead", param="messages")
        said = conversation
        taken = next((name for name in said.template_kwargs if name in _OWN_OPTIONS), None)
        if taken is not None:
            raise RequestError(f"chat_template_kwargs: {taken!r} cannot be set", param="chat_template_kwargs")
        try:
            text = self._hf.apply_chat_template(
                said.messages,
                tools=said.tools,
                tokenize=False,
                add_generation_prompt=said.add_generation_prompt and not said.continue_final_message,
                continue_final_message=said.continue_final_message,
                **said.template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from None
        return str(text)

    def stream(self, prompt_ids: Sequence[int], *, skip_special: bool = True) -> "TextStream":
        """An incremental decoder of what follows `prompt_ids`."""
        if self._bytes is not None:
            return ByteStream(self._bytes, prompt_ids, skip_special)
        return WindowStream(self._fast, prompt_ids, skip_special)


class TextStream(Protocol):
    """Tokens in, text out as soon as its bytes are complete."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while bytes are missing."""
        ...

    def flush(self) -> str:
        """What is left at the end: incomplete bytes as U+FFFD."""
        ...


class TokenBytes:
    """The bytes that each token stands for, of a tokenizer whose decoder is ByteLevel (GPT-2, Llama 3, Qwen).

    There a token means the same bytes wherever it stands, so none is looked up twice. Shared by threads.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._known: dict[int, tuple[bytes, str | None, bool]] = {}

    def __call__(self, token_id: int) -> tuple[bytes, str | None, bool]:
        """(bytes, their text where they are whole characters, whether the token is special)."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._look_up(token_id)
        return found

    def _look_up(self, token_id: int) -> tuple[bytes, str | None, bool]:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:  # an id that the model has and the tokenizer has not
            return b"", "", False
        try:
            data = bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token, which is spelled as it is
            data = token.encode()
        try:
            return data, data.decode(), token in self._special
        except UnicodeDecodeError:
            return data, None, token in self._special


class ByteStream:
    """A `TextStream` over `TokenBytes`: a token costs a look-up, and a decoder only within a character."""

    def __init__(self, token_bytes: TokenBytes, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._token_bytes = token_bytes
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_ids[-_TAIL:]:
            data, _, special = token_bytes(token_id)
            if not (special and skip_special):
                self._decoder.decode(data)
        begun = self._decoder.getstate()[0]
        self._open = bool(begun)  # whether the decoder is within a character
        self._of_prompt = begun.decode(errors="replace")  # what the prompt shows of a character that it has begun

    def push(self, token_id: int) -> str:
        data, text, special = self._token_bytes(token_id)
        if special and self._skip_special:
            return ""
        if text is not None and not self._open:
            return text
        if not data:
            return ""
        shown = self._decoder.decode(data)
        self._open = bool(self._decoder.getstate()[0])
        if shown and self._of_prompt:
            before, self._of_prompt = self._of_prompt, ""
            return shown.removeprefix(before)
        return shown

    def flush(self) -> str:
        if not self._open:
            return ""
        left = self._decoder.decode(b"", True)
        self._open = False
        return left.removeprefix(self._of_prompt)


class WindowStream:
    """A `TextStream` for any decoder (Metaspace, byte fallback): decodes the last tokens together."""

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
        held, self._held = self._held, []
        if not held:
            return ""
        return str(self._tokenizer.decode(held, skip_special_tokens=self._skip_special))


def _byte_of() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others as U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spelled = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return spelled | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _template_beside(folder: Path) -> str | None:
    """Of the processor, where older multi-modal models have it."""
    try:
        said = json.loads((folder / "chat_template.json").read_text())
    except (OSError, ValueError):
        return None
    template = said.get("chat_template") if isinstance(said, dict) else None
    return template if isinstance(template, str) else None


def _eos_ids(folder: Path, own: int | None) -> frozenset[int]:
    """The tokenizer's eos and those of generation_config.json (Llama 3 has three)."""
    ids = set() if own is None else {own}
    file = folder / "generation_config.json"
    if file.is_file():
        said = json.loads(file.read_text()).get("eos_token_id")
        ids |= set(said if isinstance(said, list) else [] if said is None else [said])
        if not all(type(one) is int and one >= 0 for one in ids):
            raise TypeError(f"eos_token_id={said!r} is no token id")
    return frozenset(ids)
