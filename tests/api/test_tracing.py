"""Traces: a span a prompt with its phases, in the client's trace, without what was said. A real exporter sends them."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from aiolora.api import create_app
from aiolora.config import ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest
from tests.api.conftest import GENERATING, inside

service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Its endpoint, and the bodies it got."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("path", GENERATING)
async def test_a_generation_is_a_span_with_its_phases_in_the_clients_trace(
    byte_engine: AsyncLLMEngine, three_adapters: list[LoRARequest], collector: tuple[str, list[bytes]], path: str
) -> None:
    endpoint, bodies = collector
    app = create_app(
        byte_engine, lora_modules=three_adapters, served_model_name="base", args=ServerArgs(otlp_endpoint=endpoint)
    )
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    async with inside(app) as client:
        body = json.dumps({"model": "alpha"} | GENERATING[path]).replace("hello", "a secret")
        headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "id-9"}
        assert (await client.post(path, content=body, headers=headers)).status_code == 200
    received = [service.ExportTraceServiceRequest.FromString(body) for body in bodies]  # all sent when the app stopped
    spans = {
        span.name: span for one in received for of in one.resource_spans for in_ in of.scope_spans for span in in_.spans
    }
    assert set(spans) == {"generate alpha", "queue", "prefill", "decode"}
    whole = spans["generate alpha"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (trace, parent)
    said = {item.key: item.value for item in whole.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == 3
    assert said["http.request_id"].string_value == "id-9"
    assert said["aiolora.adapter"].string_value.startswith("alpha@")
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent_span_id == whole.span_id for phase in phases)
    times = [whole.start_time_unix_nano, *(phase.end_time_unix_nano for phase in phases)]
    assert times == sorted(times)
    assert times[-1] == whole.end_time_unix_nano
    assert not any(b"secret" in body for body in bodies)
