"""The decoder is one graph: torch.compile sees no break, whatever adapters and sequences a step has."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiolora import LLM, LoRARequest, SamplingParams
from aiolora.engine.runner import ModelRunner, _leave_sizes_open
from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.lora.fidelity import train
from tests.tiny import ALL_LINEARS, everything, load_hf, make_adapter, make_model, prompt_ids, reported

Step = tuple[StepInputs, list[LayerKV]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def serve(folder: Path, adapters: Path, **args: Any) -> tuple[LLM, ModelRunner]:
    """An engine with two adapters, and its runner."""
    llm = LLM(str(folder), dtype="float32", device="cpu", enable_lora=True, **args)
    for number, config in enumerate(({"r": 5}, {"r": 20, "target_modules": ALL_LINEARS}), 1):
        path = adapters / f"a{number}"
        if not path.exists():
            make_adapter(folder, path, seed=number, **config)
        llm.engine.add_lora(LoRARequest(f"a{number}", number, str(path)))
    runner = llm.engine._built.engine._runner
    assert isinstance(runner, ModelRunner)
    return llm, runner


def answer(llm: LLM) -> list[Tensor]:
    """Log-probabilities of a batch of sequences of two adapters, both weighted, and the base."""
    loras = ["a1", None, "a2", {"a1": 0.5, "a2": 0.5}, "a1"]
    prompts: list[Prompt] = [prompt_ids(number, 3 + 5 * number) for number in range(len(loras))]
    return [reported(out)[1] for out in llm.generate(prompts, everything(4), lora_request=loras, use_tqdm=False)]


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama biased", "aot_eager"),
        ("mistral", "eager"),
        ("qwen3", "aot_eager"),
        ("gemma3 capped, every head its own", "aot_eager"),
        ("olmo2", "eager"),
        ("starcoder2", "aot_eager"),
    ],
)
def test_one_graph_serves_prefill_and_decode_with_the_same_result(
    family: str, backend: str, model_of: ModelOf, tmp_path: Path
) -> None:
    expected = answer(serve(model_of(family), tmp_path, max_num_batched_tokens=17, max_num_seqs=4)[0])
    llm, runner = serve(model_of(family), tmp_path, max_num_batched_tokens=17, max_num_seqs=4, compile=True)
    runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for ours, theirs in zip(answer(llm), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one with adapters, one without"


def test_steps_of_every_shape_need_two_graphs(model_of: ModelOf, tmp_path: Path) -> None:
    llm, runner = serve(model_of("llama"), tmp_path, compile=True)
    runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for lengths, loras in (
        ([1], [None]),
        ([30], [None]),
        ([1, 1], [None, None]),
        ([30, 7], [None, None]),
        ([1], ["a1"]),
        ([30], ["a1"]),
        ([1], ["a2"]),
        ([1, 1], ["a1", "a1"]),
        ([20, 30], ["a1", "a2"]),
        ([9, 9, 40], [None, "a1", "a2"]),
        ([3], [{"a1": 0.5, "a2": 0.5}]),
    ):
        prompts: list[Prompt] = [prompt_ids(length, length) for length in lengths]
        llm.generate(prompts, greedy, lora_request=loras, use_tqdm=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_what_adapters_do_to_the_ends_is_in_graphs_too(model_of: ModelOf, tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [3, 40]},
        {"modules_to_save": ["norm"]},
    ]
    base = load_hf(model_of("llama"))
    for number, config in enumerate(configs):
        train(base, config, tmp_path / str(number), seed=number)
    answers = []
    for compiled in (False, True):
        llm, runner = serve(model_of("llama"), tmp_path, compile=compiled)
        if compiled:
            runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend="eager")
        for number in range(len(configs)):
            llm.engine.add_lora(LoRARequest(f"end {number}", 9 + number, str(tmp_path / str(number))))
        torch._dynamo.utils.counters.clear()
        for loras in (["end 0", None], ["end 1", "a1", "end 0"], ["end 1"], ["end 2", "end 1"], ["end 2", "a2", None]):
            prompts: list[Prompt] = [prompt_ids(number, 3 + 9 * number) for number in range(len(loras))]
            outputs = llm.generate(prompts, everything(3), lora_request=loras, use_tqdm=False)
            answers += [reported(output)[1] for output in outputs]
    half = len(answers) // 2
    for ours, theirs in zip(answers[half:], answers[:half]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5, "one for each of what a step may have"


def decode_step(runner: ModelRunner, llm: LLM) -> Step:
    """The last decode step of `answer`, with its cache."""
    seen: list[StepInputs] = []
    forward = runner._forward

    def watched(inputs: StepInputs, kv: list[LayerKV]) -> Tensor:
        seen.append(inputs)
        return forward(inputs, kv)

    runner._forward = watched
    answer(llm)
    runner._forward = forward
    step = seen[-1]
    assert step.routing is not None
    assert len(step.tokens) == 5
    assert len(step.routing.tiles) == 4  # three adapters and the base
    return step, runner._cache.layers


def test_a_decode_step_gives_the_same_whatever_adapters_the_graph_was_made_for(
    model_of: ModelOf, tmp_path: Path
) -> None:
    llm, runner = serve(model_of("llama"), tmp_path, compile=True)
    runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend="aot_eager")
    step, cache = decode_step(runner, llm)
    assert step.routing is not None
    routing = step.routing
    swapped = replace(step, routing=routing._replace(pages=routing.pages.flip(0), scales=routing.scales.flip(0)))
    empty = replace(step, routing=routing._replace(tiles=routing.tiles * torch.tensor([1, 0], dtype=torch.int32)))
    seen = []
    with torch.inference_mode():
        for inputs in (step, swapped, empty, replace(step, routing=None)):
            _leave_sizes_open(inputs)
            seen.append(runner._forward(inputs, cache))
            torch.testing.assert_close(seen[-1], runner._model(inputs, cache), rtol=0, atol=1e-5)
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], seen[3], rtol=0, atol=1e-5)
    assert not torch.equal(seen[0], seen[2])


def test_a_step_without_adapters_has_no_op_of_them_in_its_graph(model_of: ModelOf, tmp_path: Path) -> None:
    llm, runner = serve(model_of("llama"), tmp_path)
    step, cache = decode_step(runner, llm)
    arguments: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        arguments.append(sum(node.op == "placeholder" for node in graph.graph.nodes))
        return graph.forward

    with torch.inference_mode():
        for inputs in (step, replace(step, routing=None)):
            torch.compiler.reset()
            torch.compile(runner._model, fullgraph=True, backend=count)(inputs, cache)
    with_adapters, without = arguments
    assert with_adapters - without >= 4 + 2 * 4 * 2  # the four tensors of Routing; a and b of 4 Linears in 2 layers


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13 imports its own
def test_inductor_gives_the_same_tokens_and_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    expected = answer(serve(folder, tmp_path)[0])
    llm, _ = serve(folder, tmp_path, compile=True)
    for ours, theirs in zip(answer(llm), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
