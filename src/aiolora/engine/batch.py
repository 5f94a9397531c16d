"""Packer: from a Batch (sequences) to StepInputs (tensors)."""

from collections.abc import Mapping
from typing import Protocol

import torch

from aiolora.engine.scheduler import Batch, Scheduled
from aiolora.models.inputs import StepInputs
from aiolora.ops.linear import Rows, tiling
from aiolora.types import AdapterVersion, Mix


class Placed(Protocol):
    """What the packer asks of `lora.residency.Residency`."""

    def pages(self, version: AdapterVersion) -> Mapping[int, list[int]]: ...


class Packer:
    """Lays a step's numbers out on the device.

    The page table of the step's mixes is built from scratch each time: a row means nothing beyond its step, so none can
    be stale. Engine thread only.
    """

    def __init__(self, *, page_size: int, num_kinds: int, residency: Placed, device: str) -> None:
        self._page_size = page_size
        self._num_kinds = num_kinds
        self._residency = residency
        self._device = device

    def pack(self, batch: Batch) -> StepInputs:
        """The tensors of `batch`: logits are wanted where a run samples and where prompt logprobs are asked for."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tables: list[list[int]] = []
        lengths: list[int] = []
        starts = [0]
        logits_at: list[int] = []
        size = self._page_size
        for run in batch.runs:
            seq, end = run.seq, run.start + run.count
            tokens += seq.tokens[run.start : end]
            positions += range(run.start, end)
            slots += [seq.pages[position // size] * size + position % size for position in range(run.start, end)]
            logits_at += [starts[-1] + offset for offset in logit_offsets(run)]
            tables.append(seq.pages)
            lengths.append(end)
            starts.append(len(tokens))
        width = max(len(table) for table in tables)
        mixes = [run.seq.mix for run in batch.runs for _ in range(run.count)]
        return StepInputs(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            block_tables=self._tensor([table + [0] * (width - len(table)) for table in tables]),
            kv_lengths=self._tensor(lengths),
            query_starts=self._tensor(starts),
            logits_at=self._tensor(logits_at),
            rows=self._rows(mixes),
        )

    def _rows(self, mixes: list[Mix | None]) -> Rows | None:
        """The routing of tokens [T] with those mixes; None where no token has an adapter."""
        groups: dict[Mix, list[int]] = {}
        bare = [token for token, mix in enumerate(mixes) if mix is None]
        for token, mix in enumerate(mixes):
            if mix is not None:
                groups.setdefault(mix, []).append(token)
        if not groups:
            return None
        tile, splits = tiling(len(mixes), self._device)
        perm: list[int] = []
        tiles = []
        table: list[list[list[int]]] = []
        scales: list[list[list[float]]] = []
        for row, (mix, members) in enumerate(groups.items()):
            tiles += [[row, len(perm) + low, min(tile, len(members) - low)] for low in range(0, len(members), tile)]
            perm += members
            row_pages: list[list[int]] = [[] for _ in range(self._num_kinds)]
            row_scales: list[list[float]] = [[] for _ in range(self._num_kinds)]
            for version, weight in mix.parts:
                placed = self._residency.pages(version)
                for site in version.pages:
                    row_pages[site.kind] += placed[site.kind]
                    row_scales[site.kind] += [site.scale * weight] * site.count
            table.append(row_pages)
            scales.append(row_scales)
        if bare:
            tiles += [[-1, len(perm) + low, min(tile, len(bare) - low)] for low in range(0, len(bare), tile)]
            perm += bare
        width = max(len(pages) for row_pages in table for pages in row_pages)
        return Rows(
            tile=tile,
            splits=splits,
            perm=self._tensor(perm),
            tiles=self._tensor(tiles),
            items=self._tensor([[-1, 0]]),
            pages=self._tensor([[pages + [-1] * (width - len(pages)) for pages in row] for row in table]),
            scales=torch.tensor(
                [[values + [0.0] * (width - len(values)) for values in row] for row in scales],
                dtype=torch.float32,
                device=self._device,
            ),
        )

    def _tensor(self, values: list[int] | list[list[int]] | list[list[list[int]]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def logit_offsets(run: Scheduled) -> list[int]:
    """Tokens of `run`, counted from its first, whose logits are needed: for prompt logprobs and for the sample."""
    seq = run.seq
    offsets = []
    if seq.wants_prompt_logprobs:
        # token i's logits are the prediction of token i + 1, known for i + 1 < num_prompt
        offsets = list(range(min(run.count, max(0, seq.num_prompt - 1 - run.start))))
    if run.samples:
        offsets.append(run.count - 1)
    return offsets
