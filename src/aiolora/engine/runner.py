"""ModelRunner: launches a step on the device. A Flight is a step that was launched and has not landed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from aiolora.engine.batch import InFlight, Packer, num_prompt_logits
from aiolora.engine.encoding import Encoding
from aiolora.engine.graphs import StepGraphs
from aiolora.engine.kv_cache import KVCache
from aiolora.engine.plan import Plan
from aiolora.engine.routes import Routes
from aiolora.engine.sampler import Chosen, Sampled, Sampler, read
from aiolora.engine.scheduler import Batch
from aiolora.engine.sequence import Sequence
from aiolora.engine.warm_up import IDLE, blank_head, blank_step, sizes_of, walk_linears
from aiolora.models.inputs import StepInputs
from aiolora.models.model import Model
from aiolora.ops.registration import rehearsal
from aiolora.types import MediaItem, Report, Request, SamplingParams, unreported

_ROWS_OF_LOGITS = 256  # of prompt positions at a time: 131 MB of float32 for a vocabulary of 128k


@dataclass(slots=True)
class Landed:
    """What a step brought: for each run the sampled token (or None), and log-probabilities of prompt tokens."""

    sampled: list[Sampled | None]
    prompt: list[list[Sampled]]  # of the tokens that follow the run's first ones


class Flight(Protocol):
    """A launched step."""

    batch: Batch

    def land(self) -> Landed:
        """Wait for the step and bring its results to the host."""
        ...


class Runner(Protocol):
    """What the engine asks of the thing that computes. `overlaps`: a step may be launched before the last landed."""

    overlaps: bool

    def launch(self, batch: Batch, look_for_masks: Callable[[Batch], None]) -> Flight:
        """Begin a step; `look_for_masks` is called once it computes, before anything is chosen."""
        ...


@dataclass(slots=True)
class ModelFlight:
    """A step whose results are on their way into the host tensors here; they are there once `event` has passed."""

    batch: Batch
    chosen: Chosen | None  # of the runs that sample; None: none does
    prompt: list[tuple[Chosen, list[int | None]]]  # of all wanted prompt positions, with how many likeliest each wants
    event: torch.cuda.Event | None  # None: there already (CPU)

    def land(self) -> Landed:
        if self.event is not None:
            self.event.synchronize()  # other threads run meanwhile
        runs = self.batch.runs
        tops = [run.seq.params.logprobs for run in runs if run.samples]
        sampled = iter(read(self.chosen, tops) if self.chosen is not None else [])
        prompt = (one for chosen, tops in self.prompt for one in read(chosen, tops))
        return Landed(
            [next(sampled) if run.samples else None for run in runs],
            [list(islice(prompt, num_prompt_logits(run))) for run in runs] if self.prompt else [[] for _ in runs],
        )


class ModelRunner:
    """Packs a batch, runs the model on it, samples; never waits for the device. Engine thread only.

    `overlaps`: by default on a GPU, where a step that was launched computes while the host goes on.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        packer: Packer,
        sampler: Sampler,
        *,
        max_num_seqs: int,
        encoding: Encoding | None = None,
        compiled: bool = False,
        overlaps: bool | None = None,
    ) -> None:
        self._device = model.embed.weight.device
        self.overlaps = self._device.type == "cuda" if overlaps is None else overlaps
        self._compiled = compiled
        self._forward = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
        self._model = model
        self._cache = cache
        self._packer = packer
        self._sampler = sampler
        self._encoding = encoding
        self._graphs: StepGraphs | None = None
        self._in_flight = InFlight.none(max_num_seqs, str(self._device))

    def launch(self, batch: Batch, look_for_masks: Callable[[Batch], None]) -> ModelFlight:
        """Begin one step; the one before it was launched, and all before that have landed."""
        with torch.inference_mode():
            runs = [run for run in batch.runs if run.samples]
            seqs, rows = [run.seq for run in runs], [self._in_flight.row(run) for run in runs]
            routes = self._packer.routes(batch)
            media = self._encoding.rows(batch) if self._encoding is not None else None
            look = partial(look_for_masks, batch)
            chosen = self._replay(batch, routes, seqs, rows, look) if media is None else None
            prompt: list[tuple[Chosen, list[int | None]]] = []
            if chosen is None:
                inputs = self._packer.pack(batch, routes, self._in_flight)
                inputs = inputs if media is None else replace(inputs, media=media)
                if self._compiled:
                    _leave_sizes_open(inputs)
                hidden = self._forward(inputs, self._cache.layers)
                if seqs:
                    look()
                    logits = self._logits(hidden[: len(seqs)], batch, routes, 0)
                    chosen = self._choose(logits, seqs, self._in_flight.tokens, rows)
                prompt = self._prompt(batch, hidden, routes, len(seqs))
            self._in_flight.rows = {seq: row for row, seq in enumerate(seqs)}
            return self._flight(batch, chosen, prompt)

    def rehearse(self, plan: Plan, *, kinds: int, media: Iterable[MediaItem] = ()) -> None:
        """Compile, side by side, what the steps and graphs of `plan` launch on a GPU; nothing is computed.

        `kinds`: of sites that take adapters. `media`: some for the encoder.
        """
        graphs = self._graphs_of(plan)
        with torch.inference_mode(), rehearsal():
            self._walk_through(plan, kinds)
            self._encode(media)
            if graphs is not None:
                graphs.walk_through()

    def warm_up(self, plan: Plan, *, kinds: int, media: Iterable[MediaItem] = ()) -> None:
        """Take the steps in earnest: what was not rehearsed is compiled now, one kernel after the other (GPU)."""
        with torch.inference_mode():
            self._walk_through(plan, kinds)
            self._encode(media)

    def capture(self, plan: Plan, report: Report = unreported) -> None:
        """Capture the graphs of `plan` (GPU). Warm, and before the first launch only."""
        graphs = self._graphs_of(plan)
        if graphs is not None:
            with torch.inference_mode():
                graphs.capture(report)
        self._graphs = graphs

    def _graphs_of(self, plan: Plan) -> StepGraphs | None:
        """Not captured yet; None: the plan has none."""
        if not plan.graph_buckets:
            return None
        max_pages = -(-plan.max_model_len // plan.page_size)
        parts = self._model, self._cache, self._packer, self._in_flight.tokens
        return StepGraphs(*parts, plan.graph_buckets, max_pages=max_pages)

    def _encode(self, media: Iterable[MediaItem]) -> None:
        if self._encoding is not None:
            self._encoding.warm_up(media)

    def _walk_through(self, plan: Plan, kinds: int) -> None:
        """A step of each size that kernels tell apart, without adapters, with, and with many; an encoder's Linears."""
        if self._encoding is not None:
            walk_linears(self._encoding.linears(), kinds=kinds, pages=plan.lora_pages)
        params = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, logprobs=1)
        seq = Sequence(Request(id="", prompt_token_ids=(0,), params=params), 0, seed=0, number=0, max_length=2)
        for counts in sizes_of(plan, self._model):
            sizes = {"num_logits": len(counts), "page_size": plan.page_size, "pages": plan.lora_pages}
            for number, idle in {(0, 0), (kinds, 0), (kinds, IDLE if kinds else 0)}:
                inputs = blank_step(counts, device=str(self._device), kinds=number, idle=idle, **sizes)
                head = None
                if number:
                    inputs = replace(inputs, embeds=True)
                    head = blank_head(len(counts), self._packer.own_rows, inputs, idle=idle)
                hidden = self._model(inputs, self._cache.layers)
                logits = self._model.amended(self._model.logits(hidden), hidden, head)
                self._sampler.choose(logits, [seq] * len(counts), None, [-1] * len(counts))

    def _replay(
        self, batch: Batch, routes: Routes | None, seqs: list[Sequence], rows: list[int], look: Callable[[], None]
    ) -> Chosen | None:
        """The step as a graph; None, and nothing done, where none was captured for its like.

        A graph ends with the base's logits: what adapters do to the head comes behind it.
        """
        if self._graphs is None or not seqs or any(map(num_prompt_logits, batch.runs)):
            return None
        if routes is not None and self._packer.changes_trunk(routes):
            return None
        bucket = self._graphs.bucket(batch.num_tokens, len(batch.runs), routes)
        if bucket is None:
            return None
        numbers = self._packer.lay_out(batch, routes, self._in_flight, bucket)
        head = self._packer.head(batch, routes, slice(len(seqs)))
        if head is None and self._sampler.plain(seqs):
            out = self._graphs.replay(bucket, numbers)
            return Chosen(out.tokens[: len(seqs)], out.logprobs[: len(seqs)], None, None)
        previous = self._in_flight.tokens.clone()  # the graph writes the likeliest over them
        out = self._graphs.replay(bucket, numbers)
        look()
        logits = out.logits[: len(seqs)]
        if head is not None:
            assert out.hidden is not None, "a graph without adapters was replayed for one on the head"
            logits = self._model.amended(logits, out.hidden[: len(seqs)], head)
        return self._choose(logits, seqs, previous, rows)

    def _logits(self, hidden: Tensor, batch: Batch, routes: Routes | None, first: int) -> Tensor:
        """Logits of some rows that `batch` wants, adapters on the head included; `first`: which is their first."""
        head = self._packer.head(batch, routes, slice(first, first + len(hidden)))
        return self._model.amended(self._model.logits(hidden), hidden, head)

    def _choose(self, logits: Tensor, seqs: list[Sequence], previous: Tensor, rows: list[int]) -> Chosen:
        """Sample, and leave the tokens where the next step looks for them."""
        chosen = self._sampler.choose(logits, seqs, previous, rows)
        self._in_flight.tokens[: len(seqs)].copy_(chosen.tokens)
        return chosen

    def _prompt(
        self, batch: Batch, hidden: Tensor, routes: Routes | None, first: int
    ) -> list[tuple[Chosen, list[int | None]]]:
        """Log-probabilities of prompt tokens, some rows of logits at a time to bound the memory.

        `first`: where the rows of prompts begin among those of `hidden`.
        """
        following: list[int] = []
        tops: list[int | None] = []
        for run in batch.runs:
            if count := num_prompt_logits(run):
                following += run.seq.tokens[run.start + 1 : run.start + 1 + count]
                tops += [run.seq.params.prompt_logprobs] * count
        if not following:
            return []
        tokens = torch.tensor(following, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        tokens = tokens.to(self._device, non_blocking=True)
        reported = []
        for low in range(0, len(following), _ROWS_OF_LOGITS):
            part = slice(low, low + _ROWS_OF_LOGITS)
            rows = hidden[first + low : first + min(low + _ROWS_OF_LOGITS, len(following))]
            logits = self._logits(rows, batch, routes, first + low)
            reported.append((self._sampler.report(logits, tokens[part], tops[part]), tops[part]))
        return reported

    def _flight(
        self, batch: Batch, chosen: Chosen | None, prompt: list[tuple[Chosen, list[int | None]]]
    ) -> ModelFlight:
        """Send the results to the host."""
        if self._device.type == "cpu":
            return ModelFlight(batch, chosen, prompt, None)
        chosen = None if chosen is None else _to_host(chosen)
        prompt = [(_to_host(part), tops) for part, tops in prompt]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return ModelFlight(batch, chosen, prompt, event)


def _to_host(chosen: Chosen) -> Chosen:
    """Copies in pinned memory, complete once the current stream has come so far."""

    def sent(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    return Chosen(
        sent(chosen.tokens),
        sent(chosen.logprobs),
        None if chosen.ranks is None else sent(chosen.ranks),
        None if chosen.top is None else (sent(chosen.top[0]), sent(chosen.top[1])),
    )


def _leave_sizes_open(inputs: StepInputs) -> None:
    """Let the compiler assume nothing of any size in `inputs`: one graph with adapters and one without serve all steps.

    Else every size that is 1 for the first time compiles again, and the ninth time ends in an error.
    """
    from torch._dynamo.decorators import mark_unbacked  # 1 s to import

    step = (inputs.tokens, inputs.positions, inputs.slots, inputs.block_tables, inputs.kv_lengths, inputs.query_starts)
    own = (*(inputs.own_embeddings or (None,))[1:], *(inputs.own_norms or (None,))[1:])  # without the pool's rows
    media = (*(inputs.media or ()), inputs.axes)
    for tensor in (*step, inputs.logits_at, *(inputs.routing or ()), *own, *media):
        if isinstance(tensor, Tensor):
            mark_unbacked(tensor, list(range(tensor.dim())))
