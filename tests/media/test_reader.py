import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aiolora.engine.intake import Intake, Limits
from aiolora.errors import ModelError, RequestError
from aiolora.lora.registry import AdapterRegistry
from aiolora.media.content import Given, modalities_in, parted
from aiolora.media.fetch import Fetcher
from aiolora.media.items import Opened, item_of
from aiolora.media.reader import MediaReader, rotary_of
from aiolora.types import AnnouncedAdapter, LoRARequest, MediaItem
from tests.media.tiny import RATE, make_granite_speech, make_llava, make_qwen2_audio, make_qwen_vl, picture

IMAGE, AUDIO = 90, 91


class Fixed:
    """A processor whose items have as many tokens as their source says."""

    def __init__(self, modality: str, token_id: int) -> None:
        self._modality = modality
        self._token_id = token_id

    @property
    def token_id(self) -> int:
        return self._token_id

    @property
    def blanks(self) -> list[int]:
        return [1, 9]

    def blank(self, share: float) -> int:
        return max(self._token_id, int(1000 * share))

    @property
    def room(self) -> float:
        return 20

    @property
    def unit(self) -> str:
        return "tokens"

    def open(self, source: object, param: str) -> Opened:
        assert isinstance(source, int)
        return Opened(
            self._modality, source, source, lambda: item_of(self._modality, {"values": np.full(3, source)}, source)
        )


class Words:
    chat_template: object = "{{ message['content'] }}"

    def decode(self, ids: Any) -> str:
        return f"<{ids[0]}>"


@pytest.fixture
def reader() -> MediaReader:
    return MediaReader({"image": Fixed("image", IMAGE), "audio": Fixed("audio", AUDIO)}, Fetcher(), model="m")


def test_the_largest_is_one_of_which_a_prompt_has_room_where_there_is_any(reader: MediaReader) -> None:
    assert [item.count for item in reader.largest(2000)] == [1000, 1000]
    assert [item.count for item in reader.largest(300)] == [285, 285]
    assert [item.count for item in reader.largest(50)] == [IMAGE, AUDIO]


def test_each_placeholder_becomes_as_many_as_its_item_has_rows(reader: MediaReader) -> None:
    split = reader.split({"prompt": "p", "multi_modal_data": {"image": [2, 3], "audio": 4}}, Words())
    assert split.prompt == {"prompt": "p"}
    placed = reader.place([5, IMAGE, AUDIO, 6, IMAGE], reader.open(split.given))
    assert placed.ids == [5, *[IMAGE] * 2, *[AUDIO] * 4, 6, *[IMAGE] * 3]
    assert [(item.modality, item.start, item.count) for item in placed.items] == [
        ("image", 1, 2),
        ("audio", 3, 4),
        ("image", 8, 3),
    ]
    assert placed.rotary is None


@pytest.mark.parametrize("ids", [[5], [IMAGE, IMAGE], [IMAGE, AUDIO, AUDIO], [AUDIO]])
def test_more_or_fewer_placeholders_than_items_are_refused(reader: MediaReader, ids: list[int]) -> None:
    split = reader.split({"prompt": "p", "multi_modal_data": {"image": 2, "audio": 2}}, Words())
    with pytest.raises(RequestError, match=r"placeholders of image for 1 given, \d placeholders of audio for 1 given"):
        reader.place(ids, reader.open(split.given))


def test_a_request_brings_no_more_in_all_than_there_is_room_for(reader: MediaReader) -> None:
    given = [Given("image", size, "p") for size in (10, 10)]
    assert len(reader.open([*given, Given("audio", 20, "p")])) == 3
    with pytest.raises(RequestError, match="21 tokens of image in all; the limit is 20") as caught:
        reader.open([*given, Given("image", 1, "q")])
    assert caught.value.param == "p"


def test_equal_contents_have_equal_digests_and_others_have_others() -> None:
    one = item_of("image", {"a": np.zeros(4, np.float32)}, 1)
    assert one.digest == item_of("image", {"a": np.zeros(4, np.float32)}, 1).digest
    others = [
        item_of("audio", {"a": np.zeros(4, np.float32)}, 1),
        item_of("image", {"b": np.zeros(4, np.float32)}, 1),
        item_of("image", {"a": np.zeros((2, 2), np.float32)}, 1),
        item_of("image", {"a": np.zeros(4, np.int32)}, 1),
        item_of("image", {"a": np.array([0, 0, 0, 1], np.float32)}, 1),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6


def test_parts_stand_where_they_were_in_a_template_of_parts_and_in_one_of_text() -> None:
    messages: Any = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:,x"}},
                {"type": "text", "text": "b"},
                {"type": "input_audio", "input_audio": {"data": "eA==", "format": "wav"}},
            ],
        },
    ]
    assert modalities_in(messages) == {"image", "audio"}
    parts, given = parted(messages, {"image": "<i>", "audio": "<a>"}, parts=True)
    assert [one.source for one in given] == ["data:,x", "data:audio/wav;base64,eA=="]
    assert [one.param for one in given] == ["messages[1].content[1]", "messages[1].content[3]"]
    assert parts[0] == {"role": "system", "content": [{"type": "text", "text": "s"}]}
    assert [part["type"] for part in parts[1]["content"]] == ["text", "image", "text", "audio"]
    texts, _ = parted(messages, {"image": "<i>", "audio": "<a>"}, parts=False)
    assert [message["content"] for message in texts] == ["s", "a<i>b<a>"]


@pytest.mark.parametrize("prompt", ["text", [1, 2], {"prompt": "x"}, [{"role": "user", "content": "x"}]])
def test_text_has_no_media(prompt: Any) -> None:
    assert not modalities_in(prompt)


def test_one_modality_with_a_default_has_it_two_that_both_match_have_none_and_a_name_wins(reader: MediaReader) -> None:
    defaults = {"image": "image", "audio": "audio"}
    limits = Limits(16, 96)
    registry = AdapterRegistry("m")
    for number, name in enumerate(("image", "audio"), 1):
        registry.announce(
            AnnouncedAdapter(request=LoRARequest(name, number, "path"), rank=1, nbytes=1, announced_at=0.0)
        )
    both, only = (
        Intake(Words(), registry, limits, reader, model="m", lora_enabled=True, default_mm_loras=given)  # type: ignore[arg-type]
        for given in (defaults, {"audio": "audio"})
    )
    assert both.default(None, {"image"}) == "image"
    assert both.default(None, {"audio"}) == "audio"
    assert both.default(None, {"audio", "image"}) is None
    assert only.default(None, {"audio", "image"}) == "audio"
    assert only.default(None, {"image"}) is None
    assert both.default("other", {"image"}) == "other"
    assert both.default("m", {"image"}) == "m"
    assert both.default(None, ()) is None
    registry.forget("image")
    assert both.default(None, {"image"}) is None, "the base answers where a default was unloaded"


def test_three_axes_follow_text_grid_and_text() -> None:
    item = MediaItem(modality="image", digest=b"", features={}, count=6, start=2, grid=(1, 2, 3))
    rotary = rotary_of(10, [item])
    assert rotary is not None
    assert rotary.axes.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert 10 + rotary.shift == 7


SIZES = [(1, 1), (1, 150), (13, 9), (28, 28), (31, 40), (40, 31), (64, 64), (90, 1024), (333, 77), (768, 768)]


@pytest.mark.parametrize("make", [make_llava, make_qwen_vl])
def test_an_image_has_as_many_tokens_as_its_size_says(make: Callable[[Path], Path], tmp_path: Path) -> None:
    reader = MediaReader.of(make(tmp_path / "model"), "m", domains=(), max_pixels=1 << 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for seed, (height, width) in enumerate(SIZES):
        file = io.BytesIO()
        Image.fromarray(picture(seed, height, width)).save(file, "JPEG", exif=exif)
        for source in (picture(seed, height, width), file.getvalue()):
            [opened] = reader.open([Given("image", source, "p")])
            assert opened.item().count == opened.count > 0


@pytest.mark.parametrize("make", [make_granite_speech, make_qwen2_audio])
def test_a_recording_has_as_many_tokens_as_its_length_says(make: Callable[[Path], Path], tmp_path: Path) -> None:
    reader = MediaReader.of(make(tmp_path / "model"), "m", domains=(), max_pixels=1 << 20)
    for rate in (8000, RATE, 44100):
        for length in (1000, 4803, 16000, 31 * 16000 + 7):
            [opened] = reader.open([Given("audio", (np.zeros(length, np.float32), rate), "p")])
            assert opened.item().count == opened.count


def test_a_processor_that_makes_other_sizes_than_its_config_says_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "model")
    CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}).save_pretrained(folder)
    with pytest.raises(ModelError, match="makes 36 tokens where 16 are due"):
        MediaReader.of(folder, "m", domains=(), max_pixels=1 << 20)
