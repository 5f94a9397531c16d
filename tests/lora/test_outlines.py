"""What names, shapes and configs say is worked out once for adapters that are alike, and never for one that differs."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aiolora import LLM, EngineArgs, LLMEngine, LoRARequest, SamplingParams
from aiolora.errors import AdapterFormatError, AdapterMismatchError
from aiolora.lora import outlines
from aiolora.lora.outline import outline
from aiolora.lora.tensorfile import TensorFile
from aiolora.types import AdapterVersion
from tests.conftest import ModelOf
from tests.tiny import ALL_LINEARS, make_adapter, prompt_ids, reconfigure, rewrite

Change = Callable[[Path], object]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(model_of: ModelOf) -> Path:
    return model_of("llama")


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("first"), r=8, target_modules=ALL_LINEARS)


def started(base: Path) -> LLMEngine:
    return LLMEngine.from_engine_args(EngineArgs(model=str(base), dtype="float32", enable_lora=True, max_lora_rank=16))


@pytest.fixture
def engine(base: Path) -> LLMEngine:
    return started(base)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters whose names and shapes were looked at."""
    seen: list[str] = []

    def watched(name: str, *args: object) -> object:
        seen.append(name)
        return outline(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(outlines, "outline", watched)
    return seen


def other(first: Path, folder: Path, change: Change) -> Path:
    """A copy of `first`, changed."""
    shutil.copytree(first, folder)
    change(folder)
    return folder


def tensors(change: Callable[[str, Tensor], dict[str, Tensor]]) -> Change:
    def all_of(content: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for name, tensor in content.items() for key, value in change(name, tensor).items()}

    return lambda folder: rewrite(folder, all_of)


def config(**fields: object) -> Change:
    return lambda folder: reconfigure(folder, **fields)


ALIKE = tensors(lambda name, tensor: {name: 1.25 * tensor})


def add(engine: LLMEngine, name: str, folder: Path) -> AdapterVersion:
    return engine.add_lora(LoRARequest(name, abs(hash(name)), str(folder)))


def test_adapters_that_are_alike_are_looked_at_once_and_each_serves_its_own_values(
    base: Path, first: Path, tmp_path: Path, made: list[str]
) -> None:
    second = other(first, tmp_path / "second", ALIKE)
    reconfigure(second, base_model_name_or_path="the/same", target_modules=[*reversed(ALL_LINEARS)])
    prompt, params = prompt_ids(0, 20), SamplingParams(temperature=0, max_tokens=4, logprobs=0)
    answers = {}
    for folders in ({"first": first, "second": second}, {"second": second}):
        llm = LLM(str(base), dtype="float32", enable_lora=True, max_lora_rank=16)
        loras = [LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(folders.items(), 1)]
        for lora in loras:
            (output,) = llm.generate(prompt, params, lora_request=lora, use_tqdm=False)
            answers[len(folders), lora.lora_name] = output.adapter, output.outputs[0].cumulative_logprob
    assert made == ["first", "second"], "the second of two was alike, and known; alone it was not"
    assert answers[2, "second"] == answers[1, "second"]
    assert answers[2, "first"][1] != answers[2, "second"][1]


@pytest.mark.parametrize(
    "change",
    [
        config(lora_alpha=3),
        config(alpha_pattern={"q_proj": 50}),
        config(use_rslora=True),
        tensors(lambda name, tensor: {name: tensor.to(torch.bfloat16)}),
        tensors(lambda name, tensor: {} if name.startswith(Q) else {name: tensor}),
    ],
    ids=["alpha", "a pattern", "rsLoRA", "another dtype", "a module less"],
)
def test_one_that_differs_is_looked_at_itself(
    change: Change, engine: LLMEngine, base: Path, first: Path, tmp_path: Path, made: list[str]
) -> None:
    reconfigure(shutil.copytree(first, tmp_path / "first"), target_modules=".*_proj")
    add(engine, "first", tmp_path / "first")
    added = add(engine, "other", other(tmp_path / "first", tmp_path / "other", change))
    assert made == ["first", "other"]
    assert add(started(base), "other", tmp_path / "other").digest == added.digest
    assert added.digest != engine.list_loras()[0].digest


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (tensors(lambda name, tensor: {name: tensor.repeat(2, 1) if "lora_A" in name else tensor}), AdapterFormatError),
        (tensors(lambda name, tensor: {name.replace("layers.0", "layers.99"): tensor}), AdapterMismatchError),
        (config(r=9), AdapterFormatError),
    ],
    ids=["another rank in A", "a layer that is not there", "another rank in the config"],
)
def test_what_was_refused_is_refused_again_by_its_own_name(
    change: Change, error: type[Exception], engine: LLMEngine, first: Path, tmp_path: Path
) -> None:
    add(engine, "first", first)
    folder = other(first, tmp_path / "other", change)
    for name in ("wrong", "wrong again"):
        with pytest.raises(error, match=f"adapter {name!r}"):
            add(engine, name, folder)


def test_a_truncated_file_with_a_known_header_is_refused(engine: LLMEngine, first: Path, tmp_path: Path) -> None:
    add(engine, "first", first)
    folder = other(first, tmp_path / "other", lambda folder: None)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterFormatError, match=r"adapter 'other': .*truncated or malformed"):
        add(engine, "other", folder)


def test_tensors_in_memory_are_alike_where_names_shapes_and_dtypes_are(
    engine: LLMEngine, first: Path, made: list[str]
) -> None:
    held = load_file(first / "adapter_model.safetensors")
    fields = {"r": 8, "lora_alpha": 8, "target_modules": ALL_LINEARS}
    add_all = {
        "one": held,
        "alike": {name: 2 * tensor for name, tensor in held.items()},
        "half": {name: tensor.half() for name, tensor in held.items()},
    }
    digests = {engine.add_lora(name, tensors=some, config=fields).digest for name, some in add_all.items()}
    assert made == ["one", "half"]
    assert len(digests) == 3


def test_those_used_last_are_kept(
    engine: LLMEngine, first: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlines, "_MOST", 2 * outlines._LEAST)
    folders = {f"alpha{alpha}": other(first, tmp_path / str(alpha), config(lora_alpha=alpha)) for alpha in range(1, 4)}
    order = ["alpha1", "alpha2", "alpha1", "alpha3", "alpha1", "alpha2"]
    for number, name in enumerate(order):
        add(engine, f"{number}-{name}", folders[name])
    assert made == ["0-alpha1", "1-alpha2", "3-alpha3", "5-alpha2"]


def test_a_long_header_is_not_kept(engine: LLMEngine, first: Path, tmp_path: Path, made: list[str]) -> None:
    def told(folder: Path, text: str) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file), file, metadata={"told": text * 1_000_000})

    for name, text in {"a": "x", "alike": "x", "b": "y"}.items():
        folder = other(first, tmp_path / name, lambda folder, text=text: told(folder, text))  # type: ignore[misc]
        with TensorFile.open(name, folder / "adapter_model.safetensors") as file:
            assert len(pickle.dumps(file.likeness)) < 100 < 1_000_000 < len(file.header)
        add(engine, name, folder)
    assert made == ["a", "b"], "the headers of two are equal"
