"""Files of images and recordings into arrays, within bounds that are checked before anything large is made of them."""

import io
import wave
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from aiolora.errors import MissingExtraError, RequestError

if TYPE_CHECKING:
    from PIL import Image as PillowImage  # of an extra

Image: TypeAlias = NDArray[np.uint8]  # [height, width, 3]
Samples: TypeAlias = NDArray[np.float32]  # [n], -1 to 1, one channel

MAX_RATIO = 200  # of the sides of an image
MAX_SECONDS = 600.0  # of the recordings of a request
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


class Picture(Struct, frozen=True):
    """An image whose header was read."""

    opened: "PillowImage.Image"
    param: str  # the field that it came in

    @property
    def width(self) -> int:
        return int(self.opened.size[0])

    @property
    def height(self) -> int:
        return int(self.opened.size[1])

    def decoded(self) -> Image:
        """Of several frames the first, turned as its EXIF says. Raises `RequestError`."""
        from PIL import Image as Pillow
        from PIL import ImageOps

        try:
            picture = ImageOps.exif_transpose(self.opened).convert("RGB")
            return np.array(picture)  # a copy: torchvision warns of one that may not be written to
        except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError) as error:
            raise RequestError(f"the image cannot be decoded: {error}", param=self.param) from None


def picture_of(source: object, *, max_pixels: int, param: str) -> Picture:
    """An image from a file's bytes, a PIL image or an array [height, width, 3 or 4, or nothing] of bytes.

    Raises `RequestError`, and `MissingExtraError` without Pillow.
    """
    try:
        from PIL import Image as Pillow
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
    return Picture(picture, param)


class Recording(Struct, frozen=True):
    """A recording whose sizes are known; several channels become their mean."""

    length: int  # samples of a channel
    rate: int  # samples a second
    read: Callable[[], Samples]
    param: str  # the field that it came in

    @property
    def seconds(self) -> float:
        return self.length / self.rate

    def length_at(self, rate: int) -> int:
        """As many samples as `samples(rate)` has."""
        return _resampled_length(self.length, self.rate, rate)

    def samples(self, rate: int) -> Samples:
        """At `rate` samples a second. Raises `RequestError`."""
        samples = self.read()
        if not np.isfinite(samples).all():
            raise RequestError("the recording has samples that are not finite", param=self.param)
        return samples if self.rate == rate else resampled(samples, self.rate, rate)


def recording_of(source: object, *, param: str) -> Recording:
    """A recording from the bytes of a WAV file or a pair (samples, their rate). Raises `RequestError`."""
    recording = _wav(source, param) if isinstance(source, bytes) else _pair(source, param)
    if not recording.length:
        raise RequestError("the recording has no samples", param=param)
    if not 1000 <= recording.rate <= 400_000 or recording.seconds > MAX_SECONDS:
        raise RequestError(
            f"the recording has {recording.length} samples at {recording.rate} a second; give up to {MAX_SECONDS:g} s "
            "at 1000 to 400000 a second",
            param=param,
        )
    return recording


def _resampled_length(length: int, given: int, rate: int) -> int:
    return length if given == rate else max(1, round(length * rate / given))


def resampled(samples: Samples, given: int, rate: int) -> Samples:
    """The same recording at another rate, by its spectrum: what both rates can hold is kept."""
    count = _resampled_length(len(samples), given, rate)
    spectrum = np.fft.rfft(samples.astype(np.float64))
    kept = spectrum[: count // 2 + 1]
    out = np.fft.irfft(kept, count) * (count / len(samples))
    return out.astype(np.float32)


def _pair(source: object, param: str) -> Recording:
    if not isinstance(source, Sequence) or isinstance(source, str) or len(source) != 2:
        raise RequestError("a recording is (samples, samples a second) or the bytes of a WAV file", param=param)
    try:
        samples, given = np.asarray(source[0]), int(source[1])
    except (TypeError, ValueError) as error:
        raise RequestError(f"the recording is no (samples, samples a second): {error}", param=param) from None
    if samples.dtype.kind not in "if" or samples.ndim not in (1, 2):
        raise RequestError(
            f"the samples are {samples.dtype}{list(samples.shape)}, no numbers of one or several channels", param=param
        )
    channels = 1 if samples.ndim == 1 else min(samples.shape)

    def read() -> Samples:
        scaled = samples / float(np.iinfo(samples.dtype).max) if samples.dtype.kind == "i" else samples
        if samples.ndim == 2:
            scaled = scaled.mean(axis=int(samples.shape[0] > samples.shape[1]))
        return scaled.astype(np.float32)

    return Recording(samples.size // max(1, channels), given, read, param)


def _wav(data: bytes, param: str) -> Recording:
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, frames = file.getparams()[:4]
            raw = file.readframes(frames)
    except (wave.Error, EOFError, ValueError) as error:
        raise RequestError(f"the recording is no WAV file of whole numbers: {error}", param=param) from None
    if not 1 <= width <= 4 or channels < 1:
        raise RequestError(f"the recording has {8 * width} bits a sample; give 8, 16, 24 or 32", param=param)
    length = len(raw) // (width * channels)

    def read() -> Samples:
        bytes_of = np.frombuffer(raw, np.uint8, length * width * channels).reshape(-1, width)
        padded = np.zeros((len(bytes_of), 4), np.uint8)  # little-endian, at the upper end of 32 bits
        padded[:, 4 - width :] = bytes_of ^ np.uint8(0x80) if width == 1 else bytes_of  # 8 bits have no sign
        samples = padded.view("<i4").reshape(-1, channels).mean(axis=1) / 2.0**31
        return np.asarray(samples, dtype=np.float32)

    return Recording(length, rate, read, param)
