"""Pages of documentation as a reader meets them: code blocks in their order, in a folder like a fresh checkout."""

import ast
import asyncio
import doctest
import inspect
import json
import pydoc
import re
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from signal import SIGTERM

import yaml
from markdown_it import MarkdownIt

from tests.commands import ROOT, environment, free_port, run, serving

PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}

STAND_INS = {  # what is printed -> what is run in its place
    "make ": "make --dry-run ",  # `make test` would be this very test
    ".venv/bin/": "",
    "aiolora serve": "exec aiolora serve --port PORT --max-model-len 1024",
    "uvicorn ": "exec uvicorn --port PORT ",
    "localhost:8000": "127.0.0.1:PORT",
    "curl ": "curl --silent --show-error --fail-with-body ",
}
NAMES = re.compile(r"^::: ([\w.]+)", re.MULTILINE)  # what the reference takes in
_SERVES = re.compile(r"^exec ", re.MULTILINE)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*")
_INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
_TITLE = re.compile(r'title="([\w./-]+)"')
_ELLIPSIS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block."""

    place: str  # PAGE:LINE
    language: str
    title: str | None  # the file whose contents it shows
    code: str
    not_run: str | None  # why not: `<!-- not run: reason -->` stands before it


def blocks(page: str) -> list[Block]:
    """Every block of a page, in its order, with those of docstrings that it takes in by `::: NAME`.

    What is a block by its indent only is refused: it does not say what it is.
    """
    found, reason = [], None
    for token in MarkdownIt("commonmark").parse(PAGES[page].read_text()):
        place = f"{page}:{token.map[0] + 1}" if token.map else page
        assert token.type != "code_block", f"{place}: fence this block and name its language"
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            title = _TITLE.search(rest)
            code = _INCLUDED.sub(lambda included: (ROOT / included[1]).read_text().rstrip(), token.content)
            found.append(
                Block(place=place, language=language, title=title[1] if title else None, code=code, not_run=reason)
            )
        if token.type == "inline":
            found += [block for name in NAMES.findall(token.content) for block in _examples(name)]
        marked = _NOT_RUN.fullmatch(token.content) if token.type == "html_block" else None
        reason = marked[1] if marked else None
    return found


def _examples(name: str) -> list[Block]:
    """What is indented as code in the docstrings of a public class or function: Python, after an import."""
    thing = pydoc.locate(name)
    assert thing is not None, f"the reference names {name}, which is not there"
    members = [member for member in vars(thing) if not member.startswith("_")] if inspect.isclass(thing) else []
    docs = {name: inspect.getdoc(thing)} | {f"{name}.{each}": inspect.getdoc(getattr(thing, each)) for each in members}
    return [
        Block(place=place, language="python", title=None, code=f"from aiolora import *\n{token.content}", not_run=None)
        for place, doc in docs.items()
        for token in MarkdownIt("commonmark").parse(doc or "")
        if token.type == "code_block" and not inspect.ismodule(thing)
    ]


class Reader:
    """Does what a page says, block by block.

    A server that a block starts serves the blocks behind it, until one starts another. Python blocks share their names
    and, where they await, one loop, as in `python -m asyncio`. `text` and `json` show what the block before printed;
    a block with a title is the file of that name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for entry in ROOT.iterdir():
            (folder / entry.name).symlink_to(entry)
        self._port = free_port()
        self._names: dict[str, object] = {"__name__": "__main__"}
        self._servers = ExitStack()
        self._loop = asyncio.Runner()
        self._printed = ""

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._servers.close()
        self._loop.close()
        self._names.clear()

    def read(self, block: Block) -> None:
        """Run it, or hold it against what the block before printed."""
        printed, self._printed = self._printed, ""
        if block.title is not None:
            assert not (self._folder / block.title).exists(), "a name that the checkout does not have"
            (self._folder / block.title).write_text(block.code)
        elif block.language == "python":
            self._printed = self._python(block)
        elif block.language in ("sh", "bash"):
            self._printed = self._shell(block.code)
        elif block.language == "console":
            for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.code, re.MULTILINE):
                _check_output(shown, self._shell(command))
        elif block.language == "text":
            _check_output(block.code, printed)
        elif block.language == "json":
            shown = json.loads(block.code)
            assert not printed or _shape(shown) == _shape(json.loads(printed)), f"it printed {printed}"
        else:
            assert block.language == "yaml", f"what is {block.language!r}? Give the block a language that can be run"
            yaml.safe_load(block.code)

    def _python(self, block: Block) -> str:
        code = compile(
            self._as_run(block.code), block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        with redirect_stdout(StringIO()) as printed:
            outcome = eval(code, self._names)
            if inspect.iscoroutine(outcome):
                self._loop.run(outcome)
        return printed.getvalue()

    def _shell(self, code: str) -> str:
        shell = ["bash", "-ec", self._as_run(code)]
        if not _SERVES.search(shell[-1]):
            return run(shell, environment(), self._folder)
        self._servers.close()
        status = 0 if "aiolora serve" in code else -SIGTERM  # uvicorn sends itself what it has obeyed
        self._servers.enter_context(serving(shell, environment(), self._port, self._folder, status=status))
        return ""

    def _as_run(self, code: str) -> str:
        for printed, instead in STAND_INS.items():
            code = code.replace(printed, instead.replace("PORT", str(self._port)))
        return code


def _check_output(shown: str, printed: str) -> None:
    """`...` stands for any text, and any white space for any other."""
    same = doctest.OutputChecker().check_output(shown, printed, _ELLIPSIS)
    assert same, f"shown:\n{shown}\nprinted:\n{printed}"


def _shape(value: object) -> object:
    """Keys and types; of a list, its first element's."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shape(item) for item in value[:1]]
    return type(value).__name__
