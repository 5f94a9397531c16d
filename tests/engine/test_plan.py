"""What a GPU's memory is shared out to. No GPU is asked: its figures are given."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from aiolora.config import EngineArgs
from aiolora.engine import build
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


def plan(model_of: ModelOf, *, family: str = "llama", activations: int = 100 * MIB, **args: Any) -> Plan:
    given = EngineArgs(model=str(model_of(family)), max_num_seqs=40, enable_lora=True, max_loras=4, **args)
    model = load_decoder(given, model_of(family), device="cpu")
    config = replace(model.config, max_positions=1 << 20)  # so long that memory is the bound
    layout = layout_of(model, torch.float32, only=given.lora_target_modules)
    return make_plan(given, config, layout, torch.float32, "cuda", activations=activations)


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
    one = plan(model_of, max_lora_rank=20, max_cpu_loras=9, lora_ends_memory=0)
    layout = layout_of(
        load_decoder(EngineArgs(model=str(model_of("llama"))), model_of("llama"), device="cpu"), torch.float32
    )
    inside = layout.kinds[:4]
    pages = 9 * 3 * sum(kind.page_nbytes(torch.float32) for kind in inside)
    outputs = sum(kind.bounds[-1] for kind in inside)
    assert one.adapter_room[:2] == (9 * 3, 4)
    assert one.adapter_nbytes == pages + 4 * 2 * 2 * outputs * 4, "of 4 adapters, 2 layers, gain and shift"


# bytes of a rank page of the experts of qwen3-moe (2 layers, 8 experts), and of one of its other linears
EXPERTS = 8 * 2 * 8 * ((2 * 48 + 48) + (24 + 48)) * 4
OTHERS = 8 * 2 * ((3 * 48 + 128) + (64 + 48) + (48 + 8)) * 4


def test_experts_have_rank_pages_for_all_of_a_step_within_a_third_of_what_is_free(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ample = plan(model_of, family="qwen3-moe", max_lora_rank=20, lora_ends_memory=0).adapter_room
    assert ample.experts == 4 * 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 7 * EXPERTS + EXPERTS, TOTAL))
    scarce = plan(model_of, family="qwen3-moe", max_lora_rank=20, lora_ends_memory=0, kv_cache_memory=1 << 30)
    assert scarce.adapter_room.experts == 7


def test_memory_for_adapters_is_shared_by_experts_and_other_linears_alike(model_of: ModelOf) -> None:
    memory = 5 * (EXPERTS + OTHERS)
    room = plan(model_of, family="qwen3-moe", max_lora_rank=20, lora_memory=memory).adapter_room
    assert (room.layers, room.experts) == (5, 5)
    with pytest.raises(ConfigError, match=f"one such adapter needs {3 * (EXPERTS + OTHERS)} bytes"):
        plan(model_of, family="qwen3-moe", max_lora_rank=20, lora_memory=2 * (EXPERTS + OTHERS))


def test_what_takes_no_adapters_has_no_share_of_the_room(model_of: ModelOf) -> None:
    own = {"family": "qwen3-moe", "max_lora_rank": 20}
    experts, ends = ("experts",), ("embed_tokens", "lm_head")
    assert plan(model_of, lora_target_modules=experts, **own).adapter_room.experts == 4 * 3
    assert plan(model_of, lora_target_modules=experts, lora_memory=5 * EXPERTS, **own).adapter_room.experts == 5
    for memory in (None, 1):
        room = plan(model_of, lora_target_modules=ends, lora_memory=memory, **own).adapter_room
        assert (room.experts, room.ends) == (0, 4 * 3)
    given = EngineArgs(model=str(model_of("qwen3-moe")), enable_lora=True)
    model = load_decoder(given, model_of("qwen3-moe"), device="cpu")
    pinned = [build._pinned_pages(given, layout_of(model, torch.float32, only=only)) for only in (("mlp",), ends)]
    assert [len(pages) for pages in pinned] == [1, 0], "of the gate, not of the experts"


def test_graphs_are_captured_up_to_the_most_sequences_unless_eager(model_of: ModelOf) -> None:
    buckets = plan(model_of, max_lora_rank=20).graph_buckets
    assert {bucket.tokens for bucket in buckets if bucket.decodes} == {1, 2, 4, 8, 12, 16, 24, 32, 40}
    assert {(bucket.mixes, bucket.pages) for bucket in buckets if bucket.tokens >= 4} == {(0, 0), (4, 4)}
    assert plan(model_of, enforce_eager=True).graph_buckets == ()


def test_too_little_memory_is_said(model_of: ModelOf) -> None:
    with pytest.raises(ConfigError, match=r"KV cache of 0\.0 MiB holds 0 tokens"):
        plan(model_of, activations=8192 * MIB)


# ---- embeddings, heads and norms of adapters ----

RANKS, BLOCK = 8 * (64 + 96) * 4, 128 * 64 * 4  # bytes of a rank page of embedding or head, and of a page of a block
VECTORS = 2 * (64 + 96) * 4  # of a vector page of each


def test_the_ends_of_the_network_have_room_of_their_own(model_of: ModelOf) -> None:
    with_ends, without = plan(model_of, max_lora_rank=20), plan(model_of, max_lora_rank=20, lora_ends_memory=0)
    assert with_ends.adapter_room.layers == without.adapter_room.layers
    assert with_ends.adapter_room[2:4] == (4 * 3, 4 * 3), "of four adapters: three pages of ranks, three blocks"
    assert without.adapter_room[2:] == (0, 0, 0)
    assert with_ends.adapter_nbytes - without.adapter_nbytes == 12 * 2 * RANKS + 4 * VECTORS + 12 * BLOCK
    assert without.kv_nbytes - with_ends.kv_nbytes == pytest.approx(12 * 2 * RANKS + 12 * BLOCK, abs=MIB)


@pytest.mark.parametrize("memory", [1, BLOCK, 3 * BLOCK, 40 * RANKS, 100 * RANKS, 1 << 30])
def test_the_memory_for_the_ends_is_never_exceeded_and_half_of_it_is_for_blocks(memory: int, model_of: ModelOf) -> None:
    room = plan(model_of, max_lora_rank=20, lora_ends_memory=memory).adapter_room
    assert room.ends * 2 * RANKS + room.blocks * BLOCK <= memory
    assert room.ends <= 12
    assert room.ends * 2 * RANKS <= memory // 2
    assert room.blocks == 12 or memory - room.ends * 2 * RANKS - room.blocks * BLOCK < BLOCK


def test_by_default_the_ends_take_a_small_share_of_what_is_free(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (64 * 10 * BLOCK, TOTAL))
    room = plan(model_of, max_lora_rank=20, lora_memory=1 << 20, kv_cache_memory=1 << 30).adapter_room
    assert room.ends * 2 * RANKS + room.blocks * BLOCK <= 10 * BLOCK
    assert room.blocks >= 4


def test_what_was_asked_for_by_bytes_and_does_not_fit_is_told_with_what_to_lower(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **sizes: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(build, "KVCache", full)
    args = EngineArgs(model=str(model_of("llama")), max_model_len=64, kv_cache_memory=1 << 20)
    with pytest.raises(ConfigError, match=r"KV cache of 0.0 GiB .* lower --kv-cache-memory"):
        build.build(args, lambda version: None)
