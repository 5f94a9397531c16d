"""POST /tokenize and /detokenize, and the route that no model here can answer."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import BASE

HI: list[Any] = [{"role": "user", "content": "Hi"}]


async def test_a_text_becomes_tokens_and_the_tokens_a_text(http: httpx.AsyncClient) -> None:
    for model in (BASE, "sql", None):
        said = {"model": model, "prompt": "Tell me, café", "return_token_strs": True}
        body = (await http.post("/tokenize", json=said)).json()
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["token_strs"][1] == "Ġme"
        assert body["max_model_len"] == 1024
        back = (await http.post("/detokenize", json={"model": model, "tokens": body["tokens"]})).json()
        assert back == {"prompt": "Tell me, café"}
    assert (await http.post("/tokenize", json={"prompt": "a"})).json()["token_strs"] is None


async def test_a_conversation_has_as_many_tokens_as_chat_counts(http: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for more in ({}, {"tools": [tool]}, {"add_generation_prompt": False}):
        counted = (await http.post("/tokenize", json={"model": BASE, "messages": HI, **more})).json()["count"]
        chat = {"model": BASE, "messages": HI, "max_tokens": 1, **more}
        assert (await http.post("/v1/chat/completions", json=chat)).json()["usage"]["prompt_tokens"] == counted


async def test_a_message_may_be_continued(http: httpx.AsyncClient) -> None:
    said = {"messages": [*HI, {"role": "assistant", "content": "Well then,"}], "continue_final_message": True}
    tokens = (await http.post("/tokenize", json=said)).json()["tokens"]
    assert (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"].endswith("assistant\nWell then,")


@pytest.mark.parametrize(
    ("path", "said", "status", "param"),
    [
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"prompt": 1}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/detokenize", {"tokens": [49152]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
        ("/v1/embeddings", {"model": BASE, "input": "x"}, 404, None),
    ],
)
async def test_what_is_wrong_is_told(
    http: httpx.AsyncClient, path: str, said: dict[str, Any], status: int, param: str | None
) -> None:
    response = await http.post(path, json=said)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
