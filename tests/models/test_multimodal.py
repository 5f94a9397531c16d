"""Multi-modal models against transformers and PEFT: the same float32 logits, whoever else is in the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aiolora import LLM, SamplingParams
from aiolora.types import LoRARequest, Prompt
from tests.media.tiny import (
    IMAGE,
    LLAVAS,
    load_mm,
    load_mm_peft,
    make_llava,
    make_mm_adapter,
    mm_logprobs,
    picture,
)
from tests.tiny import VOCAB, everything, prompt_ids, reported

TOLERANCE = 1e-4
WORDS = everything(4, logit_bias={IMAGE: -100})  # transformers counts placeholders among what was answered, too
Targets = Callable[[str], Any]

# which part of the model each adapter changes
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "language": {"target_modules": r".*language_model.*(q_proj|v_proj|down_proj)", "r": 5},
    "tower": {"target_modules": r".*vision_tower.*(q_proj|fc1)", "r": 4, "lora_alpha": 24},
    "connector": {"target_modules": ["linear_1", "linear_2"], "r": 12, "use_rslora": True},
    "dora": {"target_modules": ["fc2", "out_proj", "linear_2", "o_proj"], "use_dora": True},
}


@pytest.fixture(scope="module", params=LLAVAS)
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"), request.param)


@pytest.fixture(scope="module")
def adapters(llava: Path) -> dict[str, Path]:
    return {
        name: make_mm_adapter(llava, llava / "adapters" / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items(), start=1)
    }


def with_image(seed: int, before: int, after: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prompt for us, and what transformers' own processor makes of its image."""
    ids = [*prompt_ids(seed, before, IMAGE), IMAGE, *prompt_ids(seed + 1, after, IMAGE)]
    image = picture(seed)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}, {"pixel_values": pixels}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def of(model: nn.Module, name: str | None, tokens: list[int], features: dict[str, Tensor]) -> Tensor:
    if name is None:
        with model.disable_adapter():  # type: ignore[operator]
            return mm_logprobs(model, tokens, **features)
    model.set_adapter(name)  # type: ignore[operator]
    return mm_logprobs(model, tokens, **features)


@pytest.mark.parametrize("budget", [1024, 13])
def test_one_batch_of_text_and_images_under_all_kinds_of_adapters_agrees_with_peft(
    llava: Path, adapters: dict[str, Path], budget: int
) -> None:
    """`budget`: tokens a step; with few an image is cut into several steps."""
    peft = load_mm_peft(llava, adapters)
    llm = LLM(str(llava), dtype="float32", enable_lora=True, max_num_batched_tokens=budget, max_num_seqs=12)
    requests = {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)}
    prompts: list[Prompt] = []
    names: list[str | None] = []
    features: list[dict[str, Tensor]] = []
    for number, name in enumerate([None, *adapters]):
        prompt, pixels = with_image(10 * number, 3 + number, 9)
        prompts += [prompt, prompt_ids(number, 12, IMAGE)]
        names += [name, name]
        features += [pixels, {}]
    outputs = llm.generate(prompts, WORDS, lora_request=[name and requests[name] for name in names], use_tqdm=False)
    for output, name, given in zip(outputs, names, features):
        tokens, logprobs = reported(output)
        expected = of(peft, name, tokens, given)
        assert_same(logprobs, expected)
        assert output.outputs[0].token_ids == expected[-4:, :IMAGE].argmax(-1).tolist()
    base, everywhere = (reported(outputs[0])[1], reported(outputs[2])[1])
    assert base.shape != everywhere.shape or (base - everywhere).abs().max() > 0.1


def test_several_images_of_one_prompt_stand_where_their_placeholders_do(llava: Path) -> None:
    hf = load_mm(llava)
    first, one = with_image(1, 2, 3)
    second, two = with_image(2, 4, 5)
    ids = [*first["prompt_token_ids"], *second["prompt_token_ids"]]
    images = [first["multi_modal_data"]["image"], second["multi_modal_data"]["image"]]
    llm = LLM(str(llava), dtype="float32")
    (output,) = llm.generate({"prompt_token_ids": ids, "multi_modal_data": {"image": images}}, WORDS, use_tqdm=False)
    tokens, logprobs = reported(output)
    assert_same(logprobs, mm_logprobs(hf, tokens, pixel_values=torch.cat([one["pixel_values"], two["pixel_values"]])))


def test_two_images_under_equal_tokens_share_no_page_and_one_image_shares_all(llava: Path) -> None:
    llm = LLM(str(llava), dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=VOCAB, logit_bias=WORDS.logit_bias)
    prompt, _ = with_image(1, 4, 30)
    other = {**prompt, "multi_modal_data": {"image": picture(2)}}

    def ask(prompt: Any) -> tuple[int, list[float]]:
        before = llm.engine.snapshot().cached_tokens
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        rows = output.outputs[0].logprobs or []
        return llm.engine.snapshot().cached_tokens - before, [rows[0][token].logprob for token in range(VOCAB)]

    cold, first = ask(prompt)
    shared, again = ask(prompt)
    crossed, second = ask(other)
    assert (cold, crossed) == (0, 0)
    assert shared >= 32
    assert_same(torch.tensor(first), torch.tensor(again))
    hf = load_mm(llava)
    (output,) = llm.generate(other, WORDS, use_tqdm=False)
    tokens, _ = reported(output)
    assert_same(
        torch.tensor(second),
        mm_logprobs(hf, tokens, pixel_values=_pixels(picture(2)))[-4],
    )
    assert max(abs(one - two) for one, two in zip(first, second)) > 0.05


def _pixels(image: Any) -> Tensor:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return processor(images=[image], return_tensors="pt")["pixel_values"]
