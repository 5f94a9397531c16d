"""Multi-modal models against transformers and PEFT: the same float32 logits, whoever else is in the batch."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from aiolora import LLM, SamplingParams
from aiolora.engine.runner import ModelRunner
from aiolora.errors import AdapterUnsupportedError
from aiolora.media.recordings import GraniteRecordings
from aiolora.types import LoRARequest, Prompt
from tests.media.tiny import (
    AUDIO,
    IMAGE,
    LLAVAS,
    RATE,
    load_mm,
    load_mm_peft,
    make_granite_speech,
    make_llava,
    make_mm_adapter,
    make_qwen2_audio,
    make_qwen_vl,
    mm_logprobs,
    picture,
    sound,
)
from tests.tiny import TOLERANCE, VOCAB, everything, prompt_ids, reconfigure, reported, rewrite

FORBIDDEN = {IMAGE: -100, AUDIO: -100}  # transformers counts placeholders among what was answered, too
WORDS = everything(4, logit_bias=FORBIDDEN)


@dataclass(frozen=True)
class Model:
    """How one is made and asked, by us and by transformers."""

    make: Callable[[Path], Path]
    modality: str
    tower: str  # regexes of modules to train
    connector: str
    features: Callable[[Path, Any], dict[str, Tensor]]  # what transformers' own processor makes of a source
    family: str = "llama"

    @property
    def placeholder(self) -> int:
        return IMAGE if self.modality == "image" else AUDIO

    def source(self, seed: int) -> Any:
        """An image or a recording, of a size of its own."""
        return picture(seed, 40 + 9 * seed % 20) if self.modality == "image" else sound(seed, 0.4 + seed % 5 / 10)

    def data(self, *seeds: int) -> dict[str, Any]:
        """`multi_modal_data`."""
        several = [self.source(seed) if self.modality == "image" else (self.source(seed), RATE) for seed in seeds]
        return {self.modality: several if len(several) > 1 else several[0]}


def _pixels(folder: Path, image: Any) -> dict[str, Tensor]:
    processor = AutoImageProcessor.from_pretrained(folder)  # of torchvision where that is there, as ours
    return dict(processor(images=[image], input_data_format="channels_last", return_tensors="pt"))


def _granite(folder: Path, samples: Any) -> dict[str, Tensor]:
    """Its own extractor needs torchaudio; ours is held against torch's spectrogram elsewhere."""
    frames = GraniteRecordings.of(AutoConfig.from_pretrained(folder), {}).frames(samples)
    return {"input_features": torch.from_numpy(frames)[None]}


def _whisper(folder: Path, samples: Any) -> dict[str, Tensor]:
    made = AutoFeatureExtractor.from_pretrained(folder)(
        samples, sampling_rate=RATE, return_attention_mask=True, padding="max_length", return_tensors="pt"
    )
    return {"input_features": made["input_features"], "feature_attention_mask": made["attention_mask"]}


_LLAVA = {
    "modality": "image",
    "tower": "vision_tower.*(q_proj|fc1)",
    "connector": "linear_[12]",
    "features": _pixels,
}
_QWEN = {
    "modality": "image",
    "tower": "visual.blocks.*(qkv|proj)",
    "connector": r"merger.mlp.[02]",
    "features": _pixels,
}
_GRANITE = {
    "modality": "audio",
    "tower": r"encoder.layers.*(to_kv|up_proj)|\.encoder.out_mid",
    "connector": r"projector\.linear|projector.*crossattention.*query|projector.*intermediate_query.dense",
    "features": _granite,
}
MODELS: dict[str, Model] = {
    **{f"llava {kind}": Model(make=lambda folder, kind=kind: make_llava(folder, kind), **_LLAVA) for kind in LLAVAS},
    "qwen2-vl": Model(make=make_qwen_vl, **_QWEN),
    "qwen2.5-vl": Model(make=lambda folder: make_qwen_vl(folder, "2.5"), **_QWEN),
    "granite speech": Model(make=make_granite_speech, family="granite", **_GRANITE),
    "granite speech over llama": Model(make=lambda folder: make_granite_speech(folder, "llama"), **_GRANITE),
    "qwen2-audio": Model(
        make=make_qwen2_audio,
        modality="audio",
        tower="audio_tower.*(k_proj|fc2)",
        connector="projector.linear",
        features=_whisper,
    ),
}


@dataclass(frozen=True)
class Made:
    """A model in its folder."""

    model: Model
    folder: Path

    def ids(self, *parts: tuple[int, int]) -> list[int]:
        """(seed, words) of text, a placeholder between each two."""
        ids: list[int] = []
        for seed, count in parts:
            ids += [*([self.model.placeholder] if ids else []), *prompt_ids(seed, count, AUDIO)]
        return ids

    def expected(self, model: nn.Module, tokens: list[int], *seeds: int) -> Tensor:
        """What transformers makes of `tokens`, in which there are placeholders for the sources of `seeds`."""
        made = [self.model.features(self.folder, self.model.source(seed)) for seed in seeds]
        features = {name: torch.cat([one[name] for one in made]) for name in (made[0] if made else ())}
        if "image_grid_thw" in features:
            features["mm_token_type_ids"] = (torch.tensor([tokens]) == self.model.placeholder).int()
        return mm_logprobs(model, tokens, **features)


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = MODELS[request.param]
    return Made(model, model.make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapters(made: Made) -> dict[str, Path]:
    """Adapters of each part of the model, and of all."""
    configs: dict[str, dict[str, Any]] = {
        "all": {"target_modules": "all-linear"},
        "language": {"target_modules": r".*language_model.*(q_proj|v_proj|down_proj)", "r": 5},
        "tower": {"target_modules": f".*({made.model.tower})", "r": 4, "lora_alpha": 24},
        "connector": {"target_modules": f".*({made.model.connector})", "r": 12, "use_rslora": True},
        "ends": {"target_modules": ["embed_tokens", "lm_head"], "r": 3},
        "dora": {"target_modules": f".*({made.model.tower}|{made.model.connector}|o_proj)", "use_dora": True},
    }
    return {
        name: make_mm_adapter(made.folder, made.folder / "adapters" / name, seed=seed, **config)
        for seed, (name, config) in enumerate(configs.items(), start=1)
    }


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("budget", [1024, 13])
def test_one_batch_of_text_and_media_under_all_kinds_of_adapters_agrees_with_peft(
    made: Made, adapters: dict[str, Path], budget: int
) -> None:
    """`budget`: tokens a step; with few an item is cut into several steps."""
    peft = load_mm_peft(made.folder, adapters)
    llm = LLM(str(made.folder), dtype="float32", enable_lora=True, max_num_batched_tokens=budget, max_num_seqs=12)
    requests = {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)}
    prompts: list[Prompt] = []
    asked: list[tuple[str | None, tuple[int, ...]]] = []
    for seed, name in enumerate([None, *adapters], start=1):
        ids = made.ids((seed, 3 + seed), (seed + 1, 9))
        prompts += [{"prompt_token_ids": ids, "multi_modal_data": made.model.data(seed)}, prompt_ids(seed, 12, AUDIO)]
        asked += [(name, (seed,)), (name, ())]
    loras = [name and requests[name] for name, _ in asked]
    outputs = llm.generate(prompts, WORDS, lora_request=loras, use_tqdm=False)
    for output, (name, seeds) in zip(outputs, asked):
        tokens, logprobs = reported(output)
        if name is None:
            with peft.disable_adapter():
                expected = made.expected(peft, tokens, *seeds)
        else:
            peft.set_adapter(name)
            expected = made.expected(peft, tokens, *seeds)
            if seeds:  # nor is it the base's
                with peft.disable_adapter():
                    assert (expected - made.expected(peft, tokens, *seeds)).abs().max() > 0.01
        assert_same(logprobs, expected)
        assert output.outputs[0].token_ids == expected[-4:, :AUDIO].argmax(-1).tolist()


def test_several_items_of_one_prompt_stand_where_their_placeholders_do(made: Made) -> None:
    if made.model.features is _granite:
        pytest.skip("transformers pads the recordings of a prompt to one length, which its conformer notices")
    llm = LLM(str(made.folder), dtype="float32", max_num_batched_tokens=21, max_num_seqs=4)
    ids = made.ids((1, 3), (2, 4), (3, 5))
    prompt: Any = {"prompt_token_ids": ids, "multi_modal_data": made.model.data(1, 2)}
    (output,) = llm.generate(prompt, WORDS, use_tqdm=False)
    tokens, logprobs = reported(output)
    assert_same(logprobs, made.expected(load_mm(made.folder), tokens, 1, 2))
    swapped: Any = {"prompt_token_ids": ids, "multi_modal_data": made.model.data(2, 1)}
    (other,) = llm.generate(swapped, WORDS, use_tqdm=False)
    assert (reported(other)[1][-4] - logprobs[-4]).abs().max() > 0.01


def test_two_items_under_equal_tokens_share_no_page_and_one_shares_all(made: Made) -> None:
    llm = LLM(str(made.folder), dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=VOCAB, logit_bias=FORBIDDEN)

    def ask(seed: int) -> tuple[int, list[int], Tensor]:
        before = llm.engine.snapshot().cached_tokens
        prompt: Any = {"prompt_token_ids": made.ids((1, 4), (2, 40)), "multi_modal_data": made.model.data(seed)}
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        rows = output.outputs[0].logprobs or []
        first = torch.tensor([rows[0][token].logprob for token in range(VOCAB)])
        return llm.engine.snapshot().cached_tokens - before, output.prompt_token_ids, first

    cold, ids, first = ask(1)
    shared, _, again = ask(1)
    crossed, other_ids, second = ask(21)  # of the same size
    assert ids == other_ids
    assert (cold, crossed) == (0, 0)
    assert shared == (len(ids) - 1) // 16 * 16
    assert_same(first, again)
    hf = load_mm(made.folder)
    for seed, ours in ((1, first), (21, second)):
        assert_same(ours, made.expected(hf, [*ids, 0], seed)[-1])
    assert (first - second).abs().max() > 0.01


def test_one_compiled_graph_serves_steps_with_media_and_without(made: Made, adapters: dict[str, Path]) -> None:
    if made.model not in (MODELS["llava clip"], MODELS["qwen2-vl"]):
        pytest.skip("to the compiler it is as one of those that are compiled here")
    lora = [None, LoRARequest("all", 1, str(adapters["all"])), None]
    prompts: list[Any] = [
        {"prompt_token_ids": made.ids((1, 4), (2, 9)), "multi_modal_data": made.model.data(1)},
        {"prompt_token_ids": made.ids((3, 6), (4, 3)), "multi_modal_data": made.model.data(2)},
        made.ids((5, 20)),
    ]

    def answer(*, compiled: bool) -> list[Tensor]:
        args = {"device": "cpu", "max_num_batched_tokens": 17, "max_num_seqs": 4}
        llm = LLM(str(made.folder), dtype="float32", enable_lora=True, **args)
        runner = llm.engine._built.engine._runner
        assert isinstance(runner, ModelRunner)
        if compiled:
            runner._compiled = True
            runner._forward = torch.compile(runner._model, fullgraph=True, dynamic=True, backend="eager")
        return [reported(out)[1] for out in llm.generate(prompts, WORDS, lora_request=lora, use_tqdm=False)]

    torch.compiler.reset()
    try:
        for ours, theirs in zip(answer(compiled=True), answer(compiled=False)):
            assert_same(ours, theirs)
    finally:
        torch.compiler.reset()


def test_an_adapter_under_the_names_of_earlier_days_is_the_same(made: Made, adapters: dict[str, Path]) -> None:
    old = made.folder / "adapters" / "old"
    make_mm_adapter(made.folder, old, seed=1, target_modules="all-linear")
    rewrite(old, lambda tensors: {earlier(name): tensor for name, tensor in tensors.items()})
    llm = LLM(str(made.folder), dtype="float32", enable_lora=True)
    prompt: Any = {"prompt_token_ids": made.ids((1, 4), (2, 9)), "multi_modal_data": made.model.data(1)}
    loras = [
        LoRARequest(name, number, str(adapters["all"].parent / name)) for number, name in enumerate(("all", "old"), 1)
    ]
    new, same = llm.generate([prompt] * 2, WORDS, lora_request=loras, use_tqdm=False)
    assert_same(reported(new)[1], reported(same)[1])


def test_patterns_are_held_against_the_names_of_the_file_and_the_ends_have_earlier_names_too(
    made: Made, tmp_path: Path
) -> None:
    config: dict[str, Any] = {"lora_alpha": 8, "r": 4, "modules_to_save": ["language_model.norm"]}
    config["target_modules"] = ["q_proj", "embed_tokens", "lm_head"]
    patterns = {name: {f"{name}layers.0.self_attn.q_proj": 6} for name in ("language_model.", "language_model.model.")}
    new, old = patterns.values()
    for name in ("new", "old"):
        make_mm_adapter(
            made.folder, tmp_path / name, seed=4, rank_pattern=new, alpha_pattern=dict.fromkeys(new, 64), **config
        )
    rewrite(tmp_path / "old", lambda tensors: {earlier(name): tensor for name, tensor in tensors.items()})
    reconfigure(tmp_path / "old", rank_pattern=old, alpha_pattern=dict.fromkeys(old, 64))
    llm = LLM(str(made.folder), dtype="float32", enable_lora=True)
    prompt: Any = {"prompt_token_ids": made.ids((1, 4), (2, 9)), "multi_modal_data": made.model.data(1)}
    loras = [LoRARequest(name, number, str(tmp_path / name)) for number, name in enumerate(("new", "old"), 1)]
    first, same = llm.generate([prompt] * 2, WORDS, lora_request=loras, use_tqdm=False)
    assert_same(reported(first)[1], reported(same)[1])
    reconfigure(tmp_path / "old", alpha_pattern={})
    (other,) = llm.generate(prompt, WORDS, lora_request=LoRARequest("plain", 3, str(tmp_path / "old")), use_tqdm=False)
    assert (reported(other)[1][:4] - reported(first)[1][:4]).abs().max() > 0.01, "the pattern tells"


def test_a_checkpoint_under_the_names_of_earlier_days_is_the_same_model(made: Made, tmp_path: Path) -> None:
    old = Path(shutil.copytree(made.folder, tmp_path / "old", ignore=shutil.ignore_patterns("adapters")))
    prefix = "base_model.model."
    tensors = load_file(old / "model.safetensors")
    renamed = {earlier(prefix + name).removeprefix(prefix): tensor for name, tensor in tensors.items()}
    tower = "vision_tower.vision_model.embeddings"
    if any(name.startswith(tower) for name in renamed):
        renamed[f"{tower}.position_ids"] = torch.arange(17)
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    prompt: Any = {"prompt_token_ids": made.ids((1, 4), (2, 9)), "multi_modal_data": made.model.data(1)}
    new, same = (
        LLM(str(folder), dtype="float32").generate(prompt, WORDS, use_tqdm=False)[0] for folder in (made.folder, old)
    )
    assert torch.equal(reported(new)[1], reported(same)[1])


def earlier(name: str) -> str:
    """What transformers called the modules of composite models before version 4.52."""
    for now, before in (
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.language_model\.", "language_model.model."),
        (r"(?:model\.)?vision_tower\.", "model.vision_tower.vision_model."),
        (r"model\.(\w+_tower|multi_modal_projector|visual|encoder|projector)\.", r"\1."),
    ):
        name = re.sub(rf"^base_model\.model\.{now}", f"base_model.model.{before}", name)
    return name


def test_an_alora_of_a_tower_is_refused_for_it_acts_before_there_are_tokens(made: Made) -> None:
    folder = make_mm_adapter(
        made.folder,
        made.folder / "adapters" / "alora",
        task_type="CAUSAL_LM",
        alora_invocation_tokens=[5],
        target_modules=f".*({made.model.tower}|q_proj)",
    )
    llm = LLM(str(made.folder), dtype="float32", enable_lora=True)
    with pytest.raises(AdapterUnsupportedError, match="acts before there are tokens"):
        llm.generate([5, 6], WORDS, lora_request=LoRARequest("alora", 1, str(folder)), use_tqdm=False)
