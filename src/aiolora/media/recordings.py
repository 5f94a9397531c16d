"""Recordings: transformers' feature extractors, and the one of them that would need torchaudio in NumPy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aiolora.media.content import AUDIO
from aiolora.media.decode import MAX_SECONDS, Samples, recording_of
from aiolora.media.items import Opened, item_of
from aiolora.types import MediaItem


def _silence(seconds: float) -> object:
    return np.zeros(max(1, int(seconds * 16_000)), dtype=np.float32), 16_000


_BLANKS = [_silence(seconds) for seconds in (1, 10)]


@dataclass(frozen=True)
class GraniteRecordings:
    """Granite Speech: pairs of log-mel frames into a conformer, some tokens for each window of those (a Q-former's)."""

    hf: Any
    rate: int
    fft: int
    window: int  # samples
    hop: int  # samples
    filters: NDArray[np.float64]  # [fft / 2 + 1, mels]
    room: float = MAX_SECONDS
    unit: str = "seconds"

    @classmethod
    def of(cls, hf: Any, said: dict[str, Any]) -> "GraniteRecordings":
        """`said`: the processor's config, in which whatever is missing is as transformers has it by default."""
        from transformers.audio_utils import mel_filter_bank

        mel = said.get("melspec_kwargs") or said
        rate = int(said.get("sampling_rate", 16000))
        fft = int(mel.get("n_fft", 512))
        filters = mel_filter_bank(
            num_frequency_bins=fft // 2 + 1,
            num_mel_filters=int(mel.get("n_mels") or said.get("feature_size") or 80),
            min_frequency=0.0,
            max_frequency=rate / 2,
            sampling_rate=rate,
            norm=None,
            mel_scale="htk",
        )
        return cls(hf, rate, fft, int(mel.get("win_length", 400)), int(mel.get("hop_length", 160)), filters)

    @property
    def token_id(self) -> int:
        return int(self.hf.audio_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        return _BLANKS

    def blank(self, share: float) -> object:
        return _silence(MAX_SECONDS * share)

    def open(self, source: object, param: str) -> Opened:
        recording = recording_of(source, param=param)
        mirrored = recording.length_at(self.rate) + 2 * (self.window // 2)
        count = self._count(((mirrored - self.window) // self.hop + 1) // 2)
        return Opened(AUDIO, count, recording.seconds, lambda: self._item(recording.samples(self.rate)))

    def _item(self, samples: Samples) -> MediaItem:
        frames = self.frames(samples)
        return item_of(AUDIO, {"input_features": frames[None]}, self._count(len(frames)))

    def _count(self, frames: int) -> int:
        windows: int = math.ceil(frames / self.hf.window_size)
        return windows * int(self.hf.window_size // self.hf.downsample_rate)

    def frames(self, samples: Samples) -> NDArray[np.float32]:
        """[frames / 2, 2 * mels]: log-mel energies, the range of 8 powers of ten under the largest to -1 and 1.

        As torchaudio's MelSpectrogram with its defaults: windows of Hann around every `hop`-th sample, mirrored ends.
        """
        mirrored = np.pad(samples, self.window // 2, mode="reflect" if len(samples) > self.window // 2 else "symmetric")
        cut = np.lib.stride_tricks.sliding_window_view(mirrored, self.window)[:: self.hop]
        hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)).astype(np.float32)
        power = np.abs(np.fft.rfft(cut * hann, self.fft)) ** 2
        log = np.log10(np.maximum(power @ self.filters, 1e-10))
        scaled = np.maximum(log, log.max() - 8) / 4 + 1
        even: NDArray[np.float32] = scaled[: len(scaled) // 2 * 2].astype(np.float32)
        return even.reshape(len(even) // 2, -1)


@dataclass(frozen=True)
class QwenRecordings:
    """Qwen2-Audio: Whisper's log-mel frames of 30 s, and a token for each four of those that are no padding."""

    hf: Any
    processor: Any
    room: float = MAX_SECONDS
    unit: str = "seconds"

    @property
    def token_id(self) -> int:
        return int(self.hf.audio_token_id)

    @property
    def blanks(self) -> Sequence[object]:
        return _BLANKS

    def blank(self, share: float) -> object:
        return _silence(MAX_SECONDS * share)

    def open(self, source: object, param: str) -> Opened:
        recording = recording_of(source, param=param)
        rate = int(self.processor.sampling_rate)
        seen = min(recording.length_at(rate), int(self.processor.n_samples))
        count = _qwen_count(math.ceil(seen / self.processor.hop_length))
        return Opened(AUDIO, count, recording.seconds, lambda: self._item(recording.samples(rate), rate))

    def _item(self, samples: Samples, rate: int) -> MediaItem:
        made = self.processor(
            samples, sampling_rate=rate, return_attention_mask=True, padding="max_length", return_tensors="np"
        )
        mask = np.asarray(made["attention_mask"])
        features = {"input_features": np.asarray(made["input_features"]), "feature_attention_mask": mask}
        return item_of(AUDIO, features, _qwen_count(int(mask.sum())))


def _qwen_count(frames: int) -> int:
    return ((frames - 1) // 2 - 1) // 2 + 1
