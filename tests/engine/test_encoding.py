"""What encoders made of images is kept by what it depends on, and never more of it than there is room for."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aiolora import LLM, AsyncLLMEngine, EngineArgs, LLMEngine, SamplingParams
from aiolora.engine.encoding import KeptRows, _Key
from aiolora.engine.runner import ModelRunner
from aiolora.errors import AdapterMismatchError, ConfigError, NonFiniteLogitsError, RequestError
from aiolora.media.reader import MediaReader
from aiolora.models.encoder import Encoder
from aiolora.models.layers import Linear
from aiolora.types import LoRARequest
from tests.media.tiny import IMAGE, make_llava, make_mm_adapter, picture
from tests.tiny import prompt_ids

PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each item that was encoded was under an adapter."""
    seen: list[bool] = []
    forward = Encoder.forward

    def spied(self: Encoder, modality: str, features: Any, rows: Any) -> Any:
        seen.append(rows is not None)
        return forward(self, modality, features, rows)

    monkeypatch.setattr(Encoder, "forward", spied)
    return seen


def about(seed: int, start: int = 4) -> dict[str, Any]:
    ids = [*prompt_ids(start, start, IMAGE), IMAGE, *prompt_ids(seed, 20, IMAGE)]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": picture(seed)}}


def test_an_image_is_encoded_once_however_often_it_is_asked_about_and_however_it_is_cut(
    llava: Path, encoded: list[bool]
) -> None:
    llm = LLM(str(llava), dtype="float32", max_num_batched_tokens=7, max_num_seqs=4, enable_prefix_caching=False)
    llm.generate([about(1), about(1), about(2)], PARAMS, use_tqdm=False)
    llm.generate(about(1, start=9), PARAMS, use_tqdm=False)
    assert encoded == [False, False]


def test_a_step_encodes_few_so_that_those_who_run_wait_for_few(llava: Path, encoded: list[bool]) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(llava), dtype="float32", max_num_batched_tokens=1024))
    engine.add_request("text", prompt_ids(1, 5, IMAGE), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    for seed in range(4):
        engine.add_request(str(seed), about(seed), PARAMS)
    images = [picture(seed) for seed in (5, 6)]
    two: Any = {"prompt_token_ids": [5, IMAGE, 6, IMAGE, 7], "multi_modal_data": {"image": images}}
    engine.add_request("two", two, PARAMS)
    seen = 0
    while engine.has_unfinished_requests():
        engine.step()
        assert len(encoded) - seen <= 1
        seen = len(encoded)
    assert seen == 6


def test_adapters_of_the_language_model_share_rows_and_those_of_a_tower_have_their_own(
    llava: Path, encoded: list[bool]
) -> None:
    targets = {
        "language": r".*language_model.*q_proj",
        "also language": r".*language_model.*v_proj",
        "tower": r".*vision_tower.*q_proj",
        "connector": ["linear_1"],
    }
    loras = [
        LoRARequest(name, number, str(make_mm_adapter(llava, llava / name, seed=number, target_modules=modules)))
        for number, (name, modules) in enumerate(targets.items(), 1)
    ]
    llm = LLM(str(llava), dtype="float32", enable_lora=True)
    llm.generate([about(1)] * 5, PARAMS, lora_request=[None, *loras], use_tqdm=False)
    llm.generate([about(1)] * 5, PARAMS, lora_request=[None, *loras], use_tqdm=False)
    assert sorted(encoded) == [False, True, True]
    outputs = [
        llm.generate(about(1), PARAMS, lora_request={"tower": weight}, use_tqdm=False) for weight in (0.5, 1.0, 0.5)
    ]
    assert sorted(encoded) == [False, True, True, True]
    assert outputs[0][0].outputs[0].token_ids == outputs[2][0].outputs[0].token_ids


def test_a_tower_that_takes_no_adapters_has_no_pages(llava: Path, encoded: list[bool]) -> None:
    folders = {
        "language": make_mm_adapter(llava, llava / "own", seed=5, target_modules=r".*language_model.*proj"),
        "all": make_mm_adapter(llava, llava / "whole", seed=6),
    }
    loras = [LoRARequest(name, number, str(folder)) for number, (name, folder) in enumerate(folders.items(), 1)]
    wide, narrow = (
        LLM(str(llava), dtype="float32", enable_lora=True, lora_target_modules=only)
        for only in (None, ("language_model", "lm_head"))
    )
    answers = [llm.generate(about(1), PARAMS, lora_request=loras[0], use_tqdm=False) for llm in (wide, narrow)]
    assert answers[0][0].outputs[0].token_ids == answers[1][0].outputs[0].token_ids
    assert encoded == [False, False]
    plans = [llm.engine._built.plan for llm in (wide, narrow)]
    assert plans[0].adapter_nbytes > 1.2 * plans[1].adapter_nbytes
    with pytest.raises(AdapterMismatchError, match=r"take no adapters \(--lora-target-modules\).*(tower|projector)"):
        narrow.generate(about(1), PARAMS, lora_request=loras[1], use_tqdm=False)


def test_without_room_an_image_is_encoded_for_each_step_that_has_some_of_it(llava: Path, encoded: list[bool]) -> None:
    roomy = LLM(str(llava), dtype="float32", max_num_batched_tokens=10, max_num_seqs=2)
    (expected,) = roomy.generate(about(1), PARAMS, use_tqdm=False)
    cramped = LLM(str(llava), dtype="float32", max_num_batched_tokens=10, max_num_seqs=2, media_memory=0)
    (output,) = cramped.generate(about(1), PARAMS, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(encoded) == 1 + 2  # 16 rows behind 4 tokens, 10 tokens a step


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), None])
def test_an_image_that_cannot_be_encoded_ends_its_own_request_and_no_other(
    llava: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    forward, reader = Encoder.forward, MediaReader.of(llava, "m", domains=(), max_pixels=1 << 20)
    [bad] = [one.item() for one in reader.open(reader.split(about(2), Words()).given)]

    def failing(self: Encoder, modality: str, features: Any, rows: Any) -> Any:
        made = forward(self, modality, features, rows)
        if not torch.equal(features["pixel_values"], torch.from_numpy(bad.features["pixel_values"])):
            return made
        if failure is not None:
            raise failure
        return made[:3]

    monkeypatch.setattr(Encoder, "forward", failing)
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(llava), dtype="float32"))
    for name, seed in (("good", 1), ("bad", 2), ("also good", 3)):
        engine.add_request(name, about(seed), PARAMS)
    finished, failed = [], []
    while engine.has_unfinished_requests():
        try:
            finished += [output.request_id for output in engine.step() if output.finished]
        except NonFiniteLogitsError as error:
            failed.append(str(error))
    assert sorted(finished) == ["also good", "good"]
    assert len(failed) == 1
    assert "'bad'" in failed[0]


class Words:
    chat_template: object = None

    def decode(self, ids: Any) -> str:
        return "w"


@pytest.mark.parametrize("lora", [False, True])
def test_a_warm_up_encodes_a_small_and_a_large_one_as_with_adapters_and_without(
    llava: Path, encoded: list[bool], lora: bool
) -> None:
    llm = LLM(str(llava), dtype="float32", enable_lora=lora)
    runner = llm.engine._built.engine._runner
    assert isinstance(runner, ModelRunner)
    assert runner._encoding is not None
    with torch.inference_mode():
        runner._encoding.warm_up(llm.engine._built.intake.media.samples())
    assert encoded == ([False, True] * 2 if lora else [False] * 2)
    assert runner._encoding.kept.nbytes == 0


def test_warming_up_takes_each_kind_of_a_towers_linears_through_all_sizes(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(llava), dtype="float32", enable_lora=True)
    runner = llm.engine._built.engine._runner
    assert isinstance(runner, ModelRunner)
    assert runner._encoding is not None
    seen: dict[int, set[tuple[int, int]]] = {}
    forward = Linear.forward

    def spied(self: Linear, x: Any, routing: Any) -> Any:
        if self.site is not None:
            seen.setdefault(self.site.kind, set()).add((len(x), -1 if routing is None else len(routing.items)))
        return forward(self, x, routing)

    monkeypatch.setattr(Linear, "forward", spied)
    kinds = runner._packer._kinds
    runner.warm_up(replace(llm.engine._built.plan, lora_pages=4), kinds=kinds.sites)
    wanted = {(size, items) for size in (2, 16, 32, 64, 101, 251, 301) for items in (-1, 1, 65)}
    assert len(kinds.of_towers) == 8
    assert all(wanted <= seen[kind] for kind in kinds.of_towers)


def test_what_is_kept_never_exceeds_the_limit_and_what_was_used_last_stays() -> None:
    kept, row = KeptRows(limit=3 * 40), torch.zeros(1, 10)
    keys = [_Key(bytes([number]), None) for number in range(4)]
    for key in keys[:3]:
        kept.keep(key, row)
    assert kept.find(keys[0]) is not None
    kept.keep(keys[3], row)
    assert [kept.find(key) is not None for key in keys] == [True, False, True, True]
    assert kept.nbytes == 120
    kept.keep(_Key(b"large", None), torch.zeros(4, 10))
    assert (kept.nbytes, [kept.find(key) for key in keys]) == (0, [None] * 4)
    assert kept.find(_Key(keys[0].digest, b"mix")) is None
    kept.keep(keys[0], torch.zeros(100, 10)[:1])
    found = kept.find(keys[0])
    assert found is not None
    assert found.untyped_storage().nbytes() == 40, "what is kept of a longer tensor is what is counted"


def test_default_adapters_are_checked_at_the_start(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes text, image, no 'audio'"):
        LLM(str(llava), dtype="float32", enable_lora=True, default_mm_loras={"audio": "x"})
    with pytest.raises(ConfigError, match="needs enable_lora"):
        LLM(str(llava), dtype="float32", default_mm_loras={"image": "x"})


def test_a_default_adapter_is_that_of_requests_with_its_modality_only(llava: Path, encoded: list[bool]) -> None:
    folder = make_mm_adapter(llava, llava / "default", seed=9)
    llm = LLM(str(llava), dtype="float32", enable_lora=True, default_mm_loras={"image": str(folder)})
    text = {"prompt_token_ids": prompt_ids(1, 9, IMAGE)}
    outputs = llm.generate([about(1), text, about(2)], PARAMS, use_tqdm=False)
    assert [output.adapter and output.adapter.partition("@")[0] for output in outputs] == ["image", None, "image"]
    (named,) = llm.generate(about(1), PARAMS, lora_request=str(llava), use_tqdm=False)
    assert named.adapter is None


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_conversation_with_an_image_is_the_prompt_that_its_template_makes(llava: Path) -> None:
    llm = LLM(str(llava), dtype="float32")
    content: Any = [
        {"type": "text", "text": "w5"},
        {"type": "image", "image": picture(1)},
        {"type": "text", "text": "w6"},
    ]
    (chatted,) = llm.chat([{"role": "user", "content": content}], PARAMS, use_tqdm=False)
    (prompted,) = llm.generate(
        {"prompt": "w5 <image> w6", "multi_modal_data": {"image": picture(1)}}, PARAMS, use_tqdm=False
    )
    assert chatted.prompt_token_ids == prompted.prompt_token_ids
    assert chatted.outputs[0].token_ids == prompted.outputs[0].token_ids


async def test_streams_about_images_run_beside_each_other_and_many_wait_for_their_images_in_threads(
    llava: Path,
) -> None:
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model=str(llava), dtype="float32")) as engine:
        outputs = await asyncio.gather(*(engine.generate(about(seed % 3), PARAMS) for seed in range(20)))
        first = {output.outputs[0].text for output in outputs[::3]}
        assert len(first) == 1
        with pytest.raises(RequestError, match="0 placeholders of image for 1 given"):
            await engine.generate({"prompt": "w5", "multi_modal_data": {"image": picture(1)}}, PARAMS)


def test_dummy_weights_are_finite_in_the_encoder_too(llava: Path) -> None:
    llm = LLM(str(llava), dtype="float32", load_format="dummy")
    (output,) = llm.generate(about(1), PARAMS, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
