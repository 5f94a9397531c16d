"""Spans of what was generated, to an OpenTelemetry collector. Needs the extra `aiolora[otel]`.

They are made when a generation has ended, from times that were taken anyway: nothing is done a token.
"""

import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import aiolora
from aiolora.api.visits import Visit
from aiolora.engine.output import Assembler


class Tracing:
    """One span a request (a prompt), with its queue, prefill and decode below; in the client's trace if it sent one."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: of the collector, such as http://localhost:4318; spans are sent by a thread of the exporter's."""
        url = endpoint if endpoint.endswith("/v1/traces") else endpoint.rstrip("/") + "/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "aiolora"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("aiolora", aiolora.__version__)

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.shutdown()

    def record(self, visit: Visit, model: str, assemblers: Sequence[Assembler], *, failed: bool) -> None:
        """What `assemblers` were asked and when; nothing of what was said. `failed`: an error ended them."""
        carrier = {} if visit.traceparent is None else {"traceparent": visit.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        offset_s, now_s = time.time() - time.monotonic(), time.monotonic()  # spans are on the wall clock

        def ns(seconds: float) -> int:
            return int((seconds + offset_s) * 1e9)

        for assembler in assemblers:
            request, times, output = assembler.request, assembler.metrics, assembler.output()
            end_s = times.finished_time or now_s
            attributes: dict[str, str | int | float | Sequence[str]] = {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.system": "aiolora",
                "gen_ai.request.model": model,
                "gen_ai.request.temperature": request.params.temperature,
                "gen_ai.request.top_p": request.params.top_p,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "gen_ai.usage.output_tokens": sum(len(answer.token_ids) for answer in output.outputs),
                "gen_ai.response.finish_reasons": [answer.finish_reason or "abort" for answer in output.outputs],
                "http.request_id": visit.id,
            }
            if request.params.max_tokens is not None:
                attributes["gen_ai.request.max_tokens"] = request.params.max_tokens
            if output.adapter is not None:
                attributes["aiolora.adapter"] = output.adapter
            span = self._tracer.start_span(
                f"generate {model}", parent, SpanKind.SERVER, attributes, start_time=ns(times.arrival_time)
            )
            if failed:
                span.set_status(StatusCode.ERROR)
            inside = set_span_in_context(span)
            marks = times.arrival_time, times.scheduled_time, times.first_token_time, times.finished_time
            for name, begin_s, until_s in zip(("queue", "prefill", "decode"), marks, marks[1:]):
                if begin_s is not None and until_s is not None:
                    self._tracer.start_span(name, inside, start_time=ns(begin_s)).end(ns(until_s))
            span.end(ns(end_s))
