"""DoRA, lora_bias and bias: gains and shifts of what they are served as, their adapters among others, and refusals."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.config import EngineArgs
from aiolora.errors import AdapterError, AdapterFormatError, AdapterMemoryError, AdapterMismatchError, RequestError
from aiolora.lora.kinds import Room
from aiolora.lora.layout import Layout, layout_of
from aiolora.lora.loader import AdapterWeights, load_adapter
from aiolora.lora.memory import InMemory
from aiolora.lora.outline import Limits
from aiolora.lora.outlines import Outlines
from aiolora.models.decoder import Decoder
from aiolora.models.loading import load_decoder, outline
from aiolora.types import RequestOutput
from tests.conftest import ModelOf
from tests.tiny import everything, hf_logits, kernels, load_hf, load_peft, make_adapter, prompt_ids, reported, rewrite

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "dora": {"use_dora": True, "r": 5, "target_modules": TARGETS},
    "dora of some": {
        "use_dora": True,
        "r": 20,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["k_proj", "gate_proj"],
        "rank_pattern": {"layers.0.self_attn.k_proj": 3},
        "alpha_pattern": {"gate_proj": 50},
    },
    "dora and biases": {"use_dora": True, "bias": "lora_only", "target_modules": TARGETS},
    "biases of lora_B": {"lora_bias": True, "target_modules": TARGETS, "alpha_pattern": {"up_proj": 5}},
    "biases of others": {"bias": "all", "target_modules": ["o_proj"]},
    "all biases": {"bias": "all", "lora_bias": True},
}
LIMITS = Limits(64, Room(99, 99), "base")


@pytest.fixture(scope="module")
def base(model_of: ModelOf) -> Path:
    """Of a family whose q, k and v have biases."""
    return model_of("qwen2")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(base, folder / name, **config) for name, config in CONFIGS.items()}


def trained(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter whose vectors are random, too."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return {
            name: tensor * (1 + 0.3 * torch.randn(tensor.shape)) + 0.1 * torch.randn(tensor.shape)
            if tensor.dim() == 1
            else tensor
            for name, tensor in tensors.items()
        }

    make_adapter(base, folder, **config)
    rewrite(folder, change)
    return folder


def decoder(base: Path, dtype: str = "float32") -> tuple[Decoder, Layout]:
    model = load_decoder(EngineArgs(model=str(base), dtype=dtype), base, device="cpu")
    assert isinstance(model, Decoder)
    return model, layout_of(model, model.embed.weight.dtype)


def loaded(folder: Path, layout: Layout) -> AdapterWeights:
    return load_adapter(LoRARequest("a", 1, str(folder)), Outlines(layout, LIMITS))


@pytest.mark.parametrize("compiled", [False, True], ids=["reference", "compiled"])
def test_all_in_one_batch_have_pefts_numbers(base: Path, adapters: dict[str, Path], compiled: bool) -> None:
    names = [None, *adapters, None]
    prompts = [prompt_ids(number, 9 + 3 * number) for number in range(len(names))]
    with kernels(compiled=compiled):
        llm = LLM(str(base), dtype="float32", enable_lora=True, max_loras=len(adapters), max_lora_rank=32)
        for number, (name, folder) in enumerate(adapters.items()):
            llm.engine.add_lora(LoRARequest(name, number + 1, str(folder)))
        outputs = llm.generate(prompts, everything(3), lora_request=names, use_tqdm=False)
    plain = load_hf(base)
    for name, output in zip(names, outputs):
        tokens, ours = reported(output)
        theirs = hf_logits(load_peft(base, {"a": adapters[name]}) if name else plain, tokens)
        difference = (ours - theirs.log_softmax(-1)[: len(ours)]).abs().max()
        assert difference < 1e-5 * theirs.abs().max(), name
        if name:
            assert (theirs - hf_logits(plain, tokens)).abs().max() > 0.1, f"{name} changes nothing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gain_is_the_magnitude_over_the_norm_of_the_row_that_is_served(
    base: Path, adapters: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiolora.lora.vectors._BLOCK", 300)  # some rows at a time, the last fewer
    model, layout = decoder(base, dtype)
    tensors = load_file(adapters["dora of some"] / "adapter_model.safetensors")
    weights = loaded(adapters["dora of some"], layout)
    parameters = dict(model.checkpoint())
    for name, target in layout.targets.items():
        prefix = f"base_model.model.{name}"
        if target.kind not in weights.vectors:
            assert "k_proj" not in name
            assert "gate_proj" not in name
            continue
        low, high = layout.kinds[target.kind].bounds[target.slice : target.slice + 2]
        gain, shift = weights.vectors[target.kind][target.layer, :, low:high]
        assert shift.eq(0).all()
        if "k_proj" not in name and "gate_proj" not in name:
            assert gain.eq(1).all()
            continue
        a, b = (tensors[f"{prefix}.lora_{factor}.weight"].double() for factor in "AB")
        scale = (50 if "gate" in name else 3) / a.shape[0] ** 0.5
        served = parameters[f"{name}.weight"].double() + scale * b @ a
        wanted = tensors[f"{prefix}.lora_magnitude_vector"].double() / served.norm(dim=1)
        share = 1e-6 if dtype == "float32" else 1e-2
        torch.testing.assert_close(gain.double(), wanted, rtol=share, atol=share)


def test_a_shift_is_what_the_bias_has_more_than_the_bases(base: Path, adapters: dict[str, Path]) -> None:
    _, layout = decoder(base)
    tensors = load_file(adapters["all biases"] / "adapter_model.safetensors")
    weights = loaded(adapters["all biases"], layout)
    assert len(weights.vectors) == 1, "of q, k and v, for the others have none"
    for name in ("q_proj", "k_proj"):
        target = layout.targets[f"model.layers.1.self_attn.{name}"]
        low, high = layout.kinds[target.kind].bounds[target.slice : target.slice + 2]
        gain, shift = weights.vectors[target.kind][1, :, low:high]
        prefix = f"base_model.model.model.layers.1.self_attn.{name}"
        adapted = f"{prefix}.lora_B.bias" in tensors
        trained = tensors[f"{prefix}.base_layer.bias" if adapted else f"{prefix}.bias"]
        assert target.bias is not None
        more = 2.0 * tensors[f"{prefix}.lora_B.bias"] if adapted else 0.0
        torch.testing.assert_close(shift, trained - target.bias + more)
        assert gain.eq(1).all()


def test_without_the_bases_weights_the_verdict_and_the_digest_are_the_same(
    base: Path, adapters: dict[str, Path]
) -> None:
    drawn = outline(base).decoder
    for folder in adapters.values():
        version = loaded(folder, layout_of(drawn, torch.float32)).version
        served = loaded(folder, decoder(base)[1]).version
        assert (version.digest, version.pages, version.nbytes) == (served.digest, served.pages, served.nbytes)


def test_in_memory_it_is_the_adapter_of_the_folder(base: Path, adapters: dict[str, Path]) -> None:
    _, layout = decoder(base)
    for name in ("dora", "all biases"):
        folder = adapters[name]
        tensors = load_file(folder / "adapter_model.safetensors")
        config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | CONFIGS[name]
        held = load_adapter(InMemory("a", tensors, config), Outlines(layout, LIMITS))
        stored = loaded(folder, layout)
        assert held.version.digest == stored.version.digest
        for kind, vectors in stored.vectors.items():
            assert torch.equal(held.vectors[kind], vectors)


def test_the_digest_covers_vectors(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    _, layout = decoder(base)
    for number, (name, part) in enumerate(
        [("dora", "lora_magnitude_vector"), ("biases of lora_B", "lora_B.bias"), ("biases of others", "k_proj.bias")]
    ):
        folder = Path(shutil.copytree(adapters[name], tmp_path / str(number)))

        def change(tensors: dict[str, Tensor], part: str = part) -> dict[str, Tensor]:
            key = next(key for key in tensors if key.endswith(part))
            tensors[key][3] += 1e-3
            return tensors

        rewrite(folder, change)
        assert loaded(folder, layout).version.digest != loaded(adapters[name], layout).version.digest


def test_it_must_be_named_alone_and_without_a_weight(base: Path, adapters: dict[str, Path]) -> None:
    llm = LLM(str(base), dtype="float32", enable_lora=True, max_loras=2, max_lora_rank=32)
    for number, name in enumerate(("plain", "dora", "biases of lora_B")):
        llm.engine.add_lora(LoRARequest(name, number + 1, str(adapters[name])))
    params = SamplingParams(max_tokens=1)
    for name in ("dora", "biases of lora_B"):
        for mix in ({name: 0.5}, {name: 1.0, "plain": 1.0}):
            with pytest.raises(RequestError, match="more than a low-rank sum"):
                llm.generate([[5]], params, lora_request=mix, use_tqdm=False)
        assert llm.generate([[5]], params, lora_request={name: 1.0}, use_tqdm=False)[0].outputs[0].token_ids


def test_more_than_there_are_vector_pages_for_take_turns(base: Path, adapters: dict[str, Path]) -> None:
    names = ["dora", "dora of some", "dora and biases", "all biases", "plain"]
    options: dict[str, Any] = {"dtype": "float32", "enable_lora": True, "max_lora_rank": 32, "max_cpu_loras": 8}
    answers: list[list[RequestOutput]] = []
    for max_loras in (1, 5):
        llm = LLM(str(base), max_loras=max_loras, **options)
        loras = [LoRARequest(name, names.index(name) + 1, str(adapters[name])) for name in names * 2]
        answers.append(llm.generate([prompt_ids(1, 9)] * 10, everything(2), lora_request=loras, use_tqdm=False))
        if max_loras == 1:
            with pytest.raises(AdapterMemoryError, match=r"no vector page of a kind .*raise --max-loras"):
                llm.engine.pin_lora("dora")
    for one, other in zip(*answers):
        (tokens, alone), (same, together) = reported(one), reported(other)
        assert tokens == same
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


Break = Callable[[dict[str, Tensor]], object]


def put(part: str, value: Tensor | float, at: int | None = None) -> Break:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.endswith(part))
        if at is None:
            assert isinstance(value, Tensor)
            tensors[key] = value
        else:
            tensors[key][at] = value

    return change


BROKEN: dict[str, tuple[str, Break, type[AdapterError], str]] = {
    "NaN": ("dora", put("magnitude_vector", torch.nan, 3), AdapterFormatError, "lora_magnitude_vector .*not finite"),
    "infinity": ("biases of lora_B", put("B.bias", -torch.inf, 0), AdapterFormatError, "lora_B.bias .*not finite"),
    "an infinite bias": ("all biases", put("base_layer.bias", torch.inf, 0), AdapterFormatError, "bias .*not finite"),
    "integers": ("dora", put("vector", torch.ones(64, dtype=torch.int32)), AdapterFormatError, "holds torch.int32"),
    "another length": (
        "dora",
        put("0.self_attn.q_proj.lora_magnitude_vector", torch.ones(63)),
        AdapterMismatchError,
        r"q_proj has lora_magnitude_vector \[63\], the base model needs \[48\]",
    ),
    "a matrix": ("dora", put("vector", torch.ones(1, 64)), AdapterMismatchError, r"lora_magnitude_vector \[1, 64\]"),
    "another length of lora_B.bias": (
        "biases of lora_B",
        put("0.self_attn.q_proj.lora_B.bias", torch.ones(1)),
        AdapterMismatchError,
        r"lora_B.bias \[1\], the base model needs \[48\]",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_vectors_are_refused(broken: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    name, damage, kind, said = BROKEN[broken]
    folder = Path(shutil.copytree(adapters[name], tmp_path / "adapter"))

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        damage(tensors)
        return tensors

    rewrite(folder, change)
    with pytest.raises(kind, match=said) as refused:
        loaded(folder, decoder(base)[1])
    assert refused.value.adapter == "a"


def test_a_row_of_zeros_has_no_gain(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapters["dora"], tmp_path / "adapter"))

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0] = 0
        return tensors

    rewrite(folder, change)
    _, layout = decoder(base)
    loaded(folder, layout)
    layout.targets["model.layers.0.self_attn.q_proj"].weight[0] = 0
    with pytest.raises(AdapterFormatError, match=r"layers.0.self_attn.q_proj would be multiplied by.* not finite"):
        loaded(folder, layout)
