"""StepGraphs: whole steps, from token ids to the likeliest tokens, each launched as one CUDA graph."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aiolora.engine.batch import Bucket, InFlight, Packer, step_inputs
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.routes import Routes
from aiolora.engine.scheduler import Batch
from aiolora.engine.staging import Numbers, Staging, size_of
from aiolora.models.inputs import StepInputs
from aiolora.models.model import Model
from aiolora.ops.sampling import greedy_op
from aiolora.types import Report, unreported

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step with S rows of logits brings; written over by the next one."""

    logits: Tensor  # [S, V]
    tokens: Tensor  # [S] int32, the likeliest
    logprobs: Tensor  # [S] float32, theirs
    hidden: Tensor | None  # [S, H] that the logits are of, for adapters on the head; None: in a graph without adapters


class StaticInputs:
    """Inputs that lie at the same addresses for every step of a bucket: views of one buffer, sent to by one copy."""

    def __init__(self, packer: Packer, previous: Tensor, buckets: Sequence[Bucket], *, max_pages: int) -> None:
        """`max_pages`: of one sequence, the width of the page table; columns beyond a sequence's own are never read."""
        self._packer = packer
        self._previous = previous
        device = previous.device
        table = np.empty((max(bucket.sequences for bucket in buckets), max_pages), dtype=np.int32)
        most = max(size_of({**self.padding(bucket), "block_tables": table}) for bucket in buckets)
        self._buffer = torch.zeros(most, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(table.shape, dtype=torch.int32, device=device)
        self._staging = Staging(device.type)

    def padding(self, bucket: Bucket) -> Numbers:
        """A step of no sequences."""
        return self._packer.lay_out(Batch(), None, InFlight(self._previous), bucket)

    def write(self, bucket: Bucket, numbers: Numbers) -> StepInputs:
        """Send `numbers`, laid out for `bucket`."""
        tensors = self._staging.send_into(self._buffer, numbers)
        table = tensors["block_tables"]
        self._block_tables[: table.shape[0], : table.shape[1]].copy_(table)
        tensors["block_tables"] = self._block_tables[: bucket.sequences]
        return step_inputs(tensors, self._previous, str(self._previous.device))


class StepGraphs:
    """A graph a bucket, all in one memory pool; none before `capture`. Engine thread only.

    A graph reads and writes fixed addresses, and no kernel in it is shaped by what it reads: grids come from the
    bucket alone. `tokens` of a step are also written to `previous`, where the next one looks for them.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        packer: Packer,
        previous: Tensor,
        buckets: Sequence[Bucket],
        *,
        max_pages: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._previous = previous
        self._inputs = StaticInputs(packer, previous, buckets, max_pages=max_pages)
        self._buckets = sorted(buckets, key=lambda bucket: (bucket.tokens, bucket.sequences, bucket.mixes))
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        weight = model.head.weight
        self._logits = weight.new_empty((max(bucket.sequences for bucket in buckets), weight.shape[0]))

    def bucket(self, tokens: int, sequences: int, routes: Routes | None) -> Bucket | None:
        """The smallest that takes such a step."""
        return next((bucket for bucket in self._graphs if bucket.fits(tokens, sequences, routes)), None)

    def replay(self, bucket: Bucket, numbers: Numbers) -> Outputs:
        """Launch the step that `numbers` were laid out for."""
        self._inputs.write(bucket, numbers)
        graph, outputs = self._graphs[bucket]
        graph.replay()
        return outputs

    def walk_through(self) -> None:
        """Take a step of no sequences in each bucket: what is compiled or allocated once must not be so in a graph."""
        for bucket in self._buckets:
            self._step(self._inputs.write(bucket, self._inputs.padding(bucket)))

    def capture(self, report: Report = unreported) -> None:
        """Capture every bucket: blocks for seconds, writes to no page of the KV cache."""
        started_s, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.walk_through()
            torch.cuda.empty_cache()
            for bucket in reversed(self._buckets):  # the largest first: the others find their memory in its
                step = self._inputs.write(bucket, self._inputs.padding(bucket))
                graph = torch.cuda.CUDAGraph()
                # what other threads do to the device meanwhile, another engine's among them, is none of its business.
                # `torch.cuda.graph` would give back all locked memory first, and adapters need what is reserved
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    outputs = self._step(step)
                finally:
                    graph.capture_end()
                self._graphs[bucket] = graph, outputs
                report("graphs", len(self._graphs), len(self._buckets))
        self._graphs = {bucket: self._graphs[bucket] for bucket in self._buckets}
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        seconds, used = time.monotonic() - started_s, free - torch.cuda.mem_get_info()[0]
        _log.info("captured %d graphs of steps in %.1f s: %.0f MiB", len(self._buckets), seconds, used / 2**20)

    def _step(self, step: StepInputs) -> Outputs:
        """One step; its logits lie where those of every bucket do."""
        hidden = self._model(step, self._cache.layers)
        out = self._logits[: len(hidden)]
        out.copy_(self._model.logits(hidden))
        tokens, logprobs = greedy_op(out)
        self._previous[: len(hidden)].copy_(tokens)
        return Outputs(out, tokens, logprobs, hidden if step.routing is not None else None)
