"""POST /v1/completions: prompts of every form, and what evaluation tools read from them."""

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types import Completion

from aiolora.api import scores
from tests.api.conftest import BASE

FRANCE = "The capital of France is"
GREEDY: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 4}


async def streamed(client: AsyncOpenAI, **said: Any) -> tuple[dict[int, str], list[Completion]]:
    """Texts by choice, and all chunks."""
    texts: dict[int, str] = {}
    chunks = [chunk async for chunk in await client.completions.create(stream=True, **said)]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts, chunks


@pytest.mark.parametrize("model", [BASE, "sql"])
async def test_a_stream_brings_the_same_text_as_the_whole(client: AsyncOpenAI, model: str) -> None:
    whole = await client.completions.create(prompt=FRANCE, **{**GREEDY, "model": model})
    texts, chunks = await streamed(client, prompt=FRANCE, **{**GREEDY, "model": model})
    assert texts == {0: whole.choices[0].text}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert " Paris" in whole.choices[0].text


async def test_a_prompt_counts_once_and_every_answer_counts(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(prompt=FRANCE, n=2, **GREEDY)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)


async def test_sixteen_tokens_are_the_default(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=BASE, prompt=FRANCE, temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_token_ids_are_a_prompt_as_their_text_is(client: AsyncOpenAI) -> None:
    by_text = await client.completions.create(prompt=FRANCE, **GREEDY)
    ids = [504, 3575, 282, 4649, 314]
    by_ids = await client.completions.create(prompt=ids, **GREEDY)
    assert by_ids.choices[0].text == by_text.choices[0].text
    several = await client.completions.create(prompt=[ids, ids[:2]], **GREEDY)
    assert several.choices[0].text == by_text.choices[0].text
    echoed = await client.completions.create(prompt=ids, echo=True, **GREEDY)
    assert echoed.choices[0].text == FRANCE + by_text.choices[0].text


async def test_several_prompts_have_their_choices_in_order(client: AsyncOpenAI) -> None:
    prompts = [FRANCE, "One, two, three,"]
    alone = [(await client.completions.create(prompt=prompt, **GREEDY)).choices[0].text for prompt in prompts]
    together = await client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    expected = [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.text for choice in together.choices] == expected
    texts, chunks = await streamed(client, prompt=prompts, n=2, stream_options={"include_usage": True}, **GREEDY)
    assert [texts[index] for index in range(4)] == expected
    assert chunks[-1].choices == []
    assert chunks[-1].usage == together.usage


async def test_echo_puts_the_prompt_before_the_text(client: AsyncOpenAI) -> None:
    plain = await client.completions.create(prompt=FRANCE, **GREEDY)
    echoed = await client.completions.create(prompt=FRANCE, echo=True, **GREEDY)
    assert echoed.choices[0].text == FRANCE + plain.choices[0].text
    texts, _ = await streamed(client, prompt=FRANCE, echo=True, **GREEDY)
    assert texts[0] == echoed.choices[0].text


async def test_a_prompt_can_be_scored_without_writing(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {"model": BASE, "prompt": FRANCE + " Paris", "max_tokens": 0, "echo": True, "logprobs": 2}
    answer = await client.completions.create(temperature=0, **said)
    [choice] = answer.choices
    assert choice.text == FRANCE + " Paris"
    assert choice.finish_reason == "length"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [0, 3, 11, 14, 21, 24]
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[-1][" Paris"] == logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 0)
    _, [chunk] = await streamed(client, **said)
    assert chunk.choices[0].text == choice.text
    assert chunk.choices[0].logprobs is not None
    assert chunk.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs, abs=1e-3)


async def test_echoed_logprobs_go_on_into_the_answer(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {"prompt": FRANCE, "echo": True, "logprobs": 1, **GREEDY}
    [choice] = (await client.completions.create(**said)).choices
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert len(tokens) == 9
    assert [choice.text[offset : offset + len(token)] for offset, token in zip(offsets, tokens)] == tokens
    _, chunks = await streamed(client, **said)
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for piece in pieces if piece for token in piece.tokens or []] == tokens
    assert [offset for piece in pieces if piece for offset in piece.text_offset or []] == offsets


async def test_logprobs_of_the_answer_are_four_lists_of_one_length(client: AsyncOpenAI) -> None:
    [choice] = (await client.completions.create(prompt=FRANCE, logprobs=3, **GREEDY)).choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert [len(values or []) for values in (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset)] == [4] * 3
    for token, value, top in zip(logprobs.tokens or [], logprobs.token_logprobs or [], logprobs.top_logprobs or []):
        assert len(top) == 3
        assert top[token] == value == max(top.values())


async def test_more_scores_of_prompts_than_fit_into_an_answer_are_refused(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "MAX_SCORED", 11)
    said = {"prompt": [504, 3575], "prompt_logprobs": 2, **GREEDY}
    assert (await http.post("/v1/completions", json=said)).status_code == 200
    for more, param in (({"n": 2}, "prompt_logprobs"), ({"prompt": [[504, 3575]] * 2}, "prompt_logprobs")):
        answer = await http.post("/v1/completions", json=said | more)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert "at most 11" in answer.json()["error"]["message"]
    talk = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 2, **GREEDY}
    answer = await http.post("/v1/chat/completions", json=talk)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


async def test_prompt_logprobs_come_by_token_id(http: httpx.AsyncClient) -> None:
    said = {"prompt": [504, 3575], "prompt_logprobs": 1, **GREEDY}
    [choice] = (await http.post("/v1/completions", json=said)).json()["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["3575"]["decoded_token"] == " capital"
    assert {entry["rank"] for entry in second.values()} >= {1}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0, **GREEDY}
    body = (await http.post("/v1/chat/completions", json=chat)).json()
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


async def test_a_stop_string_may_be_kept(client: AsyncOpenAI) -> None:
    stopped = await client.completions.create(prompt=FRANCE, stop=" Paris", **GREEDY)
    kept = await client.completions.create(
        prompt=FRANCE, stop=" Paris", extra_body={"include_stop_str_in_output": True}, **GREEDY
    )
    assert (stopped.choices[0].text, kept.choices[0].text) == ("", " Paris")
    assert stopped.choices[0].finish_reason == kept.choices[0].finish_reason == "stop"


async def test_a_stop_token_ends_the_answer(http: httpx.AsyncClient) -> None:
    paris = 7042
    said = {"prompt": FRANCE, "stop_token_ids": [paris], **GREEDY}
    [choice] = (await http.post("/v1/completions", json=said)).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", paris)


async def test_a_bias_makes_a_token_come(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(prompt=FRANCE, logit_bias={"504": 100}, **GREEDY)
    assert answer.choices[0].text == "The" * 4


async def test_a_seed_makes_sampling_repeatable_with_every_knob(client: AsyncOpenAI) -> None:
    async def text(seed: int) -> str:
        answer = await client.completions.create(
            model="pirate",
            prompt=FRANCE,
            max_tokens=6,
            temperature=1.5,
            top_p=0.95,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            seed=seed,
            user="me",
            extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
        )
        return answer.choices[0].text

    assert await text(5) == await text(5)
    assert len({await text(seed) for seed in (5, 6, 7)}) > 1


async def test_fields_that_are_null_or_unknown_say_nothing(http: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(["stop", "logprobs", "n", "seed", "suffix", "best_of", "stream_options", "logit_bias"])
    response = await http.post("/v1/completions", json={"prompt": FRANCE, "unheard_of": [{}], **nulls, **GREEDY})
    assert response.status_code == 200


async def test_the_body_has_the_shape_of_openais_model(http: httpx.AsyncClient) -> None:
    body = (await http.post("/v1/completions", json={"prompt": FRANCE, "logprobs": 1, **GREEDY})).json()
    Completion.model_validate(body)
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)
    assert {"index", "text", "logprobs", "finish_reason", "stop_reason"} <= set(body["choices"][0])
    assert {"tokens", "token_logprobs", "top_logprobs", "text_offset"} == set(body["choices"][0]["logprobs"])
