from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from aiolora import LLM, SamplingParams
from aiolora.assets.audio import AudioAsset
from aiolora.errors import RequestError
from aiolora.media.recordings import GraniteRecordings
from tests.media.tiny import AUDIO, RATE, make_granite_speech, make_mm_adapter, sound


class Config:
    audio_token_id = AUDIO
    window_size = 15
    downsample_rate = 5


@pytest.mark.parametrize("seconds", [0.5, 0.515, 1.0, 0.021])
def test_frames_are_those_of_torchs_spectrogram(seconds: float) -> None:
    """The formula of torchaudio's MelSpectrogram and of transformers' extractor, over torch.stft."""
    samples = sound(3, seconds)
    frames = GraniteRecordings.of(Config(), {}).frames(samples)
    assert frames.dtype == np.float32
    assert frames.shape == ((len(samples) // 160 + 1) // 2, 160)
    window = torch.hann_window(400)
    spectrum = torch.stft(
        torch.from_numpy(samples), 512, 160, 400, window, center=True, pad_mode="reflect", return_complex=True
    )
    filters = mel_filter_bank(257, 80, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    log = (spectrum.abs().double() ** 2).T.matmul(torch.from_numpy(filters)).clamp(min=1e-10).log10()
    scaled = torch.maximum(log, log.max() - 8) / 4 + 1
    expected = scaled[: len(scaled) // 2 * 2].reshape(-1, 160)
    np.testing.assert_allclose(frames, expected.numpy(), atol=2e-4)


def test_a_recording_has_some_tokens_for_each_window_of_its_frames() -> None:
    recordings = GraniteRecordings.of(Config(), {"melspec_kwargs": {"hop_length": 160}, "sampling_rate": RATE})
    for seconds, windows in ((0.29, 1), (0.31, 2), (3.0, 10), (3.01, 11)):
        assert recordings.open((sound(1, seconds), RATE), "p").item().count == 3 * windows


def test_the_sample_is_a_recording_of_some_seconds() -> None:
    samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
    assert rate == 16000
    assert 3 < len(samples) / rate < 6
    assert 0.3 < np.abs(samples).max() <= 1
    with pytest.raises(RequestError, match=r"no recording 'x'; there are: mary_had_lamb"):
        AudioAsset("x")


def test_the_models_own_adapter_answers_about_recordings_and_nobody_else(tmp_path: Path) -> None:
    """Granite Speech as it is published: the adapter lies in the model's own folder."""
    model = str(make_granite_speech(tmp_path / "granite-speech", "llama"))
    make_mm_adapter(Path(model), Path(model), target_modules=r".*language_model.*(q_proj|v_proj)", strength=2.0)
    llm = LLM(model=model, dtype="float32", enable_lora=True, max_lora_rank=64, default_mm_loras={"audio": model})
    audio = AudioAsset("mary_had_lamb").audio_and_sample_rate
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    prompt: Any = {"prompt": "<|audio|> w5 w6", "multi_modal_data": {"audio": audio}}
    spoken, written, base = llm.generate(
        [prompt, "w5 w6", prompt], sampling_params=params, lora_request=[None, None, model], use_tqdm=False
    )
    assert spoken.adapter is not None
    assert spoken.adapter.startswith("audio@")
    assert written.adapter is None
    assert base.adapter is None
    assert spoken.outputs[0].logprobs != base.outputs[0].logprobs
    (again,) = llm.generate(prompt, params, lora_request="audio", use_tqdm=False)
    assert again.outputs[0].token_ids == spoken.outputs[0].token_ids
