"""Adapters that bring a tokenizer: their prompts, their ends, their templates; nobody else's."""

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from litestar.testing import AsyncTestClient
from transformers import AutoTokenizer

from aiolora import LLM, AsyncLLMEngine, EngineArgs, LoRARequest, SamplingParams, StructuredOutputsParams
from aiolora.api import create_app
from aiolora.engine.grammar import Grammars
from aiolora.errors import AdapterFormatError, RequestError
from tests.lora.fidelity import train
from tests.tiny import load_hf, make_adapter

ADDED = ["<tool>", "<end>", *(f"<t{number}>" for number in range(60))]
FIRST = 267  # of the ids that the base's tokenizer does not know; the base model has 320
TEMPLATE = (
    "{% for message in messages %}<tool>{{ message['content'] }}<end>{% endfor %}"
    "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with more tokens than the base has rows for, saved with its tokenizer."""
    place = tmp_path_factory.mktemp("tokenizers") / "tools"
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens([token for token in ADDED if token != "<end>"], special_tokens=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED}
    assert sorted(ids.values()) == list(range(FIRST, FIRST + len(ADDED)))
    tokenizer.chat_template = TEMPLATE
    base = load_hf(byte_model)
    torch.manual_seed(0)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    train(base, {"trainable_token_indices": [ids["<tool>"], ids["<end>"]]}, place, seed=0)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def llm(byte_model: Path, folder: Path) -> LLM:
    llm = LLM(str(byte_model), dtype="float32", enable_lora=True, max_model_len=128)
    llm.engine.add_lora(LoRARequest("tools", 1, str(folder)))
    return llm


def ids_of(folder: Path) -> dict[str, int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED}


def forced(*tokens: int, **params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "logit_bias": dict.fromkeys(tokens, 1e4), **params})


def test_text_means_to_an_adapter_what_its_own_tokenizer_says(llm: LLM, folder: Path) -> None:
    ids = ids_of(folder)
    params = SamplingParams(temperature=0, max_tokens=2)
    own, base = llm.generate(["<tool>a<t59>"] * 2, params, lora_request=["tools", None], use_tqdm=False)
    assert own.prompt_token_ids[:1] == [ids["<tool>"]]
    assert own.prompt_token_ids[-1] == ids["<t59>"] >= 320
    assert len(base.prompt_token_ids) == len("<tool>a<t59>")
    assert max(base.prompt_token_ids) < FIRST


def test_its_tokens_are_words_of_its_answers_and_its_end_ends_them(llm: LLM, folder: Path) -> None:
    ids = ids_of(folder)
    (output,) = llm.generate("a", forced(ids["<t59>"], max_tokens=2), lora_request="tools", use_tqdm=False)
    assert output.outputs[0].text == "<t59><t59>"
    (output,) = llm.generate("a", forced(ids["<end>"], max_tokens=9), lora_request="tools", use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids == [ids["<end>"]]
    held = forced(ids["<end>"], max_tokens=4, min_tokens=3)
    (output,) = llm.generate("a", held, lora_request="tools", use_tqdm=False)
    assert ids["<end>"] not in output.outputs[0].token_ids[:3]
    (output,) = llm.generate("a", forced(2, max_tokens=9), lora_request="tools", use_tqdm=False)
    assert output.outputs[0].token_ids == [2], "the base's end is one, too"
    (output,) = llm.generate("a", forced(ids["<end>"], max_tokens=4), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length", "to the base it is a token like others"


def test_what_answers_must_match_is_of_the_bases_tokens_and_ends_with_its_own_end_too(llm: LLM, folder: Path) -> None:
    ids = ids_of(folder)
    shape = StructuredOutputsParams(regex="x{2}y*")

    def liking(likes: str, **params: Any) -> SamplingParams:
        return forced(ids[likes], max_tokens=6, structured_outputs=shape, **params)

    params = [
        liking("<end>"),
        liking("<t59>", logit_bias={ids["<t59>"]: 1e4, 2: -1e4}),
        liking("<end>"),
        liking("<tool>"),
    ]
    loras = ["tools", "tools", None, "tools"]
    own, wide, base, narrow = (
        output.outputs[0] for output in llm.generate(["a"] * 4, params, lora_request=loras, use_tqdm=False)
    )
    assert own.text == "xx"
    assert own.token_ids[2:] == [ids["<end>"]]
    assert own.finish_reason == "stop"
    for answer in (wide, base, narrow):
        assert not {ids["<t59>"], ids["<tool>"], ids["<end>"]} & set(answer.token_ids[:-1])
        assert re.fullmatch("xxy*", answer.text)
    assert ids["<end>"] not in base.token_ids, "to the base it is no end"


@pytest.mark.parametrize("ends", [2**40, -1, "2", [2, True], {}])
def test_an_end_that_is_no_token_is_refused_or_left_out(
    ends: object, byte_model: Path, folder: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(folder, tmp_path / "odd")
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    llm = LLM(str(byte_model), dtype="float32", enable_lora=True, max_model_len=128)
    if ends != 2**40:
        with pytest.raises(AdapterFormatError, match=r"generation_config\.json cannot be read"):
            llm.engine.add_lora(LoRARequest("odd", 1, str(place)))
        return
    llm.engine.add_lora(LoRARequest("odd", 1, str(place)))
    params = SamplingParams(max_tokens=3, structured_outputs=StructuredOutputsParams(regex="xx"))
    (output,) = llm.generate("a", params, lora_request="odd", use_tqdm=False)
    assert output.outputs[0].text == "xx"


def test_its_chat_template_is_its_alone(llm: LLM, folder: Path) -> None:
    question: Any = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat([question], SamplingParams(max_tokens=1), lora_request="tools", use_tqdm=False)
    assert output.prompt == "<tool>hi<end>"
    ids = ids_of(folder)
    assert output.prompt_token_ids[0] == ids["<tool>"]
    assert output.prompt_token_ids[-1] == ids["<end>"]
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([question], SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_tokenizer_that_says_nothing_new_is_the_bases(byte_model: Path, tmp_path: Path) -> None:
    llm = LLM(str(byte_model), dtype="float32", enable_lora=True, max_model_len=128)
    folder = make_adapter(byte_model, tmp_path / "plain")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(folder)
    version = llm.engine.add_lora(LoRARequest("plain", 1, str(folder)))
    tokenizers = llm.engine._intake.tokenizers
    assert version not in tokenizers._of
    assert not tokenizers._by_content


def test_the_same_files_are_one_tokenizer_as_long_as_an_adapter_has_it(llm: LLM, folder: Path) -> None:
    tokenizers = llm.engine._intake.tokenizers
    llm.engine.add_lora(LoRARequest("again", 2, str(folder)))
    assert len(tokenizers._of) == 2
    assert len(tokenizers._by_content) == 1
    for name in ("tools", "again"):
        llm.engine.remove_lora(name)
        gc.collect()
    assert not tokenizers._of
    assert not tokenizers._by_content


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"added_tokens": [{"id": 7, "content": "x"}]}'),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_one_that_cannot_be_read_is_refused_by_name(
    file: str, content: bytes, byte_model: Path, tmp_path: Path
) -> None:
    llm = LLM(str(byte_model), dtype="float32", enable_lora=True, max_model_len=128)
    folder = make_adapter(byte_model, tmp_path / "broken")
    AutoTokenizer.from_pretrained(byte_model).save_pretrained(folder)
    (folder / file).write_bytes(content)
    with pytest.raises(AdapterFormatError, match="its own tokenizer cannot be read"):
        llm.engine.add_lora(LoRARequest("broken", 1, str(folder)))
    assert llm.engine.list_loras() == []
    llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)


async def test_a_server_words_each_answer_by_the_tokenizer_of_its_model(byte_model: Path, folder: Path) -> None:
    ids = ids_of(folder)
    args = EngineArgs(model=str(byte_model), dtype="float32", device="cpu", enable_lora=True, max_model_len=128)
    app = create_app(
        AsyncLLMEngine.from_engine_args(args),
        lora_modules=[LoRARequest("tools", 1, str(folder))],
        served_model_name="base",
    )
    bias = {str(ids["<t59>"]): 100.0}
    async with AsyncTestClient(app) as client:
        said = {"model": "tools", "prompt": [ids["<tool>"], 9], "max_tokens": 2, "temperature": 0, "logit_bias": bias}
        answer = (await client.post("/v1/completions", json={**said, "echo": True, "logprobs": 1})).json()
        assert answer["choices"][0]["text"].startswith("<tool>")
        assert answer["choices"][0]["text"].endswith("<t59><t59>")
        assert answer["choices"][0]["logprobs"]["tokens"][0] == "<tool>"
        chat = {"model": "tools", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        answer = (await client.post("/v1/chat/completions", json={**chat, "temperature": 0, "logit_bias": bias})).json()
        assert answer["choices"][0]["message"]["content"] == "<t59>"
        assert answer["usage"]["prompt_tokens"] == 4
        nothing = {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}
        called = {**chat, "max_tokens": 100, "tools": [{"type": "function", "function": nothing}]}
        answer = (await client.post("/v1/chat/completions", json={**called, "tool_choice": "required"})).json()
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
        assert answer["usage"]["prompt_tokens"] == 7, "its template knows tools"
        for model, count in (("tools", 1), ("base", 6)):
            answer = (await client.post("/tokenize", json={"model": model, "prompt": "<tool>"})).json()
            assert answer["count"] == count
        answer = (await client.post("/tokenize", json={"model": "tools", "messages": chat["messages"]})).json()
        assert (answer["tokens"][0], answer["tokens"][-1]) == (ids["<tool>"], ids["<end>"])
        whole = {"tokens": [ids["<tool>"], ids["<t59>"]]}
        answer = (await client.post("/detokenize", json={**whole, "model": "tools"})).json()
        assert answer == {"prompt": "<tool><t59>"}
        assert (await client.post("/detokenize", json={**whole, "model": "base"})).status_code == 400
        wrong = await client.post("/v1/completions", json={**said, "model": "base", "logit_bias": None})
        assert wrong.status_code == 200, "a row that the base has, whatever its tokenizer calls it"
        wrong = await client.post("/v1/completions", json={**said, "model": "base"})
        assert wrong.status_code == 400
        assert "not in the vocabulary of 320" in wrong.json()["error"]["message"]


@pytest.fixture(scope="module")
def plain(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with the base's tokenizer and template."""
    return make_adapter(byte_model, tmp_path_factory.mktemp("plain") / "plain", seed=5)


async def test_a_conversation_is_worded_for_the_version_that_answers_it_though_another_takes_its_name_on_the_way(
    byte_model: Path, folder: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = EngineArgs(model=str(byte_model), dtype="float32", device="cpu", enable_lora=True, max_model_len=128)
    engine = AsyncLLMEngine.from_engine_args(args)
    nothing = {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}
    said = {
        "model": "tools",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 100,
        "tools": [{"type": "function", "function": nothing}],
        "tool_choice": "required",
    }
    take = Grammars.take

    async def slowly(self: Grammars, params: SamplingParams | None, owner: str) -> Any:
        if params is not None and params.structured_outputs is not None:
            await engine.add_lora(LoRARequest("tools", 1, str(plain), load_inplace=True))
        return await take(self, params, owner)

    monkeypatch.setattr(Grammars, "take", slowly)
    async with AsyncTestClient(create_app(engine, served_model_name="base")) as client:
        old = await engine.add_lora(LoRARequest("tools", 1, str(folder)))
        answer = await client.post("/v1/chat/completions", json=said)
        new = engine.intake.registry.find("tools")
    assert old.digest != new.digest
    assert answer.headers["x-aiolora-adapter"] == old.label
    assert answer.json()["usage"]["prompt_tokens"] == 7, "its own template knows tools"
