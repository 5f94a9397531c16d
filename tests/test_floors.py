"""The law of docs/architecture.md: who may import whom, and where outside packages live."""

import ast
from collections.abc import Iterator
from pathlib import Path

import aiolora

ROOT = Path(aiolora.__file__).parent
FLOORS = {
    "errors": 0,
    "types": 1, "assets": 1,
    "config": 2, "pages": 2, "hub": 2,
    "ops": 3, "parallel": 3, "tokenizer": 3, "media": 3,
    "models": 4,
    "lora": 5,
    "engine": 6,
    "llm": 7, "api": 7,
    "cli": 8, "distributed": 8,
    "__main__": 9,
}  # fmt: skip
# outside package -> the rooms or files (without .py) that may import it
HOMES = {
    "triton": {"ops"},
    "litestar": {"api", "cli/server"},
    "uvicorn": {"cli"},
    "prometheus_client": {"api/metrics"},
    "opentelemetry": {"api/tracing"},
    "yaml": {"cli/sources"},
    "shtab": {"cli/completion"},
    "matplotlib": {"cli/bench/plots"},
    "transformers": {"tokenizer", "models", "media"},
    "PIL": {"media"},
    "httpx": {"media"},
    "socket": {"media/addresses", "cli/server"},
    "tokenizers": {"tokenizer"},
    "huggingface_hub": {"hub"},
    "llguidance": {"engine/grammar"},
    "threading": {"engine/bridge", "engine/interpreter"},
    "rich": {"cli", "llm"},
    "subprocess": {"models/embedded", "ops/build_native"},
    "pickle": set[str](),
}
NO_TORCH = {"errors", "types", "config", "pages", "hub", "api", "cli"}


def _files() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
        yield "" if name == "__init__" else name, ast.parse(file.read_text())


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                deeper = (
                    node.module.startswith("aiolora")
                    and (ROOT.parent / f"{node.module}/{alias.name}".replace(".", "/")).with_suffix(".py").exists()
                )
                yield f"{node.module}.{alias.name}" if deeper else node.module


def test_a_module_imports_from_lower_floors_and_its_own_room_only() -> None:
    wrong = []
    for name, tree in _files():
        room = name.split("/")[0]
        for imported in _imports(tree):
            if imported == "aiolora" or not imported.startswith("aiolora."):
                continue
            target = imported.split(".")[1]
            if room and target != room and FLOORS[target] >= FLOORS[room]:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_inside_a_room_no_import_goes_in_a_circle() -> None:
    graph = {
        name: {i.removeprefix("aiolora.").replace(".", "/") for i in _imports(tree) if i.startswith("aiolora.")}
        for name, tree in _files()
        if name
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name in graph and name not in done:
            for other in graph[name]:
                if other != name:
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_outside_packages_stay_at_home() -> None:
    wrong = []
    for name, tree in _files():
        room = name.split("/")[0]
        for imported in _imports(tree):
            package = imported.split(".")[0]
            if package in HOMES and not {room, name} & HOMES[package]:
                wrong.append(f"{name} imports {imported}")
            if package == "torch" and room in NO_TORCH:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_the_environment_is_read_in_one_place_only() -> None:
    readers = {
        name
        for name, tree in _files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"config"}


def test_nobody_executes_pickles_or_strings() -> None:
    banned = {"eval", "exec", "compile"}
    for name, tree in _files():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{name} calls {node.func.id}"
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id != "torch", f"{name} calls torch.load"
