import io
import struct
import wave

import numpy as np
import pytest
from PIL import Image

from aiolora.errors import RequestError
from aiolora.media.decode import Image as Pixels
from aiolora.media.decode import Samples, picture_of, recording_of, resampled
from tests.media.tiny import picture


def image_of(source: object, *, max_pixels: int, param: str) -> Pixels:
    return picture_of(source, max_pixels=max_pixels, param=param).decoded()


def audio_of(source: object, rate: int, *, param: str) -> Samples:
    recording = recording_of(source, param=param)
    samples = recording.samples(rate)
    assert len(samples) == recording.length_at(rate), "known before it is read"
    return samples


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def wav(samples: np.ndarray, rate: int, width: int, channels: int = 1) -> bytes:
    file = io.BytesIO()
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (whole + 128 if width == 1 else whole).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(raw)
    return file.getvalue()


def test_a_file_a_pil_image_and_an_array_are_the_same_image() -> None:
    array = picture(1)
    for source in (array, Image.fromarray(array), encoded(Image.fromarray(array)), np.dstack([array, array[..., :1]])):
        assert (image_of(source, max_pixels=2000, param="p") == array).all()


def test_grey_palette_and_turned_images_become_upright_colour() -> None:
    grey = Image.fromarray(picture(2)[..., 0])
    assert image_of(grey, max_pixels=2000, param="p").shape == (40, 31, 3)
    assert image_of(encoded(grey.convert("P"), "GIF"), max_pixels=2000, param="p").shape == (40, 31, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = image_of(encoded(grey.convert("RGB"), "JPEG", exif=exif), max_pixels=2000, param="p")
    assert turned.shape == (31, 40, 3)


def test_an_image_over_the_limit_is_refused_by_its_header() -> None:
    header = encoded(Image.new("1", (1, 1)))
    huge = header[:16] + struct.pack(">II", 50_000, 50_000) + header[24:]
    with pytest.raises(RequestError, match=r"50000 x 50000 pixels; the limit is 1000000|CRC|none of PNG"):
        image_of(huge, max_pixels=1_000_000, param="p")
    with pytest.raises(RequestError, match=r"31 x 40 pixels; the limit is 1239 in all \(--max-image-pixels\)"):
        image_of(picture(1), max_pixels=1239, param="p")
    with pytest.raises(RequestError, match="201 x 1 pixels; one side may be 200 times"):
        image_of(np.zeros((1, 201, 3), np.uint8), max_pixels=1000, param="p")


@pytest.mark.parametrize(
    "source", [b"", b"GIF89a", b"<svg/>", encoded(Image.new("RGB", (8, 8)), "BMP"), np.zeros((3, 4)), "x", None, 3]
)
def test_what_is_no_image_is_refused(source: object) -> None:
    with pytest.raises(RequestError) as caught:
        image_of(source, max_pixels=1000, param="messages[0].content[1]")
    assert caught.value.param == "messages[0].content[1]"


def test_a_truncated_image_is_refused() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)))
    with pytest.raises(RequestError, match=r"the image cannot be decoded|none of PNG"):
        image_of(whole[: len(whole) // 2], max_pixels=1000, param="p")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files_of_every_width_are_their_samples(width: int, channels: int) -> None:
    samples = np.sin(np.arange(400) / 7) * 0.9
    read = audio_of(wav(samples.repeat(channels), 16000, width, channels), 16000, param="p")
    np.testing.assert_allclose(read, samples, atol=1.5 / 2 ** (8 * width - 1) + 1e-6)


def test_samples_may_be_floats_or_whole_numbers_and_channels_either_way_round() -> None:
    floats = np.sin(np.arange(100) / 5).astype(np.float64)
    whole = np.round(floats * 32767).astype(np.int16)
    for samples in (floats, whole, np.stack([floats, floats]), np.stack([floats, floats], axis=1)):
        read = audio_of((samples, 16000), 16000, param="p")
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, floats, atol=1e-4)


@pytest.mark.parametrize("given", [8000, 22050, 44100])
def test_another_rate_is_the_same_sound(given: int) -> None:
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    np.testing.assert_allclose(resampled(tone(given), given, 16000), tone(16000), atol=1e-3)


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"RIFF",
        wav(np.zeros(40), 16000, 2)[:20],
        (np.zeros(0), 16000),
        (np.full(9, np.nan), 16000),
        (np.zeros(9), 0),
        (np.zeros(700), 1),
        (np.zeros(2_000_000), 1000),
        (np.zeros(9),),
        ("ab", 16000),
        (["a"], 16000),
        (np.zeros((2, 2, 2)), 16000),
        "x",
    ],
    ids=lambda source: repr(source)[:30],
)
def test_what_is_no_recording_is_refused(source: object) -> None:
    with pytest.raises(RequestError) as caught:
        audio_of(source, 16000, param="multi_modal_data")
    assert caught.value.param == "multi_modal_data"
