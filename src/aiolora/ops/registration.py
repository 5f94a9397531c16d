"""Registering an op in one line: reference, fake, and the faster variants of it."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from aiolora.ops.rehearsing import rehearsing

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("aiolora", "DEF")


def define(
    reference: F,
    *,
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    cuda: str | None = None,
    cpu: F | None = None,
) -> F:
    """Register `reference` as `torch.ops.aiolora.<its name>` for every device and return the op.

    The reference is pure PyTorch: it runs wherever there is no variant (`cuda`, `cpu`) or the variant hands over to it,
    and is the oracle of every variant. `cuda` names the module whose function of the reference's name serves CUDA
    tensors: imported when the first one comes, for Triton is not there on every machine. The op is opaque to
    torch.compile (it may read its tensors on the host); `fake` gives shapes and dtypes of what it returns.
    `Library.define` costs about 2 us a call eagerly, `torch.library.custom_op` about 6 (2-core EPYC, torch 2.13).
    """
    name = reference.__name__
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=mutates))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cuda is not None:
        _LIBRARY.impl(name, _when_called(cuda, reference), "CUDA")
    if cpu is not None:
        _LIBRARY.impl(name, cpu, "CPU")
    shaped = fake if cuda is None else _when_rehearsed(_when_called(cuda, reference), fake)
    torch.library.register_fake(f"aiolora::{name}", shaped, lib=_LIBRARY)
    op: F = getattr(torch.ops.aiolora, name).default
    return op


def has_kernels() -> bool:
    """Whether CUDA ops have their kernels; without Triton the references serve, which no graph can hold."""
    return importlib.util.find_spec("triton") is not None


def rehearsal() -> AbstractContextManager[None]:
    """Inside, CUDA ops compile their kernels side by side and compute nothing: before the same calls in earnest.

    So do they on "meta", where they stand for the current GPU: a rehearsal needs neither weights nor memory.
    """
    if not has_kernels():
        return nullcontext()
    from aiolora.ops.kernels import launch

    return launch.rehearsal()


def _when_rehearsed(kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """On "meta": what launches kernels within a rehearsal, `fake` elsewhere (torch.compile)."""
    return lambda *args: (kernel if rehearsing.get() else fake)(*args)


def _when_called(module: str, reference: F) -> Callable[..., Any]:
    """The function of `module`, found at the first call; the reference where there is no Triton."""

    @functools.cache
    def found() -> Callable[..., Any]:
        if not has_kernels():
            return reference
        function: Callable[..., Any] = getattr(importlib.import_module(module), reference.__name__)
        return function

    return lambda *args: found()(*args)
