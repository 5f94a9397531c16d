"""GET /metrics: what Prometheus asks. Named as dashboards of other engines know it, under `aiolora:`."""

import itertools
import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from litestar import HttpMethod, Response, route
from litestar.di import NamedDependency
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from aiolora.api.access import WHOLE
from aiolora.api.tally import OTHER, Tallies
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.engine.output import Assembler
from aiolora.types import TokenOutput

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_WHOLE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_PHASE = (0.001, 0.01, 0.05, *_WHOLE[1:])
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Distribution:
    """How many values were at most each of some bounds."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def metric(self, name: str, says: str, labels: dict[str, str]) -> Metric:
        """As a histogram of Prometheus."""
        family = HistogramMetricFamily(name, says, labels=list(labels))
        bounds = [*map(float, self._bounds), math.inf]
        sums = list(zip(map(floatToGoString, bounds), itertools.accumulate(self._counts)))
        family.add_metric(list(labels.values()), sums, self._total)
        return family


class Meter:
    """Everything that is counted while the server runs. Owned by the loop.

    What is counted once a request is prometheus_client's; what is counted once a token is plain numbers, which
    cost less. Gauges are read off the engine's last snapshot when somebody asks. The engine's thread counts nothing.
    """

    def __init__(self, engine: AsyncLLMEngine, base: str, *, adapter_labels: int) -> None:
        self.registry = CollectorRegistry()
        self.tallies = Tallies(
            adapter_labels + 1, lambda name: name == base or engine.intake.registry.named(name) is not None
        )
        self.tallies.of(base)
        self._base = base

        def histogram(name: str, says: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"aiolora:{name}", says, ["model_name"], buckets=buckets, registry=self.registry).labels(
                base
            )

        def counter(name: str, says: str) -> Counter:
            return Counter(f"aiolora:{name}", says, ["model_name"], registry=self.registry).labels(base)

        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST)
        self.between = Distribution(_BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _PHASE)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _PHASE)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", _PHASE)
        self.asked = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answered = histogram("request_generation_tokens", "Tokens of all answers to a prompt.", _TOKENS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts whose first token has come.")
        self._ended = Counter(
            "aiolora:request_success",
            "Answers that have ended, by why: stop, length, abort (left or removed), error.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._end_of = {reason: self._ended.labels(base, reason) for reason in ("stop", "length", "abort", "error")}
        ProcessCollector(registry=self.registry)
        self.registry.register(_Read(engine, base, self))

    def begin(self, model: str, assemblers: Sequence[Assembler]) -> "Count":
        """Count what `assemblers` bring, in the name of `model`."""
        return Count(self, model, assemblers)

    def ended(self, reason: str) -> None:
        """One answer more."""
        self._end_of[reason].inc()


class Count:
    """The requests of one HTTP request."""

    def __init__(self, meter: Meter, model: str, assemblers: Sequence[Assembler]) -> None:
        self._meter = meter
        self._between = meter.between
        self._assemblers = assemblers
        self._tally = meter.tallies.of(model)
        self._tally.requests += len(assemblers)
        self._tally.waiting += len(assemblers)
        self._n = assemblers[0].request.params.n  # the same for all
        self._newest = [0.0] * (len(assemblers) * self._n)  # when the last token of each answer came; 0: none has
        self._running: set[int] = set()  # positions with a token
        self._lengths = [0] * len(assemblers)
        self._unfinished = sum(assembler.request.params.n for assembler in assemblers)
        self.prompt_tokens = 0

    @property
    def generated_tokens(self) -> int:
        """Of all requests so far."""
        return sum(self._lengths)

    def take(self, burst: list[tuple[int, TokenOutput]]) -> None:
        """Tokens that have just come, with the positions of their requests."""
        now, newest = time.monotonic(), self._newest
        for position, output in burst:
            answer = position * self._n + output.index
            before, newest[answer] = newest[answer], now
            if before:
                self._between.add(now - before)
            elif position not in self._running:
                self._start(position)
            self._lengths[position] += 1
            if output.finish_reason is not None:
                self._meter.ended(output.finish_reason)
                self._unfinished -= 1
        self._tally.generated_tokens += len(burst)

    def end(self, *, failed: bool = False) -> None:
        """Nothing more will come; what has not ended was left, or failed."""
        for _ in range(self._unfinished):
            self._meter.ended("error" if failed else "abort")
        self._tally.running -= len(self._running)
        self._tally.waiting -= len(self._assemblers) - len(self._running)
        meter = self._meter
        for assembler, length in zip(self._assemblers, self._lengths):
            times = assembler.metrics
            if times.finished_time is None or times.first_token_time is None:
                continue
            meter.whole.observe(times.finished_time - times.arrival_time)
            meter.decode.observe(times.finished_time - times.first_token_time)
            meter.answered.observe(length)

    def _start(self, position: int) -> None:
        """The first token of a request."""
        self._running.add(position)
        self._tally.waiting -= 1
        self._tally.running += 1
        meter, request = self._meter, self._assemblers[position].request
        times, length = self._assemblers[position].metrics, len(request.prompt_token_ids)
        self.prompt_tokens += length
        self._tally.prompt_tokens += length
        meter.prompt_tokens.inc(length)
        meter.asked.observe(length)
        if times.first_token_time is not None:
            meter.first.observe(times.first_token_time - times.arrival_time)
            if times.scheduled_time is not None:
                meter.queue.observe(times.scheduled_time - times.arrival_time)
                meter.prefill.observe(times.first_token_time - times.scheduled_time)


class _Read(Collector):
    """What is read when somebody asks: the engine's last snapshot, and plain numbers."""

    def __init__(self, engine: AsyncLLMEngine, base: str, meter: Meter) -> None:
        self._engine = engine
        self._base = base
        self._meter = meter
        self._tallies = meter.tallies

    def describe(self) -> Iterator[Metric]:
        yield from ()  # nothing to clash with, and the engine need not run yet

    def collect(self) -> Iterator[Metric]:
        base, says = {"model_name": self._base}, "Between two tokens of one answer."
        yield self._meter.between.metric("aiolora:inter_token_latency_seconds", says, base)
        tokens = [([self._base], sum(tally.generated_tokens for _, tally in self._tallies))]
        yield _counter("generation_tokens", "Tokens generated.", tokens, ["model_name"])
        if self._engine.started:
            yield from self._of_engine()
        yield from self._of_adapters()

    def _of_engine(self) -> Iterator[Metric]:
        now, base = self._engine.snapshot(), [self._base]
        used = 1 - now.free_pages / now.num_pages
        for name, says, value in (
            ("num_requests_running", "Answers that the engine is computing.", now.running),
            ("num_requests_waiting", "Answers that wait for their first or next step.", now.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", used),
        ):
            yield _gauge(name, says, [(base, value)], ["model_name"])
        for name, says, value in (
            ("num_preemptions", "Answers that gave way under memory pressure.", now.preemptions),
            ("prefix_cache_hits", "Prompt tokens that the prefix cache had.", now.cached_tokens),
            ("engine_steps", "Steps of the engine.", now.steps),
        ):
            yield _counter(name, says, [(base, value)], ["model_name"])
        resident = {label.rpartition("@")[0] for label in now.resident_adapters}
        loaded = [version.name for version in self._engine.intake.registry.versions()]
        known = len(self._engine.intake.registry.known())
        yield _gauge("adapters_known", "Adapters that have a name.", [([], known)], [])
        yield _gauge("adapters_loaded", "Those of them that were read.", [([], len(loaded))], [])
        yield _gauge("adapters_resident", "Adapter versions on the device.", [([], len(now.resident_adapters))], [])
        named = [name for name in loaded if self._tallies.named(name)]
        rows = [([name], float(name in resident)) for name in named]
        rest = sum(name in resident for name in loaded) - sum(name in resident for name in named)
        if len(named) < len(loaded):
            rows.append(([OTHER], rest))
        yield _gauge("adapter_resident", "1 while it is on the device; of `other`, how many are.", rows, ["adapter"])

    def _of_adapters(self) -> Iterator[Metric]:
        rows = list(self._tallies)
        requests = [([who], tally.requests) for who, tally in rows]
        read = [([who], tally.prompt_tokens) for who, tally in rows]
        generated = [([who], tally.generated_tokens) for who, tally in rows]
        yield _counter("adapter_requests", "Prompts for the adapter, or the base.", requests, ["adapter"])
        yield _counter("adapter_prompt_tokens", "Tokens of its prompts.", read, ["adapter"])
        yield _counter("adapter_generation_tokens", "Tokens it generated.", generated, ["adapter"])
        running = [who for who, tally in rows if tally.running and who != self._base]
        waiting = [who for who, tally in rows if tally.waiting and who != self._base]
        labels = [str(self._engine.args.max_loras), ",".join(running), ",".join(waiting)]
        yield _gauge(
            "lora_requests_info",
            "Adapters with requests under way; the value is the time.",
            [(labels, time.time())],
            ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )


def _gauge(name: str, says: str, rows: Sequence[tuple[list[str], float]], labels: list[str]) -> Metric:
    family = GaugeMetricFamily(f"aiolora:{name}", says, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _counter(name: str, says: str, rows: Sequence[tuple[list[str], float]], labels: list[str]) -> Metric:
    family = CounterMetricFamily(f"aiolora:{name}", says, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


Metered: TypeAlias = NamedDependency[Meter]


@route(
    "/metrics",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    tags=["system"],
    media_type=CONTENT_TYPE_LATEST,
    opt=WHOLE,
)
async def metrics(meter: Metered) -> Response[bytes]:
    """Prometheus' text format. It names adapters, so it takes a key that may use every one."""
    return Response(generate_latest(meter.registry), media_type=CONTENT_TYPE_LATEST)
