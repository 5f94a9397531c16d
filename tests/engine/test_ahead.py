"""What is compiled ahead is what serving launches. No GPU is asked: its figures are given, its launches are kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from aiolora.config import EngineArgs
from aiolora.engine import ahead
from aiolora.lora.kinds import Room
from aiolora.lora.layout import layout_of
from aiolora.models.decoder import Decoder, DecoderConfig
from aiolora.models.families import decoder_config
from aiolora.ops.kernels import activation, attention, blocks, embedding, experts, linear, norm, rope, routes, sampling
from aiolora.ops.kernels import launch as launching
from aiolora.ops.norm import rms_norm_op
from tests.tiny import FAMILIES, SIZES

KERNELS = (activation, attention, blocks, embedding, experts, linear, norm, rope, routes, sampling)
Asked = set[tuple[object, ...]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What was launched on a card that is none, by what Triton compiles it for."""
    found: Asked = set()

    def launch(function: Any, grid: tuple[int, ...], args: tuple[Any, ...], **named: Any) -> None:
        traits = [
            value.dtype if isinstance(value, Tensor)
            else value if not isinstance(value, int)
            else type(value) if param.do_not_specialize
            else (value == 1, value % 16 == 0)
            for value, param in zip(args, function.params)
        ]  # fmt: skip
        found.add((function.__name__, *traits, *sorted(named.items())))

    for module in KERNELS:
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    launching.processors.cache_clear()
    return found


def config_of(family: str, **changes: object) -> DecoderConfig:
    kind, own = FAMILIES[family]
    return decoder_config(kind(**(SIZES | own | changes)))


def rehearsed(asked: Asked, config: DecoderConfig) -> Asked:
    asked.clear()
    ahead.rehearse_outline(config, torch.bfloat16, EngineArgs(model="m", enable_lora=True, max_lora_rank=16))
    return set(asked)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe"])
def test_a_few_layers_and_pages_launch_what_all_do(asked: Asked, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    config = config_of(family, num_hidden_layers=8, layer_types=None)
    assert ahead.few_layers(config).num_layers < 8
    few = rehearsed(asked, config)
    monkeypatch.setattr(ahead, "few_layers", lambda config: config)
    monkeypatch.setattr(ahead, "_ROOM", Room(40, 20, 40, 7, 30))
    assert rehearsed(asked, config) == few
    names = {name for name, *_ in few}
    assert names >= {"decode_kernel", "prefill_kernel", "_rope_store_kernel", "_shrink_kernel", "_draw", "_embed"}
    assert any("expert" in str(name) or name == "_count_kernel" for name in names) == (family == "qwen3-moe")


def test_two_layers_of_each_sort_are_kept() -> None:
    config = config_of("qwen3-moe", num_hidden_layers=8)
    assert config.moe is not None
    one, other = config.ropes[0], config.ropes[0]._replace(scale=2.0)
    mixed = replace(
        config,
        ropes=(one, other, other, other, one, one, one, one),
        windows=(0, 0, 0, 0, 0, 0, 9, 9),
        moe=replace(config.moe, layers=frozenset({3, 5, 6, 7})),
    )
    few = ahead.few_layers(mixed)
    assert few.ropes == (one, other, other, other, one, one, one, one)[: few.num_layers]
    assert (few.num_layers, few.windows, few.moe and few.moe.layers) == (
        8,
        mixed.windows,
        mixed.moe and mixed.moe.layers,
    )
    plain = ahead.few_layers(replace(mixed, ropes=(one,) * 8, windows=(0,) * 8))
    assert (plain.num_layers, plain.windows) == (4, (0,) * 4)
    assert plain.moe is not None
    assert plain.moe.layers == {2, 3}, "layers 0 and 1 have a plain MLP, 3 and 5 experts"


@pytest.mark.parametrize(
    ("only", "all_compiled"),
    [
        (("q_proj", "mlp"), True),
        (("layers.0",), True),
        (("layers.0.self_attn", "layers.5.mlp"), False),
        (("layers.7",), False),
        (("layers.7", "lm_head"), False),
    ],
)
def test_kinds_of_layers_that_are_left_out_are_not_taken_for_compiled(
    asked: Asked, caplog: pytest.LogCaptureFixture, only: tuple[str, ...], all_compiled: bool
) -> None:
    model = Decoder(config_of("llama", num_hidden_layers=8), dtype=torch.bfloat16, device="meta")
    args = EngineArgs(model="m", enable_lora=True, lora_target_modules=only)
    layout = layout_of(model, torch.bfloat16, only=only)
    assert ahead.compile_ahead(model, args, layout).result() == all_compiled
    assert not caplog.records


def test_an_op_is_its_shape_alone_on_meta_outside_a_rehearsal(asked: Asked) -> None:
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    assert rms_norm_op(x, x[0], 1e-5).shape == x.shape
    assert not asked
    with launching.rehearsal():
        assert rms_norm_op(x, x[0], 1e-5).shape == x.shape
    assert [name for name, *_ in asked] == ["_add_norm_kernel"]


def test_what_cannot_be_compiled_ahead_does_not_end_a_start(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Decoder(config_of("llama"), dtype=torch.bfloat16, device="meta")
    args = EngineArgs(model="m", enable_lora=True)
    layout = layout_of(model, torch.bfloat16)
    assert ahead.compile_ahead(model, args, layout).result()
    assert ahead.compile_ahead(model, EngineArgs(model="m"), None).result()
    tight = EngineArgs(model="m", enable_lora=True, kv_cache_memory=1)
    assert not ahead.compile_ahead(model, tight, layout).result()
    assert not caplog.records, "the plan itself will say what is wrong"

    def fails(*args: object) -> None:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(ahead, "rehearse_outline", fails)
    assert not ahead.compile_ahead(model, args, layout).result()
    assert "no ptxas" in caplog.text
