"""POST /v1/chat/completions, through OpenAI's own client."""

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.api.conftest import BASE

CAT: list[Any] = [{"role": "user", "content": "Tell me about a cat."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6}


async def chunks_of(client: AsyncOpenAI, **said: Any) -> list[ChatCompletionChunk]:
    return [chunk async for chunk in await client.chat.completions.create(stream=True, **said)]


@pytest.mark.parametrize("model", [BASE, "pirate"])
async def test_a_stream_brings_the_same_answer_as_the_whole(client: AsyncOpenAI, model: str) -> None:
    whole = await client.chat.completions.create(model=model, messages=CAT, **GREEDY)
    chunks = await chunks_of(client, model=model, messages=CAT, **GREEDY)
    assert whole.model == model
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_adapter_answers_otherwise_than_the_base(client: AsyncOpenAI) -> None:
    base, pirate = [
        (await client.chat.completions.create(model=model, messages=CAT, **GREEDY)).choices[0].message.content
        for model in (BASE, "pirate")
    ]
    assert base != pirate
    assert pirate is not None
    assert pirate.startswith("Aye")


async def test_chunks_go_role_then_content_then_end_then_usage(client: AsyncOpenAI) -> None:
    chunks = await chunks_of(client, model=BASE, messages=CAT, stream_options={"include_usage": True}, **GREEDY)
    first, *content, end, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert len(content) == 6, "one chunk a token"
    assert all(chunk.choices[0].delta.role is None and chunk.choices[0].finish_reason is None for chunk in content)
    assert end.choices[0].delta.content is None
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.completion_tokens, usage.usage.total_tokens - usage.usage.prompt_tokens) == (6, 6)
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_stream_says_nothing_of_usage_unless_asked(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={"model": BASE, "messages": CAT, "stream": True, **GREEDY})
    assert "usage" not in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


async def test_n_answers_have_an_index_each(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {"model": BASE, "messages": CAT, "n": 3, "max_tokens": 4, "temperature": 1, "seed": 7}
    whole = await client.chat.completions.create(**said)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    texts = ["", "", ""]
    for chunk in await chunks_of(client, **said):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1, "three seeds"


async def test_content_may_come_in_text_parts_and_developer_is_system(client: AsyncOpenAI) -> None:
    plain: list[Any] = [{"role": "system", "content": "Be brief."}, *CAT]
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": CAT[0]["content"]}]},
    ]
    answers = [await client.chat.completions.create(model=BASE, messages=sent, **GREEDY) for sent in (plain, parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage == answers[1].usage


async def test_logprobs_come_a_token_with_the_likeliest_best_first(client: AsyncOpenAI) -> None:
    said: dict[str, Any] = {"model": BASE, "messages": CAT, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = (await client.chat.completions.create(**said)).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert "".join(token.token for token in content) == whole.message.content
    for token in content:
        assert token.bytes == list(token.token.encode())
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True)
    streamed = [
        token
        for chunk in await chunks_of(client, **said)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-3)


async def test_logprobs_without_top_logprobs_name_only_the_token(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=BASE, messages=CAT, logprobs=True, **GREEDY)
    assert answer.choices[0].logprobs is not None
    assert [token.top_logprobs for token in answer.choices[0].logprobs.content or []] == [[]] * 6


async def test_max_completion_tokens_counts_before_max_tokens(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=BASE, messages=CAT, max_tokens=9, max_completion_tokens=2, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


async def test_without_a_limit_an_answer_may_fill_the_context(client: AsyncOpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "a " * 980}]
    answer = await client.chat.completions.create(
        model=BASE, messages=long, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024


async def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="pirate", messages=CAT, temperature=0, max_tokens=12)
    text = whole.choices[0].message.content or ""
    stop = text.split(" ")[3]
    stopped = await client.chat.completions.create(
        model="pirate", messages=CAT, temperature=0, max_tokens=12, stop=[stop, "never"]
    )
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra == {"stop_reason": stop}
    chunks = await chunks_of(client, model="pirate", messages=CAT, temperature=0, max_tokens=12, stop=stop)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_seed_makes_sampling_repeatable(client: AsyncOpenAI) -> None:
    async def text(seed: int) -> str | None:
        answer = await client.chat.completions.create(
            model=BASE, messages=CAT, temperature=1.5, max_tokens=8, seed=seed
        )
        return answer.choices[0].message.content

    assert await text(1) == await text(1)
    assert len({await text(seed) for seed in (1, 2, 3)}) > 1


async def test_a_response_names_its_adapter_and_the_bytes_of_it(http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        said = {"messages": CAT, "stream": stream, **GREEDY}
        header = (await http.post("/v1/chat/completions", json={"model": "sql", **said})).headers["x-aiolora-adapter"]
        name, digest = header.split("@")
        assert name == "sql"
        assert len(digest) == 12
        base = await http.post("/v1/chat/completions", json={"model": BASE, **said})
        assert "x-aiolora-adapter" not in base.headers


async def test_empty_tools_and_text_format_ask_for_nothing(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=BASE,
        messages=CAT,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        user="me",
        metadata={"a": "b"},
        extra_body={"parallel_tool_calls": True, "unheard_of": {"x": [1]}},
        **GREEDY,
    )
    assert answer.choices[0].message.content


async def test_bodies_have_the_shape_of_openais_models(http: httpx.AsyncClient) -> None:
    said = {"model": "json", "messages": CAT, "logprobs": True, "top_logprobs": 1, **GREEDY}
    body = (await http.post("/v1/chat/completions", json=said)).json()
    ChatCompletion.model_validate(body)
    assert {"id", "object", "created", "model", "choices", "usage"} <= set(body)
    assert {"index", "message", "logprobs", "finish_reason", "stop_reason"} <= set(body["choices"][0])
    assert {"role", "content", "refusal"} <= set(body["choices"][0]["message"])
    stream = await http.post(
        "/v1/chat/completions", json={**said, "stream": True, "stream_options": {"include_usage": True}}
    )
    frames = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert frames.pop() == "[DONE]"
    for frame in frames:
        ChatCompletionChunk.model_validate_json(frame)
