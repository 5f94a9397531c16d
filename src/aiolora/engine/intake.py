"""Intake: from what a caller says to a checked Request, and from a name to the adapter version it stands for."""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from aiolora.errors import AdapterUnsupportedError, PromptTooLongError, RequestError
from aiolora.lora.registry import AdapterRegistry
from aiolora.tokenizer import Tokenizer
from aiolora.types import Conversation, Grammar, LoRARequest, Messages, Mix, Prompt, Request, SamplingParams

LoRA: TypeAlias = str | LoRARequest | Mapping[str, float] | None


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    vocab_size: int


class Intake:
    """Everything that happens to a request before the engine sees it. Owned by the loop, or by a blocking caller."""

    def __init__(
        self, tokenizer: Tokenizer, registry: AdapterRegistry, limits: Limits, *, model: str, lora_enabled: bool
    ) -> None:
        self.tokenizer = tokenizer
        self.registry = registry
        self.limits = limits
        self.model = model
        self._lora_enabled = lora_enabled

    def request(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None,
        mix: Mix | None,
        *,
        grammar: Grammar | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> Request:
        """Tokenise and check. Raises `RequestError` naming the field, the value and the limit.

        `grammar`: what the `structured_outputs` of `params` were compiled to.
        """
        text, ids = self.tokens(prompt)
        params = params or SamplingParams()
        self._check(ids, params)
        return Request(
            id=request_id or f"req-{uuid.uuid4().hex}",
            prompt_token_ids=tuple(ids),
            params=params,
            mix=mix,
            prompt=text,
            lora_request=lora_request,
            arrival_s=time.monotonic(),
            grammar=grammar,
        )

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
        for key, weight in lora.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise RequestError(f"lora: weight {weight} of {key!r} is not a finite number", param="lora")
        return [(key, float(weight)) for key, weight in lora.items()]

    def tokens(self, prompt: Prompt | Messages, *, special: bool = True) -> tuple[str | None, list[int]]:
        """The text of a prompt, where it has one, and its token ids, checked for nothing else.

        `special`: a text gets what the tokenizer puts around a prompt.
        """
        if isinstance(prompt, str):
            self._check_characters(prompt)
            return prompt, self.tokenizer.encode(prompt, special=special)
        if isinstance(prompt, Mapping):
            return self._tokens_of_mapping(prompt)
        if not isinstance(prompt, Conversation) and prompt and all(isinstance(item, Mapping) for item in prompt):
            prompt = Conversation(messages=list(prompt))  # type: ignore[arg-type]
        if isinstance(prompt, Conversation):
            text = self.tokenizer.chat(prompt)
            self._check_characters(text)
            return text, self.tokenizer.encode(text, special=False)
        if all(type(item) is int for item in prompt):
            return None, list(prompt)  # type: ignore[arg-type]
        raise RequestError("a prompt is a string, token ids, a mapping with either, or chat messages", param="prompt")

    def _tokens_of_mapping(self, prompt: Mapping[str, object]) -> tuple[str | None, list[int]]:
        if prompt.get("multi_modal_data"):
            raise RequestError(f"the model {self.model!r} takes text only, no multi_modal_data", param="prompt")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if isinstance(ids, Sequence) and all(type(item) is int for item in ids):
            return text if isinstance(text, str) else None, list(ids)
        if isinstance(text, str):
            return self.tokens(text)
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

    def _check(self, ids: list[int], params: SamplingParams) -> None:
        vocab, longest = self.limits.vocab_size, self.limits.max_model_len
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
        if len(ids) >= longest:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens; with at least one to come the context (max_model_len) allows "
                f"{longest - 1}; shorten it or start with a larger --max-model-len"
            )
        for field in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, field)
            if wanted is not None and wanted > vocab:
                raise RequestError(f"{field}={wanted} is over the vocabulary of {vocab}", param=field)
        if params.min_tokens > longest - len(ids):
            room = longest - len(ids)
            raise RequestError(f"min_tokens={params.min_tokens}, the context leaves {room}", param="min_tokens")
