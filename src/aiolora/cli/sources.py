"""Flags that are not typed: from the environment and from `--config FILE`, put behind the typed ones, which win."""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import yaml

from aiolora.config import said_in_environment
from aiolora.errors import ConfigError


def completed(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """What was typed, with what the sources say put behind the flags of the command that it names."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
            return [words[0], *completed(action.choices[words[0]], words[1:])]
    return with_sources(parser, words)


def with_sources(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`argv` of one command, completed. Where `parser` has no `--config` nothing else is looked at.

    Raises `ConfigError` for a file that cannot be read, is no mapping, or has a key that is no flag.
    """
    actions = {name: action for action in parser._actions for name in _names(action)}
    if "config" not in actions:
        return list(argv)
    typed = {name for name, action in actions.items() if any(_is_typed(flag, argv) for flag in action.option_strings)}
    variables = said_in_environment(set(actions) - {"help"})
    path = _value_of("--config", argv) or variables.get("config")
    said = {} if path is None else _read(path, actions)
    for name, text in variables.items():
        said[name] = _from_text(name, text, actions[name])
    model = said.pop("model", None)
    out = list(argv)
    if model is not None and not _has_positional(argv, actions):
        out.insert(0, str(model))
    for name, value in said.items():
        if name not in typed and name != "config":
            out += _words(name, value, actions[name])
    return out


def _names(action: argparse.Action) -> Iterator[str]:
    if not action.option_strings:
        yield action.dest
    yield from (flag[2:] for flag in action.option_strings if flag.startswith("--") and not flag.startswith("--no-"))


def _is_typed(flag: str, argv: Sequence[str]) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in argv)


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for word, following in zip(argv, [*argv[1:], None]):
        if word == flag:
            return following
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _read(path: str, actions: Mapping[str, argparse.Action]) -> dict[str, object]:
    try:
        said = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}".replace("\n", " ")) from None
    if not isinstance(said, dict):
        raise ConfigError(f"--config {path}: give the names of flags as keys, such as `max-loras: 16`")
    named = {str(key).replace("_", "-").removeprefix("--"): value for key, value in said.items()}
    for key in named:
        if key not in actions or key in ("help", "config"):
            close = difflib.get_close_matches(key, actions, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"--config {path}: {key!r} is no flag of this command{hint}")
    return {key: value for key, value in named.items() if value is not None}


def _from_text(name: str, text: str, action: argparse.Action) -> object:
    """A variable's text: for a flag of several values a list as in YAML, or values with commas between them."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if text.lower() not in ("0", "1", "false", "true"):
            raise ConfigError(f"AIOLORA_{name.upper().replace('-', '_')}={text!r}: say 1 or true, 0 or false")
        return text.lower() in ("1", "true")
    if action.nargs != "+":
        return text
    if text.startswith(("[", "{")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return [item.strip() for item in text.split(",") if item.strip()]


def _words(name: str, value: object, action: argparse.Action) -> list[str]:
    """The flag as it would be typed."""
    flag = f"--{name}"
    if isinstance(value, bool):
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else f"--no-{name}"]
        if action.nargs == 0:
            return [flag] if value else []
    if isinstance(value, dict) and name == "lora-modules":
        value = [f"{module}={path}" for module, path in value.items()] if "path" not in value else [value]
    items = value if isinstance(value, list) else [value]
    return [f"{flag}={msgspec.json.encode(item).decode() if isinstance(item, dict) else item}" for item in items]


def _has_positional(argv: Sequence[str], actions: Mapping[str, argparse.Action]) -> bool:
    """Whether one of `argv` is neither a flag nor the value of one."""
    left: float = 0  # values that the last flag may still take
    for word in argv:
        if word.startswith("--"):
            name = word[2:].removeprefix("no-") if word[2:] not in actions else word[2:]
            nargs = actions[name].nargs if name in actions else 0
            left = 0 if "=" in word or nargs == 0 else float("inf") if nargs == "+" else 1
        elif left > 0:
            left -= 1
        else:
            return True
    return False
