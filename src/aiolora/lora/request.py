"""The import path that users of vLLM know."""

from aiolora.types import LoRARequest

__all__ = ["LoRARequest"]
