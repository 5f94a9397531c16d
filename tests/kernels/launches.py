"""What steps of Llama-3.1-8B launch on Hopper, told without a GPU: the host functions run, their launches are kept."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from aiolora.ops.experts import most_tiles, rows_of_tile
from aiolora.ops.kernels import activation, blocks, embedding, experts, linear, norm, rope, routes, sampling

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 128256
BOUNDS = {  # of the slices of its projections
    "qkv": [0, HIDDEN, HIDDEN + KV_HEADS * DIM, HIDDEN + 2 * KV_HEADS * DIM],
    "o": [0, HIDDEN],
    "gate_up": [0, INNER, 2 * INNER],
    "gate": [0, 128],
    "biased gate": [0, 32],
}
PAGES, VECTORS = 512, 32  # of ranks in the pool, of gains and shifts
PROCESSORS = 132  # of an H200


@dataclass(frozen=True)
class Mixture:
    """Sizes and switches of experts."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    gate: str = "gate"  # of BOUNDS
    limit: float = 0.0
    biased: bool = False


QWEN = Mixture(128, 8, 2048, 768)  # Qwen3-30B-A3B
GPT_OSS = Mixture(32, 4, 2880, 2880, "biased gate", 7.0, True)  # gpt-oss-20b


@dataclass(frozen=True)
class Launch:
    """A jitted function, its arguments by name, the compiler's options."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def launches(call: Callable[[], object], *, pdl: bool = True) -> list[Launch]:
    """What `call` would launch where programs may be set up while the kernel before them runs (`pdl`), or not."""
    with _recorded(pdl) as found:
        call()
    return found


@contextmanager
def _recorded(pdl: bool) -> Iterator[list[Launch]]:
    found: list[Launch] = []

    def launch(function: Any, grid: tuple[int, ...], args: tuple[Any, ...], *, pdl: bool = False, **named: Any) -> None:
        said = {**named, "PDL": pdl, "launch_pdl": pdl}
        arguments = dict(zip(function.arg_names, args)) | {k: v for k, v in said.items() if k in function.arg_names}
        found.append(Launch(function, arguments, {k: v for k, v in said.items() if k not in function.arg_names}))

    with ExitStack() as stack:
        for module in (activation, blocks, embedding, experts, linear, norm, rope, routes, sampling):
            stack.enter_context(patch.object(module, "launch", launch))
        for module in (embedding, linear, sampling):
            stack.enter_context(patch.object(module, "PDL", pdl))
        stack.enter_context(patch.object(linear, "processors", lambda device: PROCESSORS))
        yield found


class Step:
    """The ops of a step of so many tokens in bfloat16, by adapters of rank 16; its tensors have shapes alone."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.tile = 16 if tokens <= 256 else 64
        groups = -(-tokens // self.tile) + min(tokens, 32)
        self.perm, self.owners, self.positions, self.slots = (ints(tokens) for _ in range(4))
        self.tiles, self.items, self.pages = ints(groups, 2), ints(groups, 4), ints(groups, 1, 2)
        self.vector_pages = ints(groups, 1)
        self.routing = [self.perm, self.tiles, self.items, self.pages, floats(groups, 1, 2)]

    def product(self, name: str) -> None:
        linear.product(halves(self.tokens, HIDDEN), halves(BOUNDS[name][-1], HIDDEN))

    def product_shrink(self, name: str) -> None:
        x, weight = halves(self.tokens, HIDDEN), halves(BOUNDS[name][-1], HIDDEN)
        a = halves(len(BOUNDS[name]) - 1, PAGES, 8, HIDDEN)
        linear.product_shrink(x, weight, a, self.routing, [0, self.tile])

    def complete(self) -> None:
        linear.complete(*self._partial("o", True))

    def rms_norm(self) -> None:
        norm.rms_norm(halves(self.tokens, HIDDEN), halves(HIDDEN), 1e-5)

    def add_norm(self, owing: bool) -> None:
        norm.add_norm(*self._partial("o", owing), halves(self.tokens, HIDDEN), halves(HIDDEN), 1e-5)

    def joined(self, owing: bool) -> None:
        """Gemma's: the value under a norm of its own, weights around zero."""
        weight = halves(HIDDEN)
        norm.add_norm(*self._partial("o", owing), halves(self.tokens, HIDDEN), weight, 1e-5, 1.0, weight)

    def silu_mul(self, owing: bool) -> None:
        activation.silu_mul(*self._partial("gate_up", owing))

    def gelu_mul(self, owing: bool) -> None:
        """Gate and up fused in one slice."""
        *value, where = self._partial("gate_up", owing)
        activation.gelu_mul(*value, [*where[:2], 0, where[-1]] if owing else [])

    def rope_store(self, owing: bool, *, turned: int = DIM) -> None:
        caches = [halves(64, 16, KV_HEADS, DIM) for _ in range(2)]
        where = floats(8192, turned), self.positions, self.slots
        rope.rope_store(*self._partial("qkv", owing), None, None, 1e-5, *where, *caches, HEADS)

    def gate(self, owing: bool, of: Mixture = QWEN) -> None:
        y, _, owed, where = self._partial(of.gate, owing)
        bias = halves(of.experts) if of.biased else None
        routes.choose_experts(y, bias, owed, where, of.top_k, True, self._tile(of))

    def gated_experts(self, owing: bool, of: Mixture = QWEN) -> None:
        x, weight = halves(self.tokens, of.hidden), halves(of.experts, 2 * of.inner, of.hidden)
        bias = halves(of.experts, 2 * of.inner) if of.biased else None
        adapters = self._adapters(of, of.hidden, 2 * of.inner, 2, owing)
        experts.gated_experts(x, weight, bias, self._chosen(of), *adapters, 1.702, of.limit)

    def summed_experts(self, owing: bool, of: Mixture = QWEN) -> None:
        inner, weight = halves(self.tokens * of.top_k, of.inner), halves(of.experts, of.hidden, of.inner)
        bias = halves(of.experts, of.hidden) if of.biased else None
        adapters = self._adapters(of, of.inner, of.hidden, 1, owing)
        experts.summed_experts(inner, weight, bias, floats(self.tokens, of.top_k), self._chosen(of), *adapters)

    def _tile(self, of: Mixture) -> int:
        return rows_of_tile(self.tokens, of.top_k, of.experts, "cuda")

    def _chosen(self, of: Mixture) -> list[Tensor]:
        groups = most_tiles(self.tokens, of.top_k, of.experts, self._tile(of))
        return [ints(self.tokens, of.top_k), ints(self.tokens * of.top_k), ints(groups, 3)]

    def _adapters(
        self, of: Mixture, depth: int, columns: int, slices: int, owing: bool
    ) -> tuple[list[Tensor], list[int]]:
        if not owing:
            return [], [self._tile(of)]
        a, b = halves(PAGES, of.experts, slices, 8, depth), halves(PAGES, of.experts, 8, columns)
        scales = floats(*self.pages.shape)
        return [a, b, self.pages, scales, self.owners], [self._tile(of), 0]

    def embed(self) -> None:
        embedding.embed(self.perm, self.owners, halves(VOCABULARY, HIDDEN))

    def own_logits(self) -> None:
        rows, table = halves(PAGES, 128, HIDDEN), ints(33, VOCABULARY // 128)
        logits, hidden = halves(self.tokens, VOCABULARY), halves(self.tokens, HIDDEN)
        blocks.own_logits(logits, hidden, rows, table, self.owners, self.perm, self.tiles, self.tile)

    def greedy(self) -> None:
        sampling.greedy(halves(self.tokens, VOCABULARY))

    def report(self) -> None:
        sampling.report(halves(self.tokens, VOCABULARY), self.perm)

    def sample(self) -> None:
        temperature, top_p, min_p, u = (floats(self.tokens) for _ in range(4))
        sampling.sample(halves(self.tokens, VOCABULARY), temperature, ints(self.tokens), top_p, min_p, u)

    def _partial(self, name: str, owing: bool) -> tuple[Tensor, None, list[Tensor], list[int]]:
        """y, bias, owed and where, as readers of a projection take them."""
        bounds = BOUNDS[name]
        y = halves(self.tokens, bounds[-1])
        if not owing:
            return y, None, [], []
        h, b = floats(self.tokens, len(bounds) - 1, 16), halves(PAGES, 8, bounds[-1])
        tables = [self.perm, self.tiles, self.pages, self.vector_pages, self.owners]
        return y, None, [h, b, floats(VECTORS, 2, bounds[-1]), *tables], [0, self.tile, *bounds]


def halves(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
