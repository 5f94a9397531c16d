"""README and docs/: every code block runs, nothing is skipped in silence, and the site builds and keeps to itself."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

import aiolora
import aiolora.api
from aiolora import AsyncLLMEngine, EngineArgs
from aiolora.api import create_app
from aiolora.lora.resolver import LoRAResolverRegistry
from benchmarks import picture
from examples.local_hub import REPOSITORIES
from tests import HUB
from tests.commands import ROOT
from tests.pages import NAMES, PAGES, Reader, blocks

NOT_RUN = {  # page -> blocks that say why they are not run
    "docs/quickstart.md": 1,
    "docs/architecture.md": 3,
    "docs/adding-a-model.md": 3,
    "docs/multimodal.md": 5,
}


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("make")), reason="the pages call curl and make")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_of_a_page_runs_in_its_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LoRAResolverRegistry, "_resolvers", {})
    HUB.repositories |= REPOSITORIES
    with patch.dict(os.environ), Reader(tmp_path) as reader:
        for block in blocks(page):
            if block.not_run is None:
                try:
                    reader.read(block)
                except BaseException as error:
                    error.add_note(f"{block.place}\n{block.code}")
                    raise


def test_what_is_not_run_is_counted() -> None:
    reasons = Counter(page for page in PAGES for block in blocks(page) if block.not_run is not None)
    assert reasons == Counter(NOT_RUN)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        '```bash\necho \'{"a": 1}\'\n```\n\n```json\n{"a": "1"}\n```\n',
        "```bash\nfalse; true\n```\n",
        "```console\n$ echo a\na\n$ echo b\na\n```\n",
        "```\nx\n```\n",
        "```toml\nx = 1\n```\n",
        '```yaml title="README.md"\nx: 1\n```\n',
        "said:\n\n    print(1)\n",
    ],
)
def test_a_page_that_says_something_wrong_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    monkeypatch.setitem(PAGES, "page.md", page)
    (tmp_path / "folder").mkdir()
    with Reader(tmp_path / "folder") as reader, pytest.raises(AssertionError):
        [reader.read(block) for block in blocks("page.md")]


def test_every_route_is_told() -> None:
    told = "".join(page.read_text() for page in PAGES.values())
    app = create_app(AsyncLLMEngine.from_engine_args(EngineArgs(model="none")))
    paths = {re.sub(r"/\{.*", "", path) for path in app.openapi_schema.paths or ()}
    assert {"/v1/chat/completions", "/health"} < paths
    assert {path for path in paths if not re.search(rf"{path}[`/ ]", told)} == set()


def test_every_public_name_is_in_the_reference() -> None:
    told = set(NAMES.findall(PAGES["docs/reference.md"].read_text()))
    public = {f"aiolora.{name}" for name in aiolora.__all__ if name != "__version__"}
    assert public | {f"aiolora.api.{name}" for name in aiolora.api.__all__} <= told


def test_the_site_builds_and_asks_nobody_else(tmp_path: Path) -> None:
    """No font, script or picture comes from elsewhere when a page is looked at; `--strict` finds dead links."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(\S+)|<link[^>]* href=\"?(\S+)", page.read_text())
        outside = [url for urls in fetched for url in urls if re.match(r"(https?:)?//", url)]
        assert outside == [], page


def test_the_picture_of_the_figures_shows_the_pages() -> None:
    shown = re.findall(r">([\d.]+ x)<", picture.PICTURE.read_text())
    assert shown == [picture.words(bar) for bar in (*picture.on_gpu(), *picture.on_cpu())], (
        "python -m benchmarks.picture"
    )


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []
