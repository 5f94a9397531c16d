"""The suite. Before anything imports huggingface_hub, its endpoint becomes a small hub of our own: no test goes out.

AIOLORA_TEST_DEVICE=cuda (or cpu): where models run, in `tests.tiny.DEVICE`; by default a GPU where there is one.
"""

import atexit
import os
import tempfile

from examples.local_hub import LocalHub

HUB = LocalHub({})
_home = tempfile.TemporaryDirectory()
_running = HUB.running()
_running.__enter__()
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_HOME": _home.name, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ.pop("HF_HUB_OFFLINE", None)
if os.environ.get("AIOLORA_TEST_DEVICE") == "cpu":  # a GPU there may be is not to be found
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
atexit.register(_running.__exit__, None, None, None)
atexit.register(_home.cleanup)
