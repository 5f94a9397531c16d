"""How Python hands itself from thread to thread, and collects garbage, while engines step. Of the whole process.

A step takes the interpreter several times, and each time waits for whoever has it: Python's 5 ms where that is an
adapter's reader or a handler of the application (`benchmarks.stall --switch`, docs/performance.md). And a full
collection walks over every object of torch and transformers, while nobody gets a token.
"""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

SWITCH_INTERVAL = 0.0002  # seconds


class Interpreter:
    """Set up while an engine runs or a blocking call steps; as it was found when the last has ended. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = self._calls = 0
        self._found = SWITCH_INTERVAL

    def engine_starts(self) -> None:
        """Threads take turns sooner, and what is alive now is left out of collections."""
        with self._lock:
            self._engines += 1
            if self._engines == 1:
                self._found = sys.getswitchinterval()
                sys.setswitchinterval(min(self._found, SWITCH_INTERVAL))
            gc.collect()
            gc.freeze()
            gc.collect()  # of next to nothing, which counts: full ones wait for a quarter as many new objects

    def engine_ends(self) -> None:
        """Once for each that has started. All may be collected again: the engine itself is garbage soon."""
        with self._lock:
            self._engines -= 1
            gc.unfreeze()
            if self._engines == 0:
                sys.setswitchinterval(self._found)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """While a blocking call steps, what was alive before it is left out of collections. Takes no time.

        Beside an engine nothing is: what is garbage at this moment would stay until that engine ends.
        """
        with self._lock:
            self._calls += 1
            if not self._engines:
                gc.freeze()
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._engines == self._calls == 0:
                    gc.unfreeze()


INTERPRETER = Interpreter()
