"""aiolora: one base language model, many LoRA adapters at once, streamed from asyncio.

Importing this package is quick and touches neither torch nor a device; the engines are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from aiolora.config import EngineArgs
from aiolora.types import (
    AdapterPolicy,
    AdapterVersion,
    CompletionOutput,
    Logprob,
    LoRARequest,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    TokenOutput,
)

if TYPE_CHECKING:
    from aiolora.engine.async_engine import AsyncLLMEngine
    from aiolora.llm import LLM, LLMEngine

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterPolicy",
    "AdapterVersion",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TokenOutput",
    "__version__",
]

_LAZY = {"LLM": "aiolora.llm", "LLMEngine": "aiolora.llm", "AsyncLLMEngine": "aiolora.engine.async_engine"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'aiolora' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
