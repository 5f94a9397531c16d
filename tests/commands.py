"""Commands as a user types them, and servers that they start."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """The suite's own, with the `aiolora` of this Python and these sources."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PATH": path, "PYTHONPATH": sources}


def run(command: Sequence[str], environment: Mapping[str, str], cwd: Path = ROOT) -> str:
    """What it prints. Ending with another status than 0 is a failure."""
    done = subprocess.run(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,  # who would talk has nothing to say
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str], port: int, cwd: Path = ROOT, *, status: int = 0
) -> Iterator[str]:
    """The URL of what `command` serves, once it answers. Ends it by SIGTERM, and well: with `status`."""
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, cwd=cwd, stdout=log, stderr=log) as server,
    ):
        try:
            _wait_until_answering(server, port)
            yield f"http://127.0.0.1:{port}"
        except BaseException as error:
            log.seek(0)
            error.add_note(f"the server said:\n{log.read()}")
            raise
        finally:
            server.terminate()
            server.wait(timeout=60)
        assert server.returncode == status, "SIGTERM drains, stops the engine and ends well"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_answering(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Servers here listen when their engines have started."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server did not get ready")
