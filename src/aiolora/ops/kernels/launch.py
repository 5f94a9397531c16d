"""What every launch shares: finding the compiled variant, programmatic dependent launch, sizes of the card."""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime._async_compile import FutureKernel, active_mode

from aiolora.ops.rehearsing import rehearsing

INTERPRETED: bool = knobs.runtime.interpret
PDL: bool = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""A kernel is set up while the one before it ends, and waits before it reads (Hopper on)."""

_OFF = 15  # bits of an address: Triton compiles for addresses that are multiples of 16


def launch(
    function: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    pdl: bool = False,
    **constants: Any,
) -> None:
    """Run the jitted `function` on the current stream: `args` in its order, then its constexprs by name, PDL = `pdl`.

    The JIT binds and hashes every argument of every launch anew (about 40 us with 30 of them); here a variant is found
    by what it was compiled for: device, constants, dtypes, and the values of integers that it is specialised on.
    """
    constants["PDL"] = pdl
    if INTERPRETED:
        function[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, launch_pdl=pdl)
        return
    variants = _variants(function)
    fixed = tuple([constants[name] for name in variants.constants])
    traits: list[object] = []
    addresses = 0
    for value, by_value in zip(args, variants.by_value):
        if isinstance(value, Tensor):
            addresses |= value.data_ptr()
            traits.append(value.dtype)
        elif value.__class__ is int and (by_value or not -(1 << 31) <= value < 1 << 31):  # or is no i32
            traits.append(value)
        else:
            traits.append(value.__class__)
    device = torch.cuda.current_device()
    key = (device, fixed, num_warps, num_stages, pdl, *traits)
    aligned = not addresses & _OFF
    compiled = variants.compiled.get(key) if aligned else None
    if rehearsing.get():
        if compiled is None and not (aligned and key in variants.rehearsed):  # Triton would hash it each time
            if aligned:
                variants.rehearsed.add(key)
            function.warmup(*args, grid=grid, **constants, num_warps=num_warps, num_stages=num_stages, launch_pdl=pdl)
        return
    if compiled is None:
        made = function[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages, launch_pdl=pdl)
        if aligned:
            variants.compiled[key] = made.result() if isinstance(made, FutureKernel) else made
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled[(*grid, 1, 1)[:3]](*args, *fixed, stream=stream)


@contextmanager
def rehearsal() -> Iterator[None]:
    """What is launched inside is not run but compiled, side by side; all of it is ready on leaving.

    What the kernels would have written stays undefined. Raises what a compilation raises; whatever was asked for by
    then is asked for again in the next rehearsal, and Triton may still keep its kernels as futures.
    """
    if INTERPRETED:
        yield
        return
    token = rehearsing.set(True)
    device = torch.cuda.current_device()  # a thread begins on the first card
    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,))
    try:
        with pool, triton.AsyncCompileMode(_Compilers(pool)):
            yield
    except BaseException:
        active_mode.set(None)  # Triton leaves it where a compilation failed
        for variants in list(_BY_FUNCTION.values()):
            variants.rehearsed.clear()
        raise
    finally:
        rehearsing.reset(token)


class _Compilers:
    """The executor that Triton compiles in: what comes out of it can be launched at once.

    By itself a kernel would get its code onto the card, and with Triton 3.6 a C function that launches it (a quarter
    of a second of gcc a signature), when it is launched first: one after the other.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self._pool.submit(_made_ready, compile_kernel)


def _made_ready(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    kernel[(1, 1, 1)]  # what binds it to a grid makes it ready
    return kernel


class _Variants:
    """The compiled forms of one function that have been met, and those that were compiled ahead."""

    def __init__(self, function: Any) -> None:
        self.function = function  # keeps its id from being another's
        runtime = [param for param in function.params if not param.is_constexpr]
        self.by_value = [not param.do_not_specialize for param in runtime]
        self.constants = [param.name for param in function.params if param.is_constexpr]
        self.compiled: dict[tuple[Any, ...], Any] = {}
        self.rehearsed: set[tuple[Any, ...]] = set()
        assert function.params[: len(runtime)] == runtime, f"{function.__name__}: constexprs come last"


_BY_FUNCTION: dict[int, _Variants] = {}


def _variants(function: Any) -> _Variants:
    found = _BY_FUNCTION.get(id(function))
    if found is None:
        found = _BY_FUNCTION[id(function)] = _Variants(function)
    return found


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card, which "meta" stands for in a rehearsal; 4 in the interpreter."""
    if INTERPRETED or device.type == "cpu":
        return 4
    card = torch.cuda.current_device() if device.type == "meta" else device
    return int(torch.cuda.get_device_properties(card).multi_processor_count)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two: the extents of Triton's blocks."""
    return int(triton.next_power_of_2(n))
