"""The error tree. Every text names the culprit, the value, the limit and the way out.

AioloraError
├── ConfigError                 what the operator said cannot work
├── MissingExtraError           an optional package is not installed
├── ModelError                  the base model cannot be served
│   ├── ModelNotFoundError
│   ├── UnsupportedModelError
│   └── WeightsError
├── RequestError                this one request is wrong (HTTP 400; carries `param`)
│   ├── PromptTooLongError      more tokens than the context has room for
│   ├── GrammarBusyError        too many grammars of who asks wait to be compiled (HTTP 429)
│   ├── MediaBusyError          too many requests of who asks wait for files behind URLs (HTTP 429)
│   └── UnknownModelError       no base model and no adapter of that name (HTTP 404)
├── AdapterError                this one adapter cannot be used (HTTP 422; carries `adapter`)
│   ├── AdapterNotFoundError    (HTTP 404)
│   ├── AdapterResolveError     no resolver found it, and one failed (HTTP 502)
│   ├── AdapterBusyError        over its tokens a minute (HTTP 429; carries `retry_after_s`)
│   ├── AdapterConflictError    name or id already stands for something else (HTTP 400)
│   ├── AdapterFormatError      unreadable, truncated, pickled, not finite
│   ├── AdapterMismatchError    made for another base: unknown modules or wrong shapes
│   ├── AdapterRankError        rank over `max_lora_rank`
│   ├── AdapterUnsupportedError a PEFT feature that is not served
│   ├── AdapterMemoryError      larger than the room for adapters
│   └── AdapterChangedError     read again after eviction, and the bytes are others
├── NonFiniteLogitsError        the model returned NaN or infinity for this request
├── GrammarError                a grammar became too complex on the way; only its request fails
└── EngineDeadError             a step failed; every stream ends with this
"""


class AioloraError(Exception):
    """Root of every error that aiolora raises on purpose."""


class ConfigError(AioloraError, ValueError):
    """An engine argument, flag or environment variable that cannot work."""


class MissingExtraError(AioloraError, ImportError):
    """A feature needs a package of an extra that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional package; install it with: pip install 'aiolora[{extra}]'")


class ModelError(AioloraError):
    """The base model cannot be served."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """Neither a folder, nor an embedded name, nor a repository that can be reached."""


class UnsupportedModelError(ModelError):
    """The model's architecture is not served."""


class WeightsError(ModelError):
    """A weight file holds unknown, missing or wrongly shaped tensors."""


class RequestError(AioloraError, ValueError):
    """One request is wrong; nobody else is affected. `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(RequestError):
    """The prompt, with at least one token to come, is longer than the context."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="prompt")


class GrammarBusyError(RequestError):
    """Too many grammars of whoever asks wait to be compiled already; ask again when some have been answered."""


class MediaBusyError(RequestError):
    """Too many requests of whoever asks wait for files behind URLs already; ask again when some have been answered."""


class UnknownModelError(RequestError):
    """No base model and no adapter has the name that the request gives."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model")


class AdapterError(AioloraError):
    """One adapter cannot be used; the engine goes on serving the others. `adapter` is its name."""

    def __init__(self, adapter: str, message: str) -> None:
        super().__init__(f"adapter {adapter!r}: {message}")
        self.adapter = adapter


class AdapterNotFoundError(AdapterError):
    """The path or repository does not exist, or holds no adapter."""


class AdapterResolveError(AdapterError):
    """No resolver found the adapter, and one of them failed or was too late; `__cause__` is the first failure."""


class AdapterBusyError(AdapterError):
    """The adapter has used its tokens of the minute; ask again in `retry_after_s` seconds."""

    def __init__(self, adapter: str, message: str, *, retry_after_s: int) -> None:
        super().__init__(adapter, message)
        self.retry_after_s = retry_after_s


class AdapterConflictError(AdapterError):
    """The name or the id already stands for another adapter."""


class AdapterFormatError(AdapterError):
    """The files are unreadable, truncated, pickled, malformed or hold NaN or infinity."""


class AdapterMismatchError(AdapterError):
    """The tensors do not fit this base model."""


class AdapterRankError(AdapterError):
    """The rank is over `max_lora_rank`."""


class AdapterUnsupportedError(AdapterError):
    """The adapter uses a PEFT feature that is not served; it is refused, never served wrongly."""


class AdapterMemoryError(AdapterError):
    """The adapter is larger than the whole room for adapters."""


class AdapterChangedError(AdapterError):
    """An evicted adapter was read again and its digest is another one."""


class NonFiniteLogitsError(AioloraError):
    """The model returned NaN or infinity for a row; only that request fails and nothing of it is cached."""


class GrammarError(AioloraError):
    """What may come next in an answer cannot be told within the limits of a step; only that request fails."""


class EngineDeadError(AioloraError):
    """A step failed. `__cause__` is the reason; the process should be restarted."""
