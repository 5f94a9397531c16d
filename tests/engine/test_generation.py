"""What a request may ask for, through the public faces, on models that are tiny or know one text by heart."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from aiolora import LLM, AsyncLLMEngine, EngineArgs, LLMEngine, RequestOutput, SamplingParams, TokenOutput
from aiolora.errors import RequestError
from aiolora.tokenizer import Tokenizer
from aiolora.types import CompletionOutput, Prompt
from tests.conftest import ModelOf
from tests.tiny import EOS, VOCAB, Loaded, byte_tokenizer, hf_logits, load_hf, make_reciter, prompt_ids

TEXT = "Wordy sample:😀é日!"
START = "W"
REST = TEXT[1:]
TOKENS = byte_tokenizer().encode(TEXT).ids[1:]


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reciter(tmp_path_factory.mktemp("reciter"), TEXT)


@pytest.fixture(scope="module")
def reciter(reciting: Path) -> LLM:
    return LLM(str(reciting), dtype="float32", max_model_len=64)


@pytest.fixture(scope="module")
def talker(byte_model: Path) -> LLM:
    """A model of random weights over bytes."""
    return LLM(str(byte_model), dtype="float32")


@pytest.fixture(scope="module")
def small(model_of: ModelOf) -> LLM:
    """A model of so few tokens that logprobs may ask for all."""
    return LLM(str(model_of("llama")), dtype="float32")


def recite(llm: LLM, prompt: Prompt = START, *, temperature: float = 0, **params: object) -> CompletionOutput:
    return one(llm, prompt, SamplingParams(temperature=temperature, **params)).outputs[0]  # type: ignore[arg-type]


def one(llm: LLM, prompt: Prompt, params: SamplingParams) -> RequestOutput:
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    return output


# ---- how an answer ends ----


def test_eos_ends_an_answer_and_is_no_text(reciter: LLM) -> None:
    answer = recite(reciter)
    assert answer.text == REST
    assert answer.token_ids == [*TOKENS, EOS]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)


def test_max_tokens_ends_an_answer_by_length(reciter: LLM) -> None:
    answer = recite(reciter, max_tokens=3)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (REST[:3], "length", None)
    assert answer.token_ids == TOKENS[:3]


def test_eos_as_the_last_allowed_token_is_a_stop(reciter: LLM) -> None:
    assert recite(reciter, max_tokens=len(TOKENS) + 1).finish_reason == "stop"
    assert recite(reciter, max_tokens=len(TOKENS)).finish_reason == "length"


def test_without_max_tokens_an_answer_goes_to_the_end_of_the_context(reciter: LLM) -> None:
    answer = recite(reciter, ignore_eos=True)
    assert len(answer.token_ids) == 64 - 1
    assert answer.finish_reason == "length"


def test_ignore_eos_goes_on_behind_it(reciter: LLM) -> None:
    answer = recite(reciter, ignore_eos=True, max_tokens=len(TOKENS) + 4)
    assert answer.token_ids[: len(TOKENS) + 1] == [*TOKENS, EOS]
    assert len(answer.token_ids) == len(TOKENS) + 4
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (["y sam"], "ord", "y sam"),
        (["o"], "", "o"),
        (["!"], "ordy sample:😀é日", "!"),
        (["ple:", "y sample", "zzz"], "ord", "y sample"),
        (["sample", "y s"], "ord", "y s"),
        (["😀"], "ordy sample:", "😀"),
        (["é日"], "ordy sample:😀", "é日"),
        (":😀é", "ordy sample", ":😀é"),
        (["a", "am", "amp"], "ordy s", "a"),
    ],
)
def test_a_stop_string_ends_an_answer_wherever_tokens_begin(
    stop: list[str] | str, text: str, reason: str, reciter: LLM
) -> None:
    answer = recite(reciter, stop=stop)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text, "stop", reason)
    kept = recite(reciter, stop=stop, include_stop_str_in_output=True)
    assert (kept.text, kept.stop_reason) == (text + reason, reason)
    assert answer.token_ids == kept.token_ids == TOKENS[: len(answer.token_ids)]


def test_a_stop_string_that_only_begins_is_text(reciter: LLM) -> None:
    assert recite(reciter, stop=["sample?", "!!", "日!x"]).text == REST
    assert recite(reciter, stop=["sample?"], max_tokens=8).text == "ordy sam"


def test_a_stop_string_of_the_prompt_does_not_count(reciter: LLM) -> None:
    assert recite(reciter, stop=["W"]).text == REST
    assert recite(reciter, stop=["Wo"]).text == REST


def test_stop_tokens_end_an_answer_and_are_text_only_where_asked_for(reciter: LLM) -> None:
    token = TOKENS[4]
    answer = recite(reciter, stop_token_ids=[token, TOKENS[6]])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("ordy", "stop", token)
    assert answer.token_ids == TOKENS[:5]
    assert recite(reciter, stop_token_ids=[token], include_stop_str_in_output=True).text == "ordy "


def test_a_stop_token_within_a_character_leaves_its_bytes_as_a_replacement(reciter: LLM) -> None:
    (_, second, _) = byte_tokenizer().encode("😀").ids
    assert recite(reciter, stop_token_ids=[second]).text == "ordy sample:\ufffd"


def test_min_tokens_puts_off_every_end(reciter: LLM) -> None:
    assert recite(reciter, stop=["r"], min_tokens=2, max_tokens=6).text == "o"
    assert recite(reciter, stop=["r"], min_tokens=3, max_tokens=6).text == "ordy s"
    early = recite(reciter, "!", min_tokens=5, max_tokens=9)
    assert EOS not in early.token_ids[:5]
    assert len(early.token_ids) >= 5
    first = TOKENS[0]
    answer = recite(reciter, stop_token_ids=[first], min_tokens=3, max_tokens=9)
    assert first not in answer.token_ids[:3]


def test_min_tokens_with_nothing_to_forbid_is_harmless(reciter: LLM) -> None:
    assert recite(reciter, min_tokens=4, ignore_eos=True, max_tokens=5).text == REST[:5]


# ---- text as it comes ----


def steps(engine: LLMEngine, prompt: Prompt, params: SamplingParams) -> list[str]:
    """The text of a request after every step."""
    engine.add_request("a", prompt, params)
    seen = []
    while engine.has_unfinished_requests():
        seen += [output.outputs[0].text for output in engine.step()]
    return seen


def test_text_that_may_become_a_stop_string_is_held_back(reciter: LLM) -> None:
    seen = steps(reciter.engine, START, SamplingParams(temperature=0, stop=["y same", "ple!", "é"]))
    held, shown = ["ord"] * 5 + ["ordy sam"] * 3, ["ordy sample:"] * 3 + ["ordy sample:😀"] * 2
    assert seen == ["o", "or", "ord", *held, *shown]


def test_no_half_character_is_ever_shown(reciter: LLM) -> None:
    seen = steps(reciter.engine, START, SamplingParams(temperature=0))
    assert not any("\ufffd" in text for text in seen)
    assert seen[-1] == REST
    assert len(seen) == len(TOKENS) + 1, "an output a token"


async def test_the_texts_of_a_stream_join_to_the_answer(reciting: Path) -> None:
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model=str(reciting), dtype="float32")) as engine:

        async def stream(**params: object) -> list[TokenOutput]:
            chosen = SamplingParams(temperature=0, **params)  # type: ignore[arg-type]
            return [token async for token in engine.stream(START, chosen)]

        whole = await stream()
        assert "".join(token.text for token in whole) == REST
        assert [token.token_id for token in whole] == [*TOKENS, EOS]
        assert [token.finish_reason for token in whole] == [None] * len(TOKENS) + ["stop"]
        assert [token.text for token in whole[12:15]] == ["", "", "😀"], "its first two bytes are one token"
        stopped = await stream(stop=["ple:😀"])
        assert "".join(token.text for token in stopped) == "ordy sam"
        assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", "ple:😀")
        kept = await stream(stop=["ple:😀"], include_stop_str_in_output=True)
        assert "".join(token.text for token in kept) == "ordy sample:😀"
        cut = await stream(max_tokens=13)
        assert "".join(token.text for token in cut) == "ordy sample:\ufffd", "at the end nothing is held back"
        started = await stream(stop=["sample!"], max_tokens=8)
        assert "".join(token.text for token in started) == "ordy sam"


def test_a_prompt_that_ends_within_a_character_is_not_repeated(reciter: LLM) -> None:
    ids = byte_tokenizer().encode("ab:😀").ids
    assert recite(reciter, ids[:-1], max_tokens=2).text == "😀é"
    assert recite(reciter, ids[:-2], max_tokens=3).text == "😀é"
    assert recite(reciter, "x\ufffdW", max_tokens=2).text == "or"


def test_a_prompt_that_ends_with_a_replacement_character_is_not_repeated(byte_model: Path) -> None:
    tokenizer = Tokenizer(byte_model)
    stream = tokenizer.stream(tokenizer.encode("ab \ufffd"))
    assert [stream.push(token) for token in tokenizer.encode("cd")] == ["c", "d"]


def test_pieces_join_to_the_whole_text_for_any_tokens(byte_model: Path) -> None:
    tokenizer, chance = Tokenizer(byte_model), random.Random(0)
    prompt = tokenizer.encode("and the")
    for number in range(1500):
        if number % 3 == 0:
            ids = [chance.randrange(267) for _ in range(chance.randrange(1, 16))]  # any bytes, special tokens too
        else:
            ids = tokenizer.encode("".join(chance.choice("é😀日👨‍👩‍👧a \ufffd\n") for _ in range(6)))
        for skip in (True, False):
            stream = tokenizer.stream(prompt, skip_special=skip)
            pieces = [stream.push(token) for token in ids]
            assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)
            assert stream.flush() == ""


def test_special_tokens_are_text_only_where_asked_for(reciter: LLM) -> None:
    bias = {1: 100.0}
    assert recite(reciter, logit_bias=bias, max_tokens=2).text == ""
    assert recite(reciter, logit_bias=bias, max_tokens=2, skip_special_tokens=False).text == "<s><s>"


# ---- choosing tokens ----


def test_greedy_answers_are_those_of_transformers(talker: LLM, byte_model: Path) -> None:
    model = load_hf(byte_model)
    prompts: list[Prompt] = [prompt_ids(number, 5 + 9 * number, 267) for number in range(5)]
    for repetition in (1.0, 1.4):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=repetition)
        for output in talker.generate(prompts, params, use_tqdm=False):
            assert output.outputs[0].token_ids == hf_greedy(model, output.prompt_token_ids, repetition)


def hf_greedy(model: nn.Module, prompt: list[int], repetition: float) -> list[int]:
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        repetition_penalty=repetition,
        max_new_tokens=20,
        min_new_tokens=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in generated[0, len(prompt) :]]


def test_a_seed_gives_the_same_tokens_whoever_is_in_the_batch(talker: LLM, byte_model: Path) -> None:
    prompt = prompt_ids(1, 12, 267)
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=42, max_tokens=25, ignore_eos=True)
    alone = one(talker, prompt, params).outputs[0].token_ids
    others: list[Prompt] = [prompt_ids(number, 3 + 4 * number, 267) for number in range(2, 8)]
    mates = [SamplingParams(temperature=0.1 * number, seed=number, max_tokens=30) for number in range(6)]
    for place in (0, 3, 6):
        prompts, several = [*others], [*mates]
        prompts.insert(place, prompt)
        several.insert(place, params)
        outputs = talker.generate(prompts, several, use_tqdm=False)
        assert outputs[place].outputs[0].token_ids == alone
    chunked = LLM(str(byte_model), dtype="float32", max_num_batched_tokens=5, max_num_seqs=5)
    assert one(chunked, prompt, params).outputs[0].token_ids == alone
    changed = SamplingParams(temperature=1.2, top_p=0.95, seed=43, max_tokens=25, ignore_eos=True)
    assert one(talker, prompt, changed).outputs[0].token_ids != alone


def test_without_a_seed_answers_differ_and_the_engines_seed_repeats_them(byte_model: Path) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def twice(seed: int) -> list[list[int]]:
        llm = LLM(str(byte_model), dtype="float32", seed=seed)
        return [one(llm, "the", params).outputs[0].token_ids for _ in range(2)]

    first = twice(1)
    assert first[0] != first[1]
    assert twice(1) == first
    assert twice(2) != first


def test_n_answers_differ_repeat_by_seed_and_share_their_prompt(talker: LLM) -> None:
    params = SamplingParams(n=5, seed=7, max_tokens=10, ignore_eos=True, logprobs=1)
    output = one(talker, "the thing and the", params)
    answers = [answer.token_ids for answer in output.outputs]
    assert [answer.index for answer in output.outputs] == list(range(5))
    assert len({tuple(answer) for answer in answers}) == 5
    assert [answer.token_ids for answer in one(talker, "the thing and the", params).outputs] == answers
    single = SamplingParams(seed=7, max_tokens=10, ignore_eos=True)
    assert one(talker, "the thing and the", single).outputs[0].token_ids == answers[0]


def test_of_n_answers_each_ends_by_itself(reciter: LLM) -> None:
    params = SamplingParams(n=3, temperature=0, stop=["sam"])
    output = one(reciter, START, params)
    assert [(answer.text, answer.finish_reason) for answer in output.outputs] == [("ordy ", "stop")] * 3
    assert output.finished


def test_logit_bias_forces_and_forbids(reciter: LLM, talker: LLM) -> None:
    assert recite(reciter, logit_bias={70: 100.0}, max_tokens=4).token_ids == [70] * 4
    forbidden = recite(reciter, logit_bias={TOKENS[0]: -100.0}, max_tokens=1)
    assert forbidden.token_ids != TOKENS[:1]
    only = {70: 80.0, 71: 80.0, 72: 80.0}
    sampled = one(talker, "the", SamplingParams(temperature=4, logit_bias=only, max_tokens=60, seed=3, ignore_eos=True))
    assert set(sampled.outputs[0].token_ids) == set(only)


def test_truncation_to_one_token_is_greedy(talker: LLM) -> None:
    greedy = one(talker, "the", SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)).outputs[0].token_ids
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        params = SamplingParams(max_tokens=15, ignore_eos=True, seed=1, **cut)  # type: ignore[arg-type]
        assert one(talker, "the", params).outputs[0].token_ids == greedy


def test_top_k_samples_only_the_likeliest(small: LLM) -> None:
    params = SamplingParams(temperature=3, top_k=3, max_tokens=50, ignore_eos=True, seed=5, logprobs=VOCAB)
    answer = one(small, prompt_ids(0, 9), params).outputs[0]
    ranks = [top[token].rank for top, token in zip(answer.logprobs or [], answer.token_ids)]
    assert set(ranks) == {1, 2, 3}


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.6), (-0.5, 0.3)])
def test_presence_and_frequency_count_the_output_only(presence: float, frequency: float, small: LLM) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=30,
        ignore_eos=True,
        logprobs=VOCAB,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    answer = one(small, prompt_ids(0, 9), params).outputs[0]
    differs = False
    for number, top in enumerate(answer.logprobs or []):
        uses = [answer.token_ids[:number].count(token) for token in range(VOCAB)]
        scores = [top[t].logprob - frequency * uses[t] - presence * (uses[t] > 0) for t in range(VOCAB)]
        chosen = answer.token_ids[number]
        assert chosen == max(range(VOCAB), key=scores.__getitem__)
        differs |= top[chosen].rank > 1
    assert differs or presence < 0


def test_repetition_penalty_counts_prompt_and_output(small: LLM, hf_of: Callable[[str], nn.Module]) -> None:
    prompt = prompt_ids(0, 9)
    expected = hf_greedy(hf_of("llama"), prompt, 1.5)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=1.5)
    assert one(small, prompt, params).outputs[0].token_ids == expected


# ---- log-probabilities ----


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_chosen_token_and_the_likeliest_with_their_ranks(count: int, small: LLM) -> None:
    prompt = prompt_ids(4, 9)
    asked = SamplingParams(temperature=2, seed=11, max_tokens=25, ignore_eos=True, logprobs=count)
    everything = SamplingParams(temperature=2, seed=11, max_tokens=25, ignore_eos=True, logprobs=VOCAB)
    answer, whole = (one(small, prompt, params).outputs[0] for params in (asked, everything))
    assert answer.token_ids == whole.token_ids
    assert answer.logprobs is not None
    assert whole.logprobs is not None
    total = 0.0
    for token, top, table in zip(answer.token_ids, answer.logprobs, whole.logprobs):
        assert len(table) == VOCAB
        order = sorted(table, key=lambda t: -table[t].logprob)
        assert set(top) == {token, *order[:count]}
        for t, value in top.items():
            assert value.rank == order.index(t) + 1
            assert value.logprob == pytest.approx(table[t].logprob, abs=1e-5)
            assert value.decoded_token == small.engine._intake.tokenizer.decode([t])
        assert math.fsum(math.exp(value.logprob) for value in table.values()) == pytest.approx(1, abs=1e-4)
        total += top[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-4)
    assert len({top[token].rank for token, top in zip(answer.token_ids, answer.logprobs)}) > 3


def test_without_logprobs_none_are_reported(small: LLM) -> None:
    output = one(small, prompt_ids(4, 9), SamplingParams(max_tokens=3))
    assert output.outputs[0].logprobs is None
    assert output.prompt_logprobs is None


def test_logprobs_are_of_the_model_before_temperature_bias_and_penalties(
    small: LLM, model_of: ModelOf, hf_of: Callable[[str], nn.Module]
) -> None:
    prompt = prompt_ids(4, 9)
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, logprobs=0, logit_bias={5: 3.0}, presence_penalty=1.0
    )
    answer = one(small, prompt, params).outputs[0]
    rows = hf_logits(hf_of("llama"), prompt + answer.token_ids).log_softmax(-1)[len(prompt) - 1 : -1]
    for row, token, top in zip(rows, answer.token_ids, answer.logprobs or []):
        assert top[token].logprob == pytest.approx(float(row[token]), abs=1e-4)


def test_prompt_logprobs_are_whole_though_the_prefix_is_cached(model_of: ModelOf) -> None:
    llm = LLM(str(model_of("llama")), dtype="float32", max_num_batched_tokens=32)
    prompt = prompt_ids(7, 70)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    cold = one(llm, prompt, params).prompt_logprobs
    one(llm, prompt, SamplingParams(temperature=0, max_tokens=2))
    warm = one(llm, prompt, SamplingParams(n=2, temperature=0, max_tokens=2, prompt_logprobs=2)).prompt_logprobs
    assert cold is not None
    assert warm is not None
    assert len(cold) == len(warm) == 70
    assert cold[0] is warm[0] is None
    (seq,) = (loaded := Loaded.of(model_of("llama"))).sequences([prompt])
    exact = loaded.step((seq, 0, 70))[0].log_softmax(-1)
    for position, (first, second) in enumerate(zip(cold[1:], warm[1:]), start=1):
        assert first is not None
        assert second is not None
        assert set(first) == set(second) == {prompt[position], *exact[position - 1].topk(2).indices.tolist()}
        for token, value in first.items():
            assert value.logprob == pytest.approx(float(exact[position - 1, token]), abs=1e-4)
            assert second[token].logprob == pytest.approx(value.logprob, abs=1e-4)
            assert value.rank == second[token].rank == 1 + int((exact[position - 1] > exact[position - 1, token]).sum())


def test_prompt_logprobs_of_one_token_are_none(small: LLM) -> None:
    assert one(small, [5], SamplingParams(max_tokens=1, prompt_logprobs=3)).prompt_logprobs == [None]


# ---- what comes back ----


def test_a_request_output_says_what_was_asked_and_when(reciter: LLM) -> None:
    output = one(reciter, START, SamplingParams(temperature=0, max_tokens=4))
    assert output.prompt == START
    assert output.prompt_token_ids == byte_tokenizer().encode(START).ids
    assert output.finished
    assert output.lora_request is None
    assert output.adapter is None
    metrics = output.metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_a_prompt_is_text_ids_or_a_mapping_of_either(reciter: LLM) -> None:
    ids = byte_tokenizer().encode(START).ids
    prompts: list[Prompt] = [START, ids, {"prompt": START}, {"prompt_token_ids": ids}]
    outputs = reciter.generate(prompts, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["ordy"] * 4
    assert [output.prompt for output in outputs] == [START, None, START, None]
    assert len({output.request_id for output in outputs}) == 4


def test_outputs_of_steps_grow_and_end_with_the_answer(reciter: LLM) -> None:
    engine = reciter.engine
    engine.add_request("long", START, SamplingParams(temperature=0))
    engine.add_request("short", START, SamplingParams(temperature=0, max_tokens=2))
    seen: dict[str, list[RequestOutput]] = {"long": [], "short": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen[output.request_id].append(output)
    for outputs in seen.values():
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == list(range(1, len(lengths) + 1))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert seen["short"][-1].outputs[0].text == "or"
    assert seen["long"][-1].outputs[0].text == REST


def test_one_list_item_of_parameters_a_prompt_or_an_error(reciter: LLM) -> None:
    several = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 2, 3)]
    outputs = reciter.generate([START] * 3, several, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["o", "or", "ord"]
    with pytest.raises(RequestError, match="sampling_params has 3 items for 2 prompts"):
        reciter.generate([START] * 2, several, use_tqdm=False)
    assert not reciter.engine.has_unfinished_requests()
