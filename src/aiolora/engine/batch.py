"""Packer: from a Batch (sequences) to StepInputs (tensors)."""

import functools
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aiolora.engine.media_rows import rotary_numbers
from aiolora.engine.own_rows import has, head_blocks, head_numbers, trunk_inputs, trunk_numbers
from aiolora.engine.routes import Ints, Placed, Places, Routes, int32, padded, routing_numbers
from aiolora.engine.scheduler import Batch, Scheduled
from aiolora.engine.sequence import Sequence
from aiolora.engine.staging import Numbers, Staging
from aiolora.lora.kinds import PageKinds
from aiolora.lora.layout import EMBEDDING, NORMS
from aiolora.models.inputs import HeadInputs, StepInputs
from aiolora.ops.blocks import ROWS_PER_BLOCK
from aiolora.ops.linear import Routing, tile_of
from aiolora.types import Mix


@dataclass(slots=True)
class InFlight:
    """What the launch before sampled: the tokens on the device; on the host only which row is whose."""

    tokens: Tensor  # [max_num_seqs] int32
    rows: dict[Sequence, int] = field(default_factory=dict)

    @classmethod
    def none(cls, max_num_seqs: int, device: str) -> "InFlight":
        return cls(torch.zeros(max_num_seqs, dtype=torch.int32, device=device))

    def row(self, run: Scheduled) -> int:
        """Where the last token of `run` lies if the host does not know it yet; -1: it does."""
        return self.rows[run.seq] if run.start + run.count > len(run.seq.tokens) else -1


@dataclass(frozen=True, slots=True)
class Bucket:
    """Fixed sizes of a step; smaller ones of its sort are padded to it. T = B: one token of each sequence."""

    tokens: int  # T
    sequences: int  # B
    mixes: int = 0  # distinct ones at most; 0: no adapters
    pages: int = 0  # W

    @property
    def decodes(self) -> bool:
        """Whether it is for single tokens; else for steps with prompts, too."""
        return self.tokens == self.sequences

    @property
    def tiles(self) -> int:
        """G: however the tokens are spread over the mixes and none, each but one leaves at most a tile unfilled."""
        return min(self.tokens, -(-self.tokens // tile_of(self.tokens, "cuda")) + min(self.tokens, self.mixes + 1) - 1)

    def fits(self, tokens: int, sequences: int, routes: Routes | None) -> bool:
        """Whether a step of these sizes and mixes can be padded to it."""
        if tokens > self.tokens or sequences > self.sequences or self.decodes != (tokens == sequences):
            return False
        if routes is None or not self.mixes:
            return routes is None and not self.mixes
        return routes.width <= self.pages and len(routes.pages) <= self.mixes


class Packer:
    """Lays a step's numbers out, everything but `Places` from scratch each time. Engine thread only."""

    def __init__(
        self,
        *,
        page_size: int,
        kinds: PageKinds,
        residency: Placed,
        device: str,
        lora_pages: int = 0,
        rows: Tensor | None = None,
        turns_apart: bool = False,
    ) -> None:
        """`lora_pages`: least width of the page tables, so that steps of many ranks are one shape to the kernels.

        `rows`: the pool's blocks. `turns_apart`: on this model tokens may turn on several axes (`Rotary`).
        """
        self._turns_apart = turns_apart
        self._page_size = page_size
        self._kinds = kinds
        self._places = Places(kinds, residency)
        self._device = device
        self._lora_pages = lora_pages
        self.own_rows = rows
        self._staging = Staging(device)

    def pack(self, batch: Batch, routes: Routes | None, in_flight: InFlight | None = None) -> StepInputs:
        """The tensors of `batch`, all of exactly its sizes; `routes` are its own."""
        in_flight = in_flight or InFlight.none(1, self._device)
        numbers = self.lay_out(batch, routes, in_flight)
        if routes is None or not self.changes_trunk(routes):
            return step_inputs(self._staging.send(numbers), in_flight.tokens, self._device)
        tensors = self._staging.send({**numbers, **trunk_numbers(routes.own, routes.of_tokens)})
        step = step_inputs(tensors, in_flight.tokens, self._device)
        return trunk_inputs(step, tensors, self.own_rows, embeds=routes.have(self._kinds.embedding))

    def changes_trunk(self, routes: Routes) -> bool:
        """Whether an adapter of the step has its share in the embedding or in norms: no graph has room for that."""
        return routes.have(self._kinds.embedding) or has(routes.own, EMBEDDING) or has(routes.own, NORMS)

    def head(self, batch: Batch, routes: Routes | None, rows: slice) -> HeadInputs | None:
        """What adapters do to the head over some of the rows of logits that `batch` wants; None: nothing."""
        if routes is None:
            return None
        changed = [mix.changes_head(self._kinds.head) for mix in routes.pages]
        if not any(changed):
            return None
        mixes = int32([mix if mix >= 0 and changed[mix] else -1 for mix in mixes_of_logits(batch, routes)[rows]])
        if (mixes < 0).all():
            return None
        numbers = self._route(routes, mixes, len(mixes), None) | head_numbers(routes.own, mixes)
        # whole blocks: kernels are compiled for sizes that are multiples of 16
        vocabularies = [mix.vocabulary for mix in routes.pages]
        widest = -(-max(vocabularies) // ROWS_PER_BLOCK) * ROWS_PER_BLOCK
        if widest:
            numbers["vocabularies"] = int32([*vocabularies, 0])[mixes]  # -1: the last
        tensors = self._staging.send(numbers)
        return HeadInputs(
            routing_of(tensors, self._device),
            low_rank=routes.have(self._kinds.head),
            own=head_blocks(tensors, self.own_rows),
            vocabularies=tensors.get("vocabularies"),
            widest=widest,
        )

    def routes(self, batch: Batch) -> Routes | None:
        """The mixes of `batch` in the order of their first run; None: no token has an adapter."""
        numbers: dict[Mix, int] = {}
        mixes, counts = [], []
        for run in batch.runs:
            seq, count = run.seq, run.count
            mix = seq.request.mix
            if mix is not None and run.start < seq.active_from:
                bare = num_bare(run)
                mixes.append(-1)
                counts.append(bare)
                count -= bare
                if not count:
                    continue
            mixes.append(-1 if mix is None else numbers.setdefault(mix, len(numbers)))
            counts.append(count)
        return Routes(mixes, counts, self._places.step([*numbers])) if numbers else None

    def rows_of(self, mix: Mix | None) -> Callable[[int], Routing]:
        """The routing of so many rows that are all of `mix`, whose adapters are on the device."""
        routes = Routes([], [], [self._places.of(mix)] if mix is not None else [])
        number = 0 if mix is not None else -1

        def rows(count: int) -> Routing:
            numbers = self._route(routes, np.full(count, number, dtype=np.int32), count, None)
            return routing_of(self._staging.send(numbers), self._device)

        return functools.cache(rows)

    def lay_out(
        self, batch: Batch, routes: Routes | None, in_flight: InFlight, bucket: Bucket | None = None
    ) -> Numbers:
        """The numbers of `batch`, of its sizes or of those of `bucket`: padding does nothing.

        Logits are wanted where a run samples and, behind all of those, for prompt logprobs; of every single token.
        `block_tables` comes last and is never padded: [runs, most pages of a run].
        """
        tokens, tables = array("i"), array("i")
        starts, counts, widths = [], [], []
        for run in batch.runs:
            seq, start, count = run.seq, run.start, run.count
            known = seq.tokens
            if start + count > len(known):
                tokens.extend(known[start:])
                tokens.append(-1 - in_flight.rows[seq])
            elif count == 1:
                tokens.append(known[start])
            else:
                tokens.extend(known[start : start + count])
            starts.append(start)
            counts.append(count)
            widths.append(len(seq.pages))
            tables.extend(seq.pages)
        size = len(tokens) if bucket is None else bucket.tokens
        num_seqs = len(counts) if bucket is None else bucket.sequences
        first, count_B, width_B = int32(starts), int32(counts), int32(widths)
        query_starts = np.arange(num_seqs + 1, dtype=np.int32)
        query_starts[1 : len(counts) + 1] = count_B.cumsum()
        if bucket is not None and not bucket.decodes:
            query_starts[len(counts) + 1 :] = len(tokens)  # sequences without queries
        block_tables = np.zeros((len(counts), max(widths, default=1)), dtype=np.int32)
        block_tables[np.arange(block_tables.shape[1]) < width_B[:, None]] = int32(tables)
        run_of_token = np.repeat(np.arange(len(counts)), count_B)
        positions = np.arange(len(tokens)) + (first - query_starts[: len(counts)])[run_of_token]
        page, offset = np.divmod(positions, self._page_size)
        turned = rotary_numbers(batch, positions) if self._turns_apart else {}
        numbers: dict[str, NDArray[Any]] = {
            "tokens": padded(int32(tokens), size, 0),
            "positions": padded(turned.pop("positions", positions), size, 0),
            "slots": padded(block_tables[run_of_token, page] * self._page_size + offset, size, -1),
            "kv_lengths": padded(first + count_B, num_seqs, 0),
            "query_starts": query_starts,
        }
        if bucket is None:
            numbers["logits_at"] = int32(_logits_at(batch, query_starts))
        elif not bucket.decodes:
            numbers["logits_at"] = padded(int32(_logits_at(batch, query_starts)), num_seqs, 0)
        numbers |= turned
        if routes is not None or (bucket is not None and bucket.mixes):
            routes = routes or Routes([], [], [])
            numbers |= self._route(routes, routes.of_tokens, size, bucket)
        return numbers | {"block_tables": block_tables}

    def _route(self, routes: Routes, mixes: Ints, size: int, bucket: Bucket | None) -> dict[str, NDArray[Any]]:
        """The routing of `size` tokens, the first of them of `mixes` (-1: none), the others of none."""
        sizes = {"tile": tile_of(size, self._device), "sites": self._kinds.sites}
        if bucket is not None:
            tiles = bucket.tiles
            sizes |= {"width": bucket.pages, "tiles": tiles, "items": tiles * bucket.pages // 2}
            return routing_numbers(routes, mixes, size, **sizes)
        width = self._lora_pages or routes.width
        while width < routes.width:  # kernels are compiled for a width: few widths, however many adapters a mix has
            width *= 2
        return routing_numbers(routes, mixes, size, **sizes, width=width)


def step_inputs(tensors: Mapping[str, Tensor], previous: Tensor, device: str) -> StepInputs:
    """The step whose fields are `tensors`, under the names that `Packer.lay_out` gives them."""
    routing = routing_of(tensors, device) if "perm" in tensors else None
    return StepInputs(
        tokens=tensors["tokens"],
        previous=previous,
        positions=tensors["positions"],
        slots=tensors["slots"],
        block_tables=tensors["block_tables"],
        kv_lengths=tensors["kv_lengths"],
        query_starts=tensors["query_starts"],
        logits_at=tensors.get("logits_at"),
        routing=routing,
        axes=tensors.get("axes"),
    )


def routing_of(tensors: Mapping[str, Tensor], device: str) -> Routing:
    """The routing whose fields are among `tensors`."""
    tables = {name: tensors[name] for name in Routing._fields[:-1]}
    return Routing(**tables, tile=tile_of(len(tables["perm"]), device))


def num_bare(run: Scheduled) -> int:
    """How many of the run's first tokens are the base's, whatever mix the sequence has."""
    return min(run.count, max(0, run.seq.active_from - run.start))


def logit_offsets(run: Scheduled) -> list[int]:
    """Tokens of `run`, counted from its first, whose logits are needed: for prompt logprobs and for the sample."""
    offsets = list(range(num_prompt_logits(run)))
    if run.samples:
        offsets.append(run.count - 1)
    return offsets


def num_prompt_logits(run: Scheduled) -> int:
    """How many of the run's first tokens are followed by a token of the prompt whose log-probability is wanted."""
    seq = run.seq
    if not seq.wants_prompt_logprobs:
        return 0
    # token i's logits are the prediction of token i + 1, known for i + 1 < num_prompt
    return min(run.count, max(0, seq.num_prompt - 1 - run.start))


def mixes_of_logits(batch: Batch, routes: Routes) -> list[int]:
    """The mix in `routes` of each row of logits that `batch` wants, in their order."""
    starts = np.cumsum([0, *(run.count for run in batch.runs)])
    found: list[int] = routes.of_tokens[int32(_logits_at(batch, starts))].tolist()
    return found


def _logits_at(batch: Batch, query_starts: NDArray[Any]) -> list[int]:
    starts = query_starts.tolist()
    wanted = [end - 1 for end, run in zip(starts[1:], batch.runs) if run.samples]
    for start, run in zip(starts, batch.runs):
        if count := num_prompt_logits(run):
            wanted += range(start, start + count)
    return wanted
