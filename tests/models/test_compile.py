"""The decoder is one graph: torch.compile sees no break, whatever adapters and sequences a step has."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiolora import LLM, LoRARequest
from aiolora.engine.runner import ModelRunner
from aiolora.models.inputs import LayerKV, StepInputs
from aiolora.types import Prompt
from tests.conftest import ModelOf
from tests.tiny import ALL_LINEARS, everything, make_adapter, make_model, prompt_ids, reported

Step = tuple[StepInputs, list[LayerKV]]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def serve(folder: Path, adapters: Path, **args: Any) -> tuple[LLM, ModelRunner]:
    """An engine with two adapters, and its runner."""
    llm = LLM(str(folder), dtype="float32", enable_lora=True, **args)
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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", ["llama biased", "mistral", "qwen3"])
def test_one_graph_serves_prefill_and_decode_with_the_same_result(
    family: str, backend: str, model_of: ModelOf, tmp_path: Path
) -> None:
    llm, runner = serve(model_of(family), tmp_path)
    expected = answer(llm)
    llm, runner = serve(model_of(family), tmp_path)
    runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend=backend)
    for ours, theirs in zip(answer(llm), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


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
    assert step.rows is not None
    assert len(step.tokens) == 5
    assert len(step.rows.tiles) == 3
    return step, runner._cache.layers


def graphs_of(run: Callable[[], object]) -> int:
    counted = torch._dynamo.utils.counters
    counted.clear()
    run()
    assert not counted["graph_break"]
    return counted["stats"]["unique_graphs"]


def test_a_decode_step_is_a_single_graph_that_other_adapters_and_lengths_use_again(
    model_of: ModelOf, tmp_path: Path
) -> None:
    llm, runner = serve(model_of("llama"), tmp_path)
    step, cache = decode_step(runner, llm)
    model = torch.compile(runner._model, fullgraph=True, dynamic=True, backend="aot_eager")
    assert step.rows is not None
    swapped = replace(step, rows=step.rows._replace(pages=step.rows.pages.flip(0), scales=step.rows.scales.flip(0)))
    fewer = replace(
        step,
        tokens=step.tokens[:4],
        positions=step.positions[:4],
        slots=step.slots[:4],
        block_tables=step.block_tables[:4],
        kv_lengths=step.kv_lengths[:4],
        query_starts=step.query_starts[:5],
        logits_at=step.logits_at[:4],
        rows=step.rows._replace(perm=torch.tensor([0, 2], dtype=torch.int32), tiles=step.rows.tiles[:2] * 0),
    )
    with torch.inference_mode():
        assert graphs_of(lambda: torch.testing.assert_close(model(step, cache), runner._model(step, cache))) == 1
        for other in (swapped, fewer):
            assert graphs_of(lambda x=other: torch.testing.assert_close(model(x, cache), runner._model(x, cache))) == 0
        assert not torch.equal(model(step, cache), model(swapped, cache))
        base = replace(step, rows=None)
        assert graphs_of(lambda: torch.testing.assert_close(model(base, cache), runner._model(base, cache))) == 1


def test_a_step_without_adapters_has_no_op_of_them_in_its_graph(model_of: ModelOf, tmp_path: Path) -> None:
    llm, runner = serve(model_of("llama"), tmp_path)
    step, cache = decode_step(runner, llm)
    arguments: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        arguments.append(sum(node.op == "placeholder" for node in graph.graph.nodes))
        return graph.forward

    with torch.inference_mode():
        for inputs in (step, replace(step, rows=None)):
            torch.compiler.reset()
            torch.compile(runner._model, fullgraph=True, backend=count)(inputs, cache)
    with_adapters, without = arguments
    assert with_adapters - without >= 4 + 2 * 4 * 2  # the four tensors of Rows; a and b of 4 Linears in 2 layers


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13 imports its own
def test_inductor_gives_the_same_tokens_and_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    expected = answer(serve(folder, tmp_path)[0])
    llm, _ = serve(folder, tmp_path, compile=True)
    for ours, theirs in zip(answer(llm), expected):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
