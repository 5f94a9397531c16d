"""Intake: from what a caller says to a checked Request, and from a name to the adapter version it stands for."""

import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msgspec import Struct

from aiolora.errors import AdapterUnsupportedError, PromptTooLongError, RequestError
from aiolora.lora.policies import Policies
from aiolora.lora.registry import AdapterRegistry
from aiolora.lora.tokenizers import Tokenizers
from aiolora.media.content import Split
from aiolora.media.reader import MediaReader
from aiolora.tokenizer import Tokenizer
from aiolora.types import (
    NEVER,
    AdapterVersion,
    Conversation,
    Grammar,
    LoRARequest,
    Messages,
    Mix,
    Prompt,
    Request,
    SamplingParams,
)

logger = logging.getLogger(__name__)

LoRA: TypeAlias = str | LoRARequest | Mapping[str, float] | None

MAX_WEIGHT = 100  # of one adapter in a request
MAX_PARTS = 16  # adapters in a request
MAX_PRIORITY = 1000  # either way


class Settled(Struct, frozen=True, eq=False, weakref=True):
    """The adapters that answer a request, decided once: its words, its tokens and its answer are all of these.

    While it lives they are there for it, whatever becomes of their names.
    """

    mix: Mix | None
    tokenizer: Tokenizer  # and chat template
    lora_request: LoRARequest | None = None


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    vocab_size: int


class Intake:
    """Everything that happens to a request before the engine sees it. Owned by the loop, or by a blocking caller.

    `request` and `tokens` may run in any thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        registry: AdapterRegistry,
        limits: Limits,
        media: MediaReader,
        *,
        model: str,
        lora_enabled: bool,
        default_mm_loras: Mapping[str, str] | None = None,
    ) -> None:
        """`default_mm_loras`: modality -> name of the adapter that a request with it has where it names none."""
        self.tokenizers = Tokenizers(tokenizer)
        self.registry = registry
        self.policies = Policies()
        self.limits = limits
        self.media = media
        self.model = model
        self._lora_enabled = lora_enabled
        self._default_mm_loras = default_mm_loras or {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return self.tokenizers.base

    def request(
        self,
        split: Split,
        params: SamplingParams | None,
        settled: Settled,
        *,
        grammar: Grammar | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Request:
        """Tokenise and check, and then work on images and recordings: nothing is made of what does not fit.

        `split`: by `media.split` and, where it has URLs, `media.fetched`. `grammar`: what the `structured_outputs` of
        `params` were compiled to. Raises `RequestError` naming the field, the value and the limit.
        """
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority={priority}: must be {-MAX_PRIORITY} to {MAX_PRIORITY}, lower is earlier", param="priority"
            )
        mix, tokenizer = settled.mix, settled.tokenizer
        text, ids = self.tokens(split.prompt, tokenizer)
        params = params or SamplingParams()
        vocab = (mix and mix.vocabulary) or self.limits.vocab_size
        self._check(ids, params, vocab)
        self._check_length(len(ids), params)
        opened = self.media.open(split.given)
        self._check_length(len(ids) + sum(one.count - 1 for one in opened), params)
        placed = self.media.place(ids, opened)
        ends = frozenset(end for end in tokenizer.eos_token_ids if end < vocab)
        request = Request(
            id=request_id or f"req-{uuid.uuid4().hex}",
            prompt_token_ids=tuple(placed.ids),
            params=params,
            mix=mix,
            prompt=text,
            lora_request=settled.lora_request,
            priority=priority,
            arrival_s=time.monotonic(),
            eos_token_ids=None if tokenizer is self.tokenizers.base else ends,
            grammar=grammar,
            media=placed.items,
            rotary=placed.rotary,
            held=settled,
        )
        if mix is not None and request.active_from == NEVER:
            version = mix.versions[0]
            logger.warning(
                "request %r: the prompt has no invocation of %s (the tokens %s), so the base model answers, as in PEFT",
                request.id,
                version.label,
                list(version.invocation),
            )
        return request

    def default(self, lora: LoRA, modalities: Collection[str], permits: Callable[[str], bool] | None = None) -> LoRA:
        """`lora`, or where a request names none that of the one modality in it that has a default.

        `permits`: whether who asks may use the adapter of this name, which else is not there; None: everybody may.
        """
        if lora is not None:
            return lora
        defaults = filter(None, map(self._default_mm_loras.get, modalities))
        known = filter(self.registry.look_up, defaults)  # it may have been unloaded
        found = [name for name in known if permits is None or permits(name)]
        return found[0] if len(found) == 1 else None

    def parts(self, lora: LoRA) -> list[tuple[str | LoRARequest, float]]:
        """The adapters that `lora` names, each with its weight; empty for the base model."""
        if lora is None:
            return []
        if isinstance(lora, str) and lora == self.model:
            return []
        if not self._lora_enabled:
            name = lora.lora_name if isinstance(lora, LoRARequest) else str(lora)
            raise AdapterUnsupportedError(name, "LoRA is not enabled; start with enable_lora=True (--enable-lora)")
        if isinstance(lora, (str, LoRARequest)):
            return [(lora, 1.0)]
        if not isinstance(lora, Mapping) or not lora:
            raise RequestError(f"lora={lora!r}: give a name, a LoRARequest or {{name: weight}}", param="lora")
        if len(lora) > MAX_PARTS:
            raise RequestError(f"lora names {len(lora)} adapters; a request takes up to {MAX_PARTS}", param="lora")
        for key, weight in lora.items():
            if not isinstance(weight, (int, float)) or not abs(weight) <= MAX_WEIGHT:  # NaN neither
                raise RequestError(
                    f"lora: weight {weight} of {key!r} is no number of {-MAX_WEIGHT} to {MAX_WEIGHT}", param="lora"
                )
        return [(key, float(weight)) for key, weight in lora.items()]

    def settled(self, parts: Iterable[tuple[AdapterVersion, float]], lora: LoRA) -> Settled:
        """The sum of those adapters, one that comes twice with both weights; no parts: the base model."""
        weights: dict[AdapterVersion, float] = {}
        for version, weight in parts:
            weights[version] = weights.get(version, 0.0) + weight
        mix = Mix(tuple(weights.items())) if weights else None
        return Settled(mix, self.tokenizers.of(mix), lora if isinstance(lora, LoRARequest) else None)

    def tokens(
        self, prompt: Prompt | Messages, tokenizer: Tokenizer, *, special: bool = True
    ) -> tuple[str | None, list[int]]:
        """The text of a prompt, where it has one, and its token ids, checked for nothing else.

        `special`: a text gets what the tokenizer puts around a prompt.
        """
        if isinstance(prompt, str):
            self._check_characters(prompt)
            return prompt, tokenizer.encode(prompt, special=special)
        if isinstance(prompt, Mapping):
            return self._tokens_of_mapping(prompt, tokenizer)
        if not isinstance(prompt, Conversation) and prompt and all(isinstance(item, Mapping) for item in prompt):
            prompt = Conversation(messages=list(prompt))  # type: ignore[arg-type]
        if isinstance(prompt, Conversation):
            text = tokenizer.chat(prompt)
            self._check_characters(text)
            return text, tokenizer.encode(text, special=False)
        if all(type(item) is int for item in prompt):
            return None, list(prompt)  # type: ignore[arg-type]
        raise RequestError("a prompt is a string, token ids, a mapping with either, or chat messages", param="prompt")

    def _tokens_of_mapping(self, prompt: Mapping[str, object], tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if isinstance(ids, Sequence) and all(type(item) is int for item in ids):
            return text if isinstance(text, str) else None, list(ids)
        if isinstance(text, str):
            return self.tokens(text, tokenizer)
        raise RequestError("a prompt mapping needs 'prompt' (a string) or 'prompt_token_ids'", param="prompt")

    def _check_characters(self, text: str) -> None:
        """A token is at most some dozen characters; refuse what cannot fit before spending time on it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is no Unicode text: {error}", param="prompt") from None
        limit = self.limits.max_model_len * 64
        if len(text) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(text)} characters, more than {self.limits.max_model_len} tokens "
                "(max_model_len) can hold; shorten it"
            )

    def _check(self, ids: list[int], params: SamplingParams, vocab: int) -> None:
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        for field, values in (
            ("prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
        ):
            bad = next((value for value in values if not 0 <= value < vocab), None)
            if bad is not None:
                raise RequestError(f"{field}: token id {bad} is not in the vocabulary of {vocab}", param=field)
        for field in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, field)
            if wanted is not None and wanted > vocab:
                raise RequestError(f"{field}={wanted} is over the vocabulary of {vocab}", param=field)

    def _check_length(self, count: int, params: SamplingParams) -> None:
        longest = self.limits.max_model_len
        if count >= longest:
            raise PromptTooLongError(
                f"the prompt has {count} tokens; with at least one to come the context (max_model_len) allows "
                f"{longest - 1}; shorten it or start with a larger --max-model-len"
            )
        if params.min_tokens > longest - count:
            room = longest - count
            raise RequestError(f"min_tokens={params.min_tokens}, the context leaves {room}", param="min_tokens")
