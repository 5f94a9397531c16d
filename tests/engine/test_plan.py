"""What a GPU's memory is shared out to. No GPU is asked: its figures are given."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from aiolora.config import EngineArgs
from aiolora.engine.plan import Plan, make_plan
from aiolora.errors import ConfigError
from aiolora.lora.layout import layout_of
from aiolora.models.loading import load_decoder
from tests.conftest import ModelOf

MIB = 1 << 20
TOTAL = 8192 * MIB
FREE = 6000 * MIB  # once the weights are there


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (FREE, TOTAL))


def plan(model_of: ModelOf, *, activations: int = 100 * MIB, **args: Any) -> Plan:
    given = EngineArgs(model=str(model_of("llama")), max_num_seqs=40, enable_lora=True, max_loras=4, **args)
    model = load_decoder(given, model_of("llama"), device="cpu")
    config = replace(model.config, max_positions=1 << 20)  # so long that memory is the bound
    return make_plan(given, config, layout_of(model, torch.float32), torch.float32, "cuda", activations=activations)


def test_the_kv_cache_gets_what_the_others_leave(model_of: ModelOf) -> None:
    one = plan(model_of, max_lora_rank=20, gpu_memory_utilization=0.75)
    beside = TOTAL - FREE + one.adapter_nbytes + 100 * MIB
    assert one.adapter_nbytes > 0
    left = TOTAL * 3 // 4 - beside - one.kv_nbytes
    assert 1024 * MIB < left < 1100 * MIB, "graphs and the sampler's logits take the rest"
    eager = plan(model_of, max_lora_rank=20, gpu_memory_utilization=0.75, enforce_eager=True)
    assert eager.kv_nbytes - one.kv_nbytes == pytest.approx(1024 * MIB, abs=MIB)
    more = plan(model_of, max_lora_rank=20, gpu_memory_utilization=0.75, activations=300 * MIB)
    assert one.kv_nbytes - more.kv_nbytes == pytest.approx(200 * MIB, abs=MIB)


def test_adapters_get_rank_pages_for_all_in_host_memory_and_vector_pages_for_those_of_a_step(model_of: ModelOf) -> None:
    one = plan(model_of, max_lora_rank=20, max_cpu_loras=9)
    layout = layout_of(
        load_decoder(EngineArgs(model=str(model_of("llama"))), model_of("llama"), device="cpu"), torch.float32
    )
    pages = one.adapter_pages * sum(kind.page_nbytes(torch.float32) for kind in layout.kinds)
    outputs = sum(kind.bounds[-1] for kind in layout.kinds)
    assert (one.adapter_pages, one.vector_pages) == (9 * 3, 4)
    assert one.adapter_nbytes == pages + 4 * 2 * 2 * outputs * 4, "of 4 adapters, 2 layers, gain and shift"


def test_graphs_are_captured_up_to_the_most_sequences_unless_eager(model_of: ModelOf) -> None:
    buckets = plan(model_of, max_lora_rank=20).graph_buckets
    assert {bucket.tokens for bucket in buckets if bucket.decodes} == {1, 2, 4, 8, 12, 16, 24, 32, 40}
    assert {(bucket.mixes, bucket.pages) for bucket in buckets if bucket.tokens >= 4} == {(0, 0), (4, 4)}
    assert plan(model_of, enforce_eager=True).graph_buckets == ()


def test_too_little_memory_is_said(model_of: ModelOf) -> None:
    with pytest.raises(ConfigError, match=r"KV cache of 0\.0 MiB holds 0 tokens"):
        plan(model_of, activations=8192 * MIB)
