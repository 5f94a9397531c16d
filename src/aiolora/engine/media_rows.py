"""Images and recordings in a step, as numbers: which tokens stand for which rows, and at which angles they turn."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aiolora.engine.scheduler import Batch
from aiolora.types import MediaItem, Mix


class Span(NamedTuple):
    """Rows [low, high) of an item stand in a step, from token `at` on."""

    item: MediaItem
    mix: Mix | None
    low: int
    high: int
    at: int


def media_spans(batch: Batch) -> Iterator[Span]:
    """What of images and recordings is in `batch`; a run may begin or end within an item."""
    first = 0
    for run in batch.runs:
        for item in run.seq.request.media:
            low = max(run.start, item.start)
            high = min(run.start + run.count, item.start + item.count)
            if low < high:
                at = first + low - run.start
                yield Span(item, run.seq.mix, low - item.start, high - item.start, at)
        first += run.count


def rotary_numbers(batch: Batch, numbers: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """`positions` [T] where tokens do not turn at their `numbers` [T]; `axes` [3, T] where those of a token differ."""
    if not any(run.seq.request.rotary for run in batch.runs):
        return {}
    axes = np.broadcast_to(numbers, (3, len(numbers))).astype(np.int32)
    first = 0
    for run in batch.runs:
        if rotary := run.seq.request.rotary:
            of_prompt = max(0, min(run.count, rotary.axes.shape[1] - run.start))
            axes[:, first : first + of_prompt] = rotary.axes[:, run.start : run.start + of_prompt]
            axes[:, first + of_prompt : first + run.count] += rotary.shift
        first += run.count
    return {"positions": axes[0], "axes": axes} if (axes != axes[0]).any() else {"positions": axes[0]}
