"""JSON schemas, regular expressions and choices from strangers: what is refused before a grammar is made of them.

A schema of 30 KB can keep a grammar compiler busy for minutes, so its size is bounded first, without recursion and
without building anything, and its shape after that. What is refused is named with its place inside the schema. What
the grammar does not enforce is refused too, rather than ignored: an answer that was promised to fit has to fit.
Annotations, formats that no standard names, and keywords that are no JSON schema's are let pass.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from minga.errors import UserError

Place = tuple[Any, ...]  # (path,), or (the place around it, a key or an index)

MAX_BYTES = 1 << 16  # of compact JSON
MAX_DEPTH = 32  # of objects and lists inside each other
MAX_NODES = 8192  # objects, lists and other values
MAX_PROPERTIES = 1000
MAX_REFS = 256  # a compiler may need time in the cube of their number: 4,000 took 79 seconds
MAX_ENUM = 1000  # values, of all enums together
MAX_PATTERN = 512  # characters
MAX_PATTERNS = 4096  # characters of all patterns of a schema together
MAX_REPEATS = 20_000  # of the smallest parts of a pattern, its counted repetitions written out
MAX_MULTIPLE = 10_000  # of `multipleOf` together, without decimal points: an automaton has a state for each remainder
MAX_CHOICES = 256
MAX_CHOICE_BYTES = 1024

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# The formats that the grammar enforces; others are annotations, as the standard has it.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
_UNSUPPORTED = frozenset(
    (
        "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired", "dependentSchemas", "else",
        "if", "maxContains", "minContains", "not", "propertyNames", "then", "unevaluatedItems",
        "unevaluatedProperties", "uniqueItems",
    )
)  # fmt: skip
_ONE = ("items", "additionalProperties", "additionalItems")  # keywords whose value is a schema
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of them
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # an object of them
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def check_schema(schema: Any, path: str) -> None:
    """Raises `UserError` for a schema that is too large, that is none, or that a grammar cannot enforce.

    `path` names it in messages, such as `tools[0].function.parameters`.
    """
    if not isinstance(schema, Mapping):
        raise _refusal("the schema is no JSON object", path, 'send one, such as {"type": "object"}')
    _check_size(schema, path)
    properties = values = refs = 0
    multiples: set[int] = set()
    joined = False  # schemas that hold at once, whose multiples are those of both
    patterns: set[str] = set()
    for place, node in _schemas(schema, (path,)):
        if isinstance(node, bool):
            continue
        if not isinstance(node, Mapping):
            raise _refusal(f"{_shown(node)} is no schema", place, "send an object, true or false")
        _check_keywords(node, place, schema)
        for where, pattern in _patterns(node, place):
            if not isinstance(pattern, str) or pattern not in patterns:
                check_regex(pattern, _named(where))
                patterns.add(pattern)
            if sum(map(len, patterns)) > MAX_PATTERNS:
                raise _refusal(f"the patterns have more than {MAX_PATTERNS} characters", where, "send fewer")
        joined = joined or "allOf" in node or "$ref" in node
        if "multipleOf" in node:
            multiples.add(_without_point(node["multipleOf"]))
        properties += len(node.get("properties", ()))
        values += len(node.get("enum", ()))
        refs += "$ref" in node
        if properties > MAX_PROPERTIES:
            raise _refusal(f"the schema has more than {MAX_PROPERTIES} properties", place, "send fewer")
        if refs > MAX_REFS:
            raise _refusal(f"the schema has more than {MAX_REFS} references", place, "send fewer")
        if values > MAX_ENUM:
            raise _refusal(f"the schema has more than {MAX_ENUM} values in its enums", place, "send fewer")
    if (math.lcm(*multiples) if joined else sum(multiples)) > MAX_MULTIPLE:
        raise _refusal("its multipleOf are too large", path, f"without points they may come to {MAX_MULTIPLE} together")


def check_regex(pattern: Any, path: str) -> None:
    """Raises `UserError` for what is no regular expression, or is too large once its repetitions are written out."""
    if not isinstance(pattern, str):
        raise _refusal(f"{_shown(pattern)} is no regular expression", path, "send a string")
    if len(pattern) > MAX_PATTERN:
        raise _refusal(f"the pattern has {len(pattern)} characters", path, f"send at most {MAX_PATTERN}")
    bare = _ESCAPED_OR_CLASS.sub("x", pattern)
    if _LOOKS.search(bare) or _BACKREFERENCE.search(pattern):
        raise _refusal("the pattern looks around or back", path, "leave out (?=, (?!, (?<, \\b and \\1")
    try:
        re.compile(bare.replace("(?<", "(?P<"))  # not the escapes and classes, which differ from one engine to another
    except (re.error, RecursionError, OverflowError) as error:
        raise _refusal(f"the pattern does not compile ({error})", path, "mend it") from None
    if _repeats(bare) > MAX_REPEATS:
        raise _refusal("the pattern repeats too much", path, f"its repetitions may come to {MAX_REPEATS} parts")


def check_choices(choices: Any, path: str) -> None:
    """Raises `UserError` unless these are a few short texts."""
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise _refusal("the choices are no list of texts", path, "send at least one")
    if len(choices) > MAX_CHOICES:
        raise _refusal(f"there are {len(choices)} choices", path, f"send at most {MAX_CHOICES}")
    for index, choice in enumerate(choices):
        place = f"{path}[{index}]"
        if not isinstance(choice, str) or not choice:
            raise _refusal(f"{_shown(choice)} is no choice", place, "send a text that is not empty")
        if _num_bytes(choice, place) > MAX_CHOICE_BYTES:
            raise _refusal("the choice is too long", place, f"send at most {MAX_CHOICE_BYTES} bytes")


# ---------------------------------------------------------------------------------------------- what a grammar takes


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed to properties that it does not list, as strict tools have them.

    Objects that say themselves what else they may hold, that list nothing, or that are put together from several
    schemas (`allOf`, `$ref`) stay as they are.
    """
    compound = any("allOf" in node for _, node in _schemas(schema, ()) if isinstance(node, Mapping))

    def close(node: dict[str, Any]) -> dict[str, Any]:
        open_ended = {"additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref"} & node.keys()
        return node if open_ended or "properties" not in node else {**node, "additionalProperties": False}

    return dict(schema) if compound else _rewritten(schema, close)


def understood(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without what a grammar compiler would refuse or obey, and which means nothing here."""

    def strip(node: dict[str, Any]) -> dict[str, Any]:
        notes = {"$id", "x-guidance"}
        if node.get("format") not in FORMATS:
            notes.add("format")
        if not str(node.get("$schema")).startswith(("http://json-schema.org/", "https://json-schema.org/")):
            notes.add("$schema")
        if node.get("uniqueItems") is False:
            notes.add("uniqueItems")
        return {key: value for key, value in node.items() if key not in notes}

    return _rewritten(schema, strip)


def _rewritten(schema: Any, rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    node = dict(schema)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            node[key] = {name: _rewritten(item, rewrite) for name, item in value.items()}
        elif key in (*_ONE, *_LISTS) and isinstance(value, (list, tuple)):
            node[key] = [_rewritten(item, rewrite) for item in value]
        elif key in _ONE:
            node[key] = _rewritten(value, rewrite)
    return rewrite(node)


# ---------------------------------------------------------------------------------------------- size


def _check_size(schema: Any, path: str) -> None:
    """Counts bytes while it walks, so that the walk ends where the limit does."""
    room, num_nodes = MAX_BYTES, 0
    waiting: list[tuple[Any, Place, int]] = [(schema, (path,), 1)]
    while waiting:
        container, place, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _refusal(f"the schema is nested more than {MAX_DEPTH} deep", place, "flatten it")
        num_nodes += len(container) + 1
        if num_nodes > MAX_NODES:
            raise _refusal(f"the schema has more than {MAX_NODES} values", path, "send a smaller one")
        room -= 1 + max(1, len(container))  # brackets and commas
        for key, value in container.items() if isinstance(container, Mapping) else enumerate(container):
            if isinstance(container, Mapping):
                if not isinstance(key, str):
                    raise _refusal(f"the key {_shown(key)} is no string", place, "JSON has no other keys")
                room -= _num_bytes(key, place) + 3
            if isinstance(value, (Mapping, list, tuple)):
                waiting.append((value, (place, key), depth + 1))
            else:
                room -= _num_bytes_of_scalar(value, (place, key))
            if room < 0:
                raise _refusal(f"the schema has more than {MAX_BYTES} bytes", path, "send a smaller one")


def _num_bytes_of_scalar(value: Any, place: Place) -> int:
    if isinstance(value, str):
        return _num_bytes(value, place) + 2
    if isinstance(value, bool) or value is None:
        return 5 if value is False else 4
    if not isinstance(value, (int, float)):
        raise _refusal(f"{type(value).__name__} is no JSON value", place, "send plain JSON")
    if value != value or abs(value) > 1e308:
        raise _refusal("the number is not finite", place, "JSON has no such number")
    return len(repr(value))


def _num_bytes(text: str, place: Place | str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _refusal("the text holds half of a surrogate pair", place, "send the whole character") from None


# ---------------------------------------------------------------------------------------------- shape


def _schemas(schema: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """All schemas inside a schema, with their places; what is data (`enum`, `default`) is none."""
    waiting: list[tuple[Place, Any]] = [(place, schema)]
    while waiting:
        place, node = waiting.pop()
        yield place, node
        if not isinstance(node, Mapping):
            continue
        for key, value in node.items():
            if key in _MAPS and isinstance(value, Mapping):
                waiting += [(((place, key), name), item) for name, item in value.items()]
            elif key in (*_ONE, *_LISTS) and isinstance(value, (list, tuple)):
                waiting += [(((place, key), index), item) for index, item in enumerate(value)]
            elif key in _ONE:
                waiting.append(((place, key), value))


def _patterns(node: Mapping[str, Any], place: Place) -> Iterator[tuple[Place, Any]]:
    if "pattern" in node:
        yield (place, "pattern"), node["pattern"]
    for pattern in node.get("patternProperties", ()):
        yield ((place, "patternProperties"), pattern), pattern


def _check_keywords(node: Mapping[str, Any], place: Place, root: Mapping[str, Any]) -> None:
    for key, value in node.items():
        here = (place, key)
        if key in _UNSUPPORTED and not (key == "uniqueItems" and value is False):
            raise _refusal(f"{key} is not supported", here, "leave it out; the answer could not be held to it")
        if key in _MAPS and not isinstance(value, Mapping):
            raise _refusal(f"{key} is no object", here, "send an object of schemas")
        if key in _LISTS and not (isinstance(value, (list, tuple)) and value):
            raise _refusal(f"{key} is no list of schemas", here, "send at least one")
        if key in _COUNTS and not (type(value) is int and value >= 0):
            raise _refusal(f"{_shown(value)} is no count", here, "send a whole number, 0 or more")
        if key in _BOUNDS and (not isinstance(value, (int, float)) or (key == "multipleOf" and not value > 0)):
            raise _refusal(f"{_shown(value)} is no bound", here, "send a number")
        if key == "type":
            _check_type(value, here)
        elif key == "enum" and not (isinstance(value, (list, tuple)) and value):
            raise _refusal("the enum is no list of values", here, "send at least one")
        elif key == "required" and not _is_names(value):
            raise _refusal("required is no list of names", here, "send the names of the properties")
        elif key == "$ref":
            _check_ref(value, here, root)


def _check_type(value: Any, place: Place) -> None:
    types = value if isinstance(value, (list, tuple)) else [value]
    for type_ in types or [value]:
        if type_ not in TYPES:
            raise _refusal(f"the type {_shown(type_)} is not known", place, f"known: {', '.join(TYPES)}")


def _without_point(number: float) -> int:
    """0.25 -> 25"""
    digits = Decimal(repr(+number))
    return int(digits.scaleb(max(0, -int(digits.as_tuple().exponent))))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def _check_ref(ref: Any, place: Place, root: Any) -> None:
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        raise _refusal(f"the reference {_shown(ref)} leads out of the schema", place, 'refer to "#" or "#/$defs/..."')
    target = root
    for part in ref.split("/")[1:]:
        part = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and part in target:
            target = target[part]
        elif isinstance(target, (list, tuple)) and part.isascii() and part.isdigit() and int(part) < len(target):
            target = target[int(part)]
        else:
            raise _refusal(f"the reference {_shown(ref)} leads nowhere", place, "define what it refers to")


# ---------------------------------------------------------------------------------------------- patterns

_ESCAPED_OR_CLASS = re.compile(r"\\[^bB]|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_LOOKS = re.compile(r"\(\?(?:<?[=!])|\\[bB]")
_BACKREFERENCE = re.compile(r"(?:^|[^\\])(?:\\\\)*\\[1-9]|\(\?P=")
_PART = re.compile(r"\(|\)|\||[*+?]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


def _repeats(pattern: str) -> int:
    """How many parts the pattern has when `x{3}` is written `xxx`."""
    groups, last = [0], 0
    for match in _PART.finditer(pattern):
        part = match.group()
        if part == "(":
            groups.append(0)
            last = 0
        elif part == ")" and len(groups) > 1:
            last = groups.pop() or 1
            groups[-1] += last
        elif part.startswith("{") and match.group(1):
            times = max(int(match.group(1)), int(match.group(2) or 0))
            groups[-1] += last * (times - 1)
            last *= times
        elif part not in "*+?|":
            last = 1
            groups[-1] += 1
    return max(sum(groups), 0)


# ---------------------------------------------------------------------------------------------- messages


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."


def _named(place: Place) -> str:
    """`tools[0].function.parameters.properties.city`; a name that is long is cut."""
    parts: list[str] = []
    while len(place) == 2:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key[:80]}")
    return "".join([*map(str, place), *reversed(parts)])


def _refusal(what: str, place: Place | str, remedy: str) -> UserError:
    return UserError(f"{what} ({place if isinstance(place, str) else _named(place)}). {remedy}")
