"""DecodeGraphs: whole decode steps, from token ids to the likeliest tokens, each launched as one CUDA graph."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aiolora.engine.batch import Bucket, InFlight, Packer, Routes, step_inputs
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.scheduler import Batch
from aiolora.engine.staging import Numbers, Staging, size_of
from aiolora.models.decoder import Decoder
from aiolora.models.inputs import StepInputs
from aiolora.ops.sampling import greedy_op

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a decode step of T rows brings; written over by the next one."""

    logits: Tensor  # [T, V]
    tokens: Tensor  # [T] int32, the likeliest
    logprobs: Tensor  # [T] float32, theirs


class StaticInputs:
    """Inputs that lie at the same addresses for every step of a bucket: views of one buffer, sent to by one copy."""

    def __init__(self, packer: Packer, previous: Tensor, buckets: Sequence[Bucket], *, max_pages: int) -> None:
        """`max_pages`: of one sequence, the width of the page table; columns beyond a sequence's own are never read."""
        self._packer = packer
        self._previous = previous
        device = previous.device
        table = np.empty((max(bucket.size for bucket in buckets), max_pages), dtype=np.int32)
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
        tensors["block_tables"] = self._block_tables[: bucket.size]
        return step_inputs(tensors, self._previous, str(self._previous.device))


class DecodeGraphs:
    """A graph a bucket, all in one memory pool; none before `capture`. Engine thread only.

    A graph reads and writes fixed addresses, and no kernel in it is shaped by what it reads: grids come from the
    bucket alone. `tokens` of a step are also written to `previous`, where the next one looks for them.
    """

    def __init__(
        self,
        model: Decoder,
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
        self._buckets = sorted(buckets, key=lambda bucket: (bucket.size, bucket.mixes), reverse=True)
        self._graphs: dict[Bucket, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        weight = model.head.weight
        self._logits = weight.new_empty((self._buckets[0].size, weight.shape[0]))

    def bucket(self, size: int, routes: Routes | None) -> Bucket | None:
        """The smallest that takes a step of `size` single tokens with these mixes."""
        fitting = (bucket for bucket in self._graphs if bucket.size >= size and bucket.fits(routes))
        return min(fitting, key=lambda bucket: bucket.size, default=None)

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

    def capture(self) -> None:
        """Capture every bucket: blocks for seconds, writes to no page of the KV cache."""
        started_s, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.walk_through()
        for bucket in self._buckets:
            step = self._inputs.write(bucket, self._inputs.padding(bucket))
            graph = torch.cuda.CUDAGraph()
            # what other threads do to the device meanwhile, another engine's among them, is none of its business
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = self._step(step)
            self._graphs[bucket] = graph, outputs
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        seconds, used = time.monotonic() - started_s, free - torch.cuda.mem_get_info()[0]
        _log.info("captured %d decode graphs in %.1f s: %.0f MiB", len(self._buckets), seconds, used / 2**20)

    def _step(self, step: StepInputs) -> Outputs:
        """One step of T rows; its logits lie where those of every bucket do."""
        size = len(step.tokens)
        out = self._logits[:size]
        out.copy_(self._model.logits(self._model(step, self._cache.layers), step))
        tokens, logprobs = greedy_op(out)
        self._previous[:size].copy_(tokens)
        return Outputs(out, tokens, logprobs)
