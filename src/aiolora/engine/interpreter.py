"""How Python hands itself from thread to thread, and collects garbage, while engines step. Of the whole process.

A step takes the interpreter several times, and each time waits for whoever has it: Python's 5 ms where that is an
adapter's reader or a handler of the application (`benchmarks.stall --switch`, docs/performance.md). And a full
collection walks over every object of torch and transformers, while nobody gets a token.
"""

import gc
import sys
import threading

SWITCH_INTERVAL = 0.0002  # seconds


class Interpreter:
    """Set up while at least one engine runs; as it was found when the last has ended. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines = 0
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

    def engine_ends(self) -> None:
        """Once for each that has started. All may be collected again: the engine itself is garbage soon."""
        with self._lock:
            self._engines -= 1
            gc.unfreeze()
            if self._engines == 0:
                sys.setswitchinterval(self._found)


INTERPRETER = Interpreter()
