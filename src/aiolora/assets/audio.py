"""Recordings to try audio models with, computed when they are asked for."""

from typing import TYPE_CHECKING

from aiolora.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RATE = 16_000
_BEAT_S = 0.3
# half tones above C4 and beats: the beginning of the nursery rhyme (Boston, 1830)
_LAMB = "4 1|2 1|0 1|2 1|4 1|4 1|4 2|2 1|2 1|2 2|4 1|7 1|7 2"
_TUNES = {"mary_had_lamb": _LAMB}


class AudioAsset:
    """A recording by its name. Raises `RequestError` for a name that there is not."""

    def __init__(self, name: str) -> None:
        if name not in _TUNES:
            raise RequestError(f"there is no recording {name!r}; there are: {', '.join(_TUNES)}", param="name")
        self.name = name

    @property
    def audio_and_sample_rate(self) -> "tuple[NDArray[np.float32], int]":
        """Samples [n] float32 of -1 to 1, and how many there are in a second."""
        import numpy as np

        notes = []
        for note in _TUNES[self.name].split("|"):
            tone, beats = map(int, note.split())
            time = np.arange(int(RATE * _BEAT_S * beats)) / RATE
            pitch = 261.63 * 2 ** (tone / 12)
            overtones = sum(np.sin(2 * np.pi * pitch * order * time) / order**2 for order in range(1, 6))
            notes.append(0.5 * overtones * np.minimum(1, 50 * time) * np.exp(-3 * time))
        return np.concatenate(notes).astype(np.float32), RATE
