"""JSON schemas at random: drawn, written to a file, read from one.

They nest up to three deep: objects, lists, choices, references, enums, patterns, formats, bounds. What may grow is
bounded (maxLength, maxItems, maximum, multipleOf of fractions), but for the names that an open object may invent.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORDS = ("id", "name", "tags", "über", "a b", 'say "hi"', "x/y~z", "size", "on", "line\nbreak")


def draw(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different schemas, the same ones for the same seed."""
    rng = random.Random(seed)
    drawn: dict[str, dict[str, Any]] = {}
    while len(drawn) < count:
        schema = _schema(rng, depth=rng.choice((0, 1, 2, 3)))
        drawn.setdefault(json.dumps(schema, sort_keys=True), schema)
    return list(drawn.values())


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = _NESTING if depth > 0 and rng.random() < 0.8 else _LEAVES
    return rng.choice(makers)(rng, depth)


def _scalar(rng: random.Random) -> Any:
    return rng.choice((None, True, False, rng.randrange(-99, 99), round(rng.uniform(-9, 9), 2), rng.choice(WORDS)))


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(4)
    kinds: list[dict[str, Any]] = [
        {"minLength": low, "maxLength": low + rng.randrange(1, 12)},
        {"maxLength": rng.randrange(1, 20)},
        {"pattern": rng.choice(("^[a-z]{2,8}$", r"^\d{3}-\d{4}$", "^(yes|no){1,3}!$", "^[A-F0-9]{4}$"))},
        {"format": rng.choice(("date", "uuid", "ipv4"))},
        {"format": "time", "maxLength": 24},
        {"format": "date-time", "maxLength": 40},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _number(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randrange(-999, 999)
    high = low + rng.randrange(1, 5000)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
        {"type": "integer", "minimum": -9999, "maximum": 9999, "multipleOf": rng.choice((2, 5, 7))},
        {"type": "number", "minimum": low, "maximum": high, "multipleOf": rng.choice((0.5, 0.25, 0.125))},
        {"type": rng.choice(("boolean", "null"))},
    ]
    return rng.choice(kinds)


def _enum(rng: random.Random, _: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"const": _scalar(rng)}
    return {"enum": [_scalar(rng) for _ in range(rng.randrange(1, 6))]}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randrange(1, 5))
    schema = {"type": "object", "properties": {name: _schema(rng, depth - 1) for name in names}}
    kind = rng.choice(("closed",) * 8 + ("patterned", "open"))
    if kind == "closed":
        required = rng.sample(names, rng.randrange(len(names) + 1))
        return schema | {"required": required, "additionalProperties": False}
    more: dict[str, Any] = {"additionalProperties": {"type": "boolean"}}
    if kind == "patterned":
        more = {"patternProperties": {"^[A-Z]{3,6}$": {"type": "boolean"}}, "additionalProperties": False}
    return schema | {"required": names, "maxProperties": len(names) + 1, **more}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(3)
    bounds = {"minItems": low, "maxItems": low + rng.randrange(1, 3)}
    if rng.random() < 0.2:
        return {"type": "array", "prefixItems": [_schema(rng, depth - 1) for _ in range(2)], "items": False}
    return {"type": "array", "items": _schema(rng, depth - 1), **bounds}


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]}


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    """Only at the root do definitions hold, so inside it is the plain schema."""
    inner = _schema(rng, depth - 1)
    if depth < 3 or "$defs" in json.dumps(inner):
        return inner
    pair = {"left": {"$ref": "#/$defs/thing"}, "right": {"$ref": "#/$defs/thing"}}
    return {
        "$defs": {"thing": inner},
        "type": "object",
        "properties": pair,
        "required": ["left"],
        "additionalProperties": False,
    }


_LEAVES = (_string, _string, _number, _number, _enum)
_NESTING = (_object, _object, _object, _array, _choice, _reference)


def write_schemas(schemas: Iterable[dict[str, Any]], file: Path) -> None:
    """One a line."""
    file.write_text("".join(json.dumps(schema) + "\n" for schema in schemas))


def read_schemas(file: Path) -> list[dict[str, Any]]:
    """As `write_schemas` wrote them, or somebody else's: any JSON a line."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
