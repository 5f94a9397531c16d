"""A hub in a hundred lines: serves folders as repositories, enough for huggingface_hub to download them.

    python examples/local_hub.py -- python examples/offline_inference/quickstart.py

runs the command with HF_ENDPOINT set to it, so that the examples work without a network. The repositories are the
adapters of examples/adapters, by the names of `REPOSITORIES`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ADAPTERS = Path(__file__).parent / "adapters"
REPOSITORIES = {f"aiolora/smollm2-135m-{name}": ADAPTERS / name for name in ("sql", "json", "pirate")}


class LocalHub:
    """`repositories` by name, each a folder with one commit. `requests` lists the paths that were asked for."""

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator["LocalHub"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a path."""
        self.requests.append(path)
        for name, folder in self.repositories.items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            files = {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                return _json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
            if path == f"/api/models/{name}/tree/{commit}":
                sizes = {file: {"size": at.stat().st_size, "oid": commit} for file, at in files.items()}
                return _json([{"type": "file", "path": file, **size} for file, size in sizes.items()])
            if path.startswith(f"/{name}/resolve/"):
                file = files.get(path.removeprefix(f"/{name}/resolve/").partition("/")[2])
                if file is not None:
                    data = file.read_bytes()
                    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
                    return 200, headers, data
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(body=True)

            def do_HEAD(self) -> None:
                self._reply(body=False)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class names it)
                pass

            def _reply(self, *, body: bool) -> None:
                status, headers, data = hub.answer(unquote(self.path.partition("?")[0]))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        return Handler


def _json(body: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def main() -> int:
    command = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    with LocalHub(REPOSITORIES).running() as hub, tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": cache}
        if not command:
            print(f"export HF_ENDPOINT={hub.endpoint}  # until Ctrl-C", flush=True)
            threading.Event().wait()
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
