"""Files of images and recordings into arrays, within bounds that are checked before anything large is made of them."""

import io
import wave
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from aiolora.errors import MissingExtraError, RequestError

Image: TypeAlias = NDArray[np.uint8]  # [height, width, 3]
Samples: TypeAlias = NDArray[np.float32]  # [n], -1 to 1, one channel

MAX_RATIO = 200  # of the sides of an image
MAX_SECONDS = 600.0  # of a recording
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def image_of(source: object, *, max_pixels: int, param: str) -> Image:
    """An image from a file's bytes, a PIL image or an array [height, width, 3 or 4, or nothing] of bytes.

    Of several frames the first; turned as its EXIF says. Raises `RequestError`, and `MissingExtraError` without Pillow.
    """
    try:
        from PIL import Image as Pillow
        from PIL import ImageOps
    except ImportError as error:
        raise MissingExtraError("an image", "media") from error
    if isinstance(source, bytes):
        try:
            picture: Pillow.Image = Pillow.open(io.BytesIO(source), formats=_FORMATS)  # reads the header only
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise RequestError(f"the image is none of {', '.join(_FORMATS)}: {error}", param=param) from None
    elif isinstance(source, Pillow.Image):
        picture = source
    else:
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
            raise RequestError(
                f"the image is {type(source).__name__} of {array.dtype}{list(array.shape)}; give a PIL image, an array "
                "of uint8 [height, width, 3] or the bytes of a file",
                param=param,
            )
        picture = Pillow.fromarray(array)
    width, height = picture.size
    if not 0 < width * height <= max_pixels:
        raise RequestError(
            f"the image has {width} x {height} pixels; the limit is {max_pixels} in all (--max-image-pixels); scale it",
            param=param,
        )
    if max(width, height) > MAX_RATIO * min(width, height):  # a processor that fits the shorter side makes it huge
        raise RequestError(
            f"the image has {width} x {height} pixels; one side may be {MAX_RATIO} times the other; pad or cut it",
            param=param,
        )
    try:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError) as error:
        raise RequestError(f"the image cannot be decoded: {error}", param=param) from None


def audio_of(source: object, rate: int, *, param: str) -> Samples:
    """A recording at `rate` samples a second, from the bytes of a WAV file or a pair (samples, their rate).

    Several channels become their mean. Raises `RequestError`.
    """
    samples, given = _wav(source, param) if isinstance(source, bytes) else _pair(source, param)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise RequestError(f"the recording has {list(samples.shape)} samples; give some, all finite", param=param)
    if not 1000 <= given <= 400_000 or len(samples) > MAX_SECONDS * given:
        raise RequestError(
            f"the recording has {len(samples)} samples at {given} a second; give up to {MAX_SECONDS:g} s at 1000 to "
            "400000 a second",
            param=param,
        )
    return samples if given == rate else resampled(samples, given, rate)


def resampled(samples: Samples, given: int, rate: int) -> Samples:
    """The same recording at another rate, by its spectrum: what both rates can hold is kept."""
    count = max(1, round(len(samples) * rate / given))
    spectrum = np.fft.rfft(samples.astype(np.float64))
    kept = spectrum[: count // 2 + 1]
    out = np.fft.irfft(kept, count) * (count / len(samples))
    return out.astype(np.float32)


def _pair(source: object, param: str) -> tuple[Samples, int]:
    if not isinstance(source, Sequence) or isinstance(source, str) or len(source) != 2:
        raise RequestError("a recording is (samples, samples a second) or the bytes of a WAV file", param=param)
    try:
        samples, given = np.asarray(source[0]), int(source[1])
    except (TypeError, ValueError) as error:
        raise RequestError(f"the recording is no (samples, samples a second): {error}", param=param) from None
    if samples.dtype.kind == "i":
        samples = samples / float(np.iinfo(samples.dtype).max)
    if samples.dtype.kind != "f":
        raise RequestError(f"the samples are {samples.dtype}, no numbers", param=param)
    if samples.ndim == 2:
        samples = samples.mean(axis=int(samples.shape[0] > samples.shape[1]))
    return samples.astype(np.float32), given


def _wav(data: bytes, param: str) -> tuple[Samples, int]:
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, frames = file.getparams()[:4]
            raw = file.readframes(frames)
    except (wave.Error, EOFError, ValueError) as error:
        raise RequestError(f"the recording is no WAV file of whole numbers: {error}", param=param) from None
    if not 1 <= width <= 4 or channels < 1:
        raise RequestError(f"the recording has {8 * width} bits a sample; give 8, 16, 24 or 32", param=param)
    bytes_of = np.frombuffer(raw[: len(raw) // (width * channels) * width * channels], np.uint8).reshape(-1, width)
    padded = np.zeros((len(bytes_of), 4), np.uint8)  # little-endian, at the upper end of 32 bits
    padded[:, 4 - width :] = bytes_of ^ np.uint8(0x80) if width == 1 else bytes_of  # 8 bits have no sign
    samples = padded.view("<i4").reshape(-1, channels).mean(axis=1) / 2.0**31
    return samples.astype(np.float32), rate
