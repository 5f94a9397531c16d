"""Images over HTTP: OpenAI's parts, default adapters, and what bad ones get."""

import asyncio
import base64
import http.server
import io
import threading
import wave
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from PIL import Image
from transformers import AutoTokenizer

import aiolora.media.images
from aiolora import LLM, SamplingParams
from aiolora.api import create_app
from aiolora.config import EngineArgs, ServerArgs
from aiolora.engine.async_engine import AsyncLLMEngine
from aiolora.types import LoRARequest
from tests.api.conftest import inside
from tests.media.tiny import RATE, TEMPLATE, make_granite_speech, make_llava, make_mm_adapter, picture, sound

BASE = "llava"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("media") / "llava")


@pytest.fixture(scope="module")
def seeing(llava: Path) -> Path:
    return make_mm_adapter(llava, llava / "seeing", seed=1, strength=2.0)


@pytest.fixture(scope="module")
def other(llava: Path) -> Path:
    return make_mm_adapter(llava, llava / "other", seed=2, strength=2.0, target_modules=["q_proj", "linear_1"])


@asynccontextmanager
async def serving(
    llava: Path, modules: dict[str, Path], keys: ServerArgs | None = None, **args: Any
) -> AsyncIterator[httpx.AsyncClient]:
    engine = AsyncLLMEngine.from_engine_args(
        EngineArgs(model=str(llava), dtype="float32", device="cpu", enable_lora=True, **args)
    )
    named = [LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(modules.items(), 1)]
    app = create_app(engine, lora_modules=named, served_model_name=BASE, args=keys or ServerArgs())
    async with inside(app) as client:
        yield client


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def data_url(seed: int, kind: str = "PNG", size: int = 40) -> str:
    file = io.BytesIO()
    Image.fromarray(picture(seed, height=size)).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(*parts: dict[str, Any], model: str = BASE, **more: Any) -> dict[str, Any]:
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "logit_bias": {"95": -100}} | more
    return {"model": model, "messages": [{"role": "user", "content": list(parts)}], **fields}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


async def chat(client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body)


def offline(llava: Path, image: Any, adapter: Path | None) -> str:
    llm = LLM(str(llava), dtype="float32", enable_lora=True)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={95: -100})
    prompt = {"prompt": " w5 w6  <image> w7 ", "multi_modal_data": {"image": image}}
    lora = adapter and LoRARequest("a", 1, str(adapter))
    return llm.generate(prompt, params, lora_request=lora, use_tqdm=False)[0].outputs[0].text


async def test_an_image_of_a_conversation_is_that_of_a_prompt_with_every_adapter(
    llava: Path, seeing: Path, other: Path
) -> None:
    parts = text("w5 w6"), image(data_url(1)), text("w7")
    expected = {name: offline(llava, picture(1), path) for name, path in ((BASE, None), ("seeing", seeing))}
    async with serving(llava, {"seeing": seeing, "other": other}) as client:
        answers = {name: await chat(client, asked(*parts, model=name)) for name in (BASE, "seeing", "other")}
    for name, said in expected.items():
        assert answers[name].status_code == 200, answers[name].text
        assert answers[name].json()["choices"][0]["message"]["content"] == said
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers.values()}
    assert len(texts) == 3
    assert answers[BASE].json()["usage"]["prompt_tokens"] == 3 + 16


async def test_openais_client_streams_about_an_image(llava: Path) -> None:
    async with serving(llava, {}) as client:
        api = AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=client)
        messages: Any = asked(text("w5"), image(data_url(2, "JPEG")))["messages"]
        stream = await api.chat.completions.create(model=BASE, messages=messages, max_tokens=3, stream=True)
        assert [chunk async for chunk in stream][-1].choices[0].finish_reason in ("length", "stop")


async def test_a_conversation_without_images_is_one_of_text(llava: Path) -> None:
    async with serving(llava, {}) as client:
        whole = await chat(client, asked() | {"messages": [{"role": "user", "content": "w5 w6"}]})
        parts = await chat(client, asked(text("w5 w6")))
    assert whole.status_code == parts.status_code == 200
    assert whole.json()["usage"]["prompt_tokens"] == 2
    assert whole.json()["choices"] == parts.json()["choices"]


async def test_the_default_adapter_answers_whoever_sends_an_image_and_names_none(
    llava: Path, seeing: Path, other: Path
) -> None:
    parts = text("w5 w6"), image(data_url(1)), text("w7")
    async with serving(llava, {"other": other}, default_mm_loras={"image": str(seeing)}) as client:
        by_default = await chat(client, asked(*parts))
        explicit = await chat(client, asked(*parts, model="other"))
        by_name = await chat(client, asked(*parts, model="image"))
        without = await chat(client, asked(text("w5 w6")))
        cards = (await client.get("/v1/models")).json()["data"]
    assert by_default.headers["x-aiolora-adapter"].startswith("image@")
    assert explicit.headers["x-aiolora-adapter"].startswith("other@")
    assert "x-aiolora-adapter" not in without.headers
    assert by_default.json()["choices"] == by_name.json()["choices"] != explicit.json()["choices"]
    assert by_default.json()["choices"][0]["message"]["content"] == offline(llava, picture(1), seeing)
    assert [card["id"] for card in cards] == [BASE, "image", "other"]


async def test_a_default_adapter_is_not_there_for_a_key_that_may_not_use_it(llava: Path, seeing: Path) -> None:
    keys = ServerArgs(api_key=("all", '{"key": "some", "name": "some", "adapters": ["other"]}'))
    body = asked(text("w5 w6"), image(data_url(1)), text("w7"))
    async with serving(llava, {}, keys, default_mm_loras={"image": str(seeing)}) as client:
        allowed, forbidden = [
            await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            for key in ("all", "some")
        ]
        named = await client.post(
            "/v1/chat/completions", json=body | {"model": "image"}, headers={"authorization": "Bearer some"}
        )
    assert allowed.headers["x-aiolora-adapter"].startswith("image@")
    assert "x-aiolora-adapter" not in forbidden.headers
    assert forbidden.json()["choices"][0]["message"]["content"] == offline(llava, picture(1), None)
    assert named.status_code == 404
    assert "does not exist" in named.json()["error"]["message"]


async def test_an_image_is_a_users_and_no_tokens_to_count(llava: Path) -> None:
    async with serving(llava, {}) as client:
        body = asked(image(data_url(1)))
        said = await client.post("/v1/chat/completions", json=body | {"messages": body["messages"] * 2})
        assert said.status_code == 200
        body["messages"][0]["role"] = "system"
        refused = await client.post("/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].content")
        counted = await client.post("/tokenize", json={"messages": asked(image(data_url(1)))["messages"]})
        assert (counted.status_code, counted.json()["error"]["param"]) == (400, "messages")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no file": (image("data:image/png;base64,aGVsbG8="), "messages[0].content[0]", "none of PNG"),
    "no base64": (image("data:image/png;base64,*"), "messages[0].content[0]", "no base64"),
    "no comma": (image("data:image/png"), "messages[0].content[0]", "no comma"),
    "a host nobody allowed": (image("http://example.com/a.png"), "messages[0].content[0]", "may be fetched"),
    "a file of the server": (image("file:///etc/passwd"), "messages[0].content[0]", "http"),
    "a path of the server": (image("/etc/passwd"), "messages[0].content[0]", "http"),
    "a part without its field": ({"type": "image_url"}, "messages[0].content[0]", "image_url"),
    "a part of another type": ({"type": "video_url"}, "messages[0].content[0]", "video_url"),
    "a recording": (
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "messages[0].content[0]",
        "takes text, image, no audio",
    ),
    "too many pixels": (image(data_url(1, size=80)), "messages[0].content[0]", "--max-image-pixels"),
    "a placeholder too many": (text("<image>"), "messages", "2 placeholders of image for 1 given"),
}


async def test_a_bad_image_is_400_with_its_place(llava: Path) -> None:
    async with serving(llava, {}, max_image_pixels=2000) as client:
        for part, param, says in BAD.values():
            more = (image(data_url(1)),) if part["type"] == "text" else ()
            answer = await chat(client, asked(part, *more))
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), error
            assert says in error["message"]


async def test_images_that_do_not_fit_together_are_refused_before_one_is_processed(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed, process = [], aiolora.media.images._processed
    monkeypatch.setattr("aiolora.media.images._processed", lambda *given: processed.append(given) or process(*given))
    images = [image(data_url(seed)) for seed in range(8)]
    async with serving(llava, {}, max_model_len=100) as client:
        processed.clear()
        refused = await chat(client, asked(text("w5"), *images))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert f"the prompt has {8 * 16 + 1} tokens" in refused.json()["error"]["message"]
        assert not processed
        assert (await chat(client, asked(text("w5"), *images[:5]))).status_code == 200
        assert len(processed) == 5
    async with serving(llava, {}, max_image_pixels=1300) as client:
        processed.clear()
        refused = await chat(client, asked(*images, image(data_url(9))))
        assert "11160 pixels of image in all; the limit is 10400" in refused.json()["error"]["message"]
        assert not processed


async def test_requests_that_wait_for_a_slow_host_hold_up_no_others_image(llava: Path) -> None:
    asking, answer = [], asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asking.append(await reader.readline())
        await answer.wait()
        writer.close()

    async with serving(llava, {}, allowed_media_domains=("127.0.0.1",)) as client:
        host = await asyncio.start_server(silent, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{host.sockets[0].getsockname()[1]}/x.png"
        slow = [asyncio.ensure_future(chat(client, asked(image(url)))) for _ in range(12)]
        while not asking:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await chat(client, asked(image(data_url(1))))).status_code == 200
        assert not any(one.done() for one in slow)
        answer.set()
        assert [one.status_code for one in await asyncio.gather(*slow)] == [400] * 12
        host.close()


def test_offline_the_file_behind_a_url_is_that_image(llava: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "x.png")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as host:
        threading.Thread(target=host.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{host.server_port}/x.png"
            llm = LLM(str(llava), dtype="float32", allowed_media_domains=("127.0.0.1",))
            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={95: -100})
            prompt = {"prompt": " w5 w6  <image> w7 ", "multi_modal_data": {"image": url}}
            [output] = llm.generate(prompt, params, use_tqdm=False)
        finally:
            host.shutdown()
    assert output.outputs[0].text == offline(llava, picture(1), None)


async def test_nothing_is_fetched_for_a_request_whose_grammar_is_refused(llava: Path) -> None:
    asking = []

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asking.append(await reader.readline())
        file = base64.b64decode(data_url(1).partition(",")[2])
        writer.write(f"HTTP/1.0 200 OK\r\ncontent-length: {len(file)}\r\n\r\n".encode() + file)
        await writer.drain()
        writer.close()

    async with serving(llava, {}, allowed_media_domains=("127.0.0.1",)) as client:
        host = await asyncio.start_server(served, "127.0.0.1", 0)
        body = asked(image(f"http://127.0.0.1:{host.sockets[0].getsockname()[1]}/x.png"))
        refused = await chat(client, body | {"structured_outputs": {"regex": "("}, "ignore_eos": False})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")
        assert not asking
        assert (await chat(client, body)).status_code == 200
        assert len(asking) == 1
        host.close()


async def test_a_default_adapter_that_answers_is_asked_in_its_own_words(llava: Path, tmp_path: Path) -> None:
    adapter = make_mm_adapter(llava, tmp_path / "default", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(llava)
    tokenizer.chat_template = TEMPLATE + "{% for tool in tools or [] %}w9 w9 {% endfor %}"
    tokenizer.save_pretrained(adapter)
    body = asked(image(data_url(1)), tools=[{"type": "function", "function": {"name": "f"}}])
    async with serving(llava, {}, default_mm_loras={"image": str(adapter)}) as client:
        answers = [await chat(client, body | {"model": model}) for model in (BASE, "image")]
    assert [answer.headers["x-aiolora-adapter"].partition("@")[0] for answer in answers] == ["image", "image"]
    assert [answer.json()["usage"]["prompt_tokens"] for answer in answers] == [16 + 2, 16 + 2]


async def test_a_large_body_is_for_models_with_images_only(llava: Path, byte_model: Path) -> None:
    body = b" " * (5 << 20)
    async with serving(llava, {}) as client:
        assert (await client.post("/v1/chat/completions", content=body)).status_code == 400
        assert (await client.post("/v1/chat/completions", content=body * 7)).status_code == 413
    async with serving(byte_model, {}) as client:
        answer = await client.post("/v1/chat/completions", content=body)
        assert answer.status_code == 413
        assert "the limit is 4194304 bytes" in answer.json()["error"]["message"]
        refused = await chat(client, asked(image(data_url(1))))
        assert refused.status_code == 400
        assert "takes text, no image" in refused.json()["error"]["message"]


async def test_a_recording_of_a_conversation_is_that_of_a_prompt(tmp_path: Path) -> None:
    model = make_granite_speech(tmp_path / "granite", "llama")
    heard = make_mm_adapter(model, tmp_path / "heard", strength=2.0)
    file = io.BytesIO()
    samples = (sound(1) * 32767).astype("<i2")
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    encoded = base64.b64encode(file.getvalue()).decode()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias={95: -100})
    prompt = {"prompt": "w5 <|audio|> w6", "multi_modal_data": {"audio": (samples / 32768, RATE)}}
    llm = LLM(str(model), dtype="float32", enable_lora=True)
    (output,) = llm.generate(prompt, params, lora_request=LoRARequest("a", 1, str(heard)), use_tqdm=False)
    expected = output.outputs[0].text
    parts: tuple[dict[str, Any], ...] = (
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}},
    )
    async with serving(model, {}, default_mm_loras={"audio": str(heard)}) as client:
        for part in parts:
            answer = await chat(client, asked(text("w5 "), part, text(" w6")))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == expected
            assert answer.headers["x-aiolora-adapter"].startswith("audio@")
        for data, says in (("aGVsbG8=", "no WAV file"), ("*", "no base64")):
            part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
            refused = await chat(client, asked(part))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages[0].content[0]")
            assert says in refused.json()["error"]["message"]
