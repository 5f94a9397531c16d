"""Low-rank factors of all experts of a layer at once: PEFT's `target_parameters` over a parameter [E, N, K].

PEFT (`ParamWrapper`) keeps A as [r * E, K], expert after expert, and B as [N, r * E], rank after rank with all experts
in each, also of a parameter that is [E, K, N] (gpt-oss). Whichever parameter of the module was declared last is the
outermost wrapper: its factors have the module's own name, those of the one before it stand under `base_layer`.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, wait
from typing import NamedTuple

import numpy as np

from aiolora.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterUnsupportedError,
)
from aiolora.lora.adapter import PeftConfig, stands_for
from aiolora.lora.contents import A, B, Contents
from aiolora.lora.layout import Fused, Layout, Place
from aiolora.lora.paging import Bits, Pages, bits_of, finite, scaled
from aiolora.lora.tensorfile import Entry, Tensors
from aiolora.ops.linear import RANKS_PER_PAGE


class AllExperts(NamedTuple):
    """One fused parameter that the adapter changes."""

    a: Entry  # [r * E, K]
    b: Entry  # [N, r * E]
    target: Fused
    rank: int
    ratio: float = 1.0  # to be folded into B

    def places(self, layout: Layout) -> Iterator[Place]:
        """What of its kind's pages it fills."""
        kind, first, count = self.target[:3]
        return itertools.product((kind,), range(first, first + count), range(layout.kinds[kind].slices))


def take_fused(name: str, config: PeftConfig, contents: Contents, layout: Layout) -> dict[str, AllExperts]:
    """Parameter -> its factors, which are taken out of `contents`; `written` there has the file's name of it then.

    Raises `AdapterFormatError` for what is missing, `AdapterMismatchError` for shapes of another base or a parameter
    that takes no adapters, and `AdapterUnsupportedError` for more than low-rank factors.
    """
    found = {}
    for module, parameters in layout.fused.items():
        named = [
            parameter
            for parameter in parameters
            if any(stands_for(wanted, parameter) for wanted in config.target_parameters or ())
        ]
        for depth, parameter in enumerate(reversed(named)):
            below = ".base_layer" * depth
            own = contents.parts.pop(module + below, {})
            theirs = contents.written.get(module + below, module + below).removesuffix(below)
            written = contents.written[parameter] = theirs + parameter.removeprefix(module)
            found[parameter] = _checked(name, config, parameter, own, parameters[parameter], config.rank(written))
    return found


def _checked(
    name: str, config: PeftConfig, parameter: str, own: dict[str, Entry], target: Fused, rank: int
) -> AllExperts:
    if not {A, B} <= own.keys():
        raise AdapterFormatError(name, f"target_parameters names {parameter}, which has no {min({A, B} - own.keys())}")
    if more := sorted(own.keys() - {A, B}):
        raise AdapterUnsupportedError(name, f"{parameter} has {more[0]}; retrain with low-rank factors only")
    if not target.taken:
        raise AdapterMismatchError(name, f"{parameter} takes no adapters (--lora-target-modules)")
    a, b, count = own[A], own[B], target.experts
    if a.shape != (rank * count, target.inputs) or b.shape != (target.outputs, rank * count):
        raise AdapterMismatchError(
            name,
            f"{parameter} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; rank {rank} of {count} experts of the "
            f"base model needs [{rank * count}, {target.inputs}] and [{target.outputs}, {rank * count}]; it was made "
            f"for {config.base_model_name_or_path!r}",
        )
    return AllExperts(a, b, target, rank)


def fill_fused(
    file: Tensors, modules: Sequence[AllExperts], a_pages: Pages, b_pages: Pages, layout: Layout, threads: Executor
) -> dict[str, str]:
    """Write what belongs to `modules` into the pages of their kinds; every tensor's sha256.

    A is every slice's: gate and up have one. Raises `AdapterFormatError` for values that are not finite.
    """

    def run(module: AllExperts) -> dict[str, str]:
        contents: dict[str, str] = {}
        kind, first, count = module.target[:3]
        own = slice(first, first + count)
        a = _values(file, module.a, 1.0, layout, contents).reshape(count, 1, module.rank, -1)
        b = _values(file, module.b, module.ratio, layout, contents)
        b = b.reshape(-1, module.target.in_turn, module.rank, count).transpose(3, 2, 1, 0)
        b = b.reshape(count, module.rank, -1)
        for number, (a_page, b_page) in enumerate(zip(a_pages[kind], b_pages[kind])):
            part = slice(number * RANKS_PER_PAGE, (number + 1) * RANKS_PER_PAGE)
            ranks = max(0, min(RANKS_PER_PAGE, module.rank - part.start))
            bits_of(a_page)[own, :, :ranks] = a[:, :, part]
            bits_of(a_page)[own, :, ranks:] = 0
            bits_of(b_page)[own, :ranks] = b[:, part]
            bits_of(b_page)[own, ranks:] = 0
        return contents

    futures = [threads.submit(run, module) for module in modules]
    wait(futures)  # all of them, also after an error: they use the file
    contents: dict[str, str] = {}
    for future in futures:
        contents |= future.result()
    return contents


def _values(file: Tensors, entry: Entry, ratio: float, layout: Layout, contents: dict[str, str]) -> Bits:
    raw = np.empty(entry.nbytes, np.uint8)
    file.read(entry, raw.data)
    contents[entry.name] = hashlib.sha256(raw.data).hexdigest()
    bits = finite(file.adapter, entry, raw, layout.dtype)
    return bits if ratio == 1 else scaled(raw, entry.dtype, layout.dtype, ratio)
