"""Schemas, patterns and choices that a stranger may send: what passes compiles, what is hostile is refused at once."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from minga.data.json_schema import FORMATS, check_choices, check_regex, check_schema, closed, understood
from minga.errors import UserError


def compiles(schema: Any) -> str:
    return llguidance.LLMatcher.validate_grammar(f"start: %json {json.dumps(understood(schema))}")


def nested(depth: int, kind: str) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value} if kind == "schema" else {"default": [value]}
    return value


GOOD: list[Any] = [
    {},
    {"type": "object", "properties": {}},
    {"type": ["string", "null"], "enum": ["a", None], "default": {"not": 1}, "description": "x"},
    {"type": "object", "properties": {"not": {"type": "string"}, "$ref": {"type": "integer"}}, "required": ["not"]},
    {"$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}}}, "$ref": "#/$defs/a~1b"},
    {"properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "string", "maxLength": 5}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"type": "string", "pattern": r"^[A-Z]{2}\d{4}(-\w+)*$"},
    {"type": "string", "pattern": r"^[(?=]\p{L}[^\]]$"},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "format": "int32", "nullable": True, "example": "x", "$id": "http://nowhere/x"},
    {"type": "array", "prefixItems": [{"type": "string"}, True], "items": False, "uniqueItems": False, "minItems": 1},
    {"patternProperties": {"^x-": {"type": "string"}}},
    nested(31, "schema"),
    {"enum": list(range(1000))},
    *({"type": "string", "format": name} for name in sorted(FORMATS)),
]

HOSTILE: list[tuple[Any, str]] = [
    ([], r"no JSON object \(p\)"),
    ("{}", "no JSON object"),
    (nested(10_000, "schema"), "nested more than 32 deep"),
    (nested(10_000, "data"), "nested more than 32 deep"),
    ({"properties": {"a": nested(32, "schema")}}, r"nested more than 32 deep \(p\.properties\.a\.items"),
    ({"properties": {str(n): {} for n in range(4000)}}, "more than 1000 properties"),
    ({"items": {"properties": {str(n): {} for n in range(1001)}}}, r"1000 properties \(p\.items\)"),
    ({"enum": list(range(1001))}, "more than 1000 values"),
    ({"enum": ["x" * 1000] * 100}, "more than 65536 bytes"),
    ({"description": "x" * (1 << 20)}, "more than 65536 bytes"),
    ({"enum": [[]] * 1_000_000}, "more than 8192 values"),
    ({"anyOf": [{}] * 5_000}, "more than 8192 values"),
    ({"anyOf": [{"$ref": "#"}] * 257}, "more than 256 references"),
    ({"x" * 70_000: 1}, "more than 65536 bytes"),
    ({"properties": {"a": {"$ref": "http://evil/x.json"}}}, r"leads out of the schema \(p\.properties\.a\.\$ref\)"),
    ({"$ref": "other.json#/a"}, "leads out"),
    ({"$ref": "#anchor"}, "leads out"),
    ({"$ref": "#/$defs/x"}, "leads nowhere"),
    ({"$ref": 3}, "leads out"),
    ({"type": "any"}, '"any" is not known .*known: string'),
    ({"type": []}, "not known"),
    ({"type": ["string", {}]}, "not known"),
    ({"type": None}, "not known"),
    ({"minimum": float("nan")}, "not finite"),
    ({"default": [float("inf")]}, r"not finite \(p\.default\[0\]\)"),
    ({"maximum": 10**5000}, "not finite"),
    ({"default": "\ud800"}, "surrogate"),
    ({3: 1}, "no string"),
    ({"default": object()}, "no JSON value"),
    ({"properties": []}, "properties is no object"),
    ({"properties": {"a": 3}}, r"3 is no schema \(p\.properties\.a\)"),
    ({"anyOf": []}, "no list of schemas"),
    ({"enum": []}, "no list of values"),
    ({"required": "a"}, "no list of names"),
    ({"minItems": -1}, "no count"),
    ({"minLength": 1.5}, "no count"),
    ({"multipleOf": 0}, "no bound"),
    ({"minimum": "1"}, "no bound"),
    ({"pattern": 3}, "no regular expression"),
    ({"pattern": "(" * 400}, "does not compile"),
    ({"pattern": "x" * 513}, "513 characters"),
    ({"patternProperties": {"(": {}}}, r"does not compile .*\(p\.patternProperties\.\(\)"),
    ({"properties": {str(n): {"pattern": f"{n}" + "x" * 500} for n in range(100)}}, "more than 4096 characters"),
    *(({key: {}}, f"{key} is not supported \\(p\\.{key}\\)") for key in ("not", "if", "contains", "propertyNames")),
    ({"multipleOf": 1_000_003}, "multipleOf are too large"),
    ({"multipleOf": 1234.567}, "multipleOf are too large"),
    ({"multipleOf": 1e300}, "multipleOf are too large"),
    ({"items": {"allOf": [{"multipleOf": n} for n in (1009, 1013)]}}, "multipleOf are too large"),
    ({"uniqueItems": True}, "uniqueItems is not supported"),
]


@pytest.mark.parametrize("schema", GOOD, ids=lambda schema: json.dumps(schema)[:40])
def test_what_passes_compiles(schema: Any) -> None:
    check_schema(schema, "p")
    assert compiles(schema) == ""


@pytest.mark.parametrize(
    ("schema", "message"), HOSTILE, ids=lambda value: value[:20] if isinstance(value, str) else "s"
)
def test_what_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_schema(schema, "p")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("((a{1000}){1000}){1000}", "repeats too much"),
        ("(a{100}|b){201}", "repeats too much"),
        ("(?=a)b", "looks around"),
        (r"\bfoo", "looks around"),
        (r"(a)\1", "looks around"),
        ("(?P<n>a)(?P=n)", "looks around"),
        ("a**", "does not compile"),
        ("x{3,2}", "does not compile"),
    ],
)
def test_patterns_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_regex(pattern, "p")


@pytest.mark.parametrize(
    "pattern", ["", r"\\b", r"(?<year>\d{4})-\d{2}", "[[:alpha:]]", r"[\]{1}(]{3}", "a{,3}", "(a+)+$"]
)
def test_patterns_that_pass(pattern: str) -> None:
    check_regex(pattern, "p")


def test_choices() -> None:
    check_choices(["yes", "no"], "p")
    check_choices(["x" * 1024] * 256, "p")
    for choices, message in (
        ([], "no list"),
        ("yes", "no list"),
        ({"a": 1}, "no list"),
        (["a"] * 257, "257 choices"),
        (["a", "é" * 513], r"too long \(p\[1\]\)"),
        ([""], "no choice"),
        ([3], "no choice"),
        (["\ud800"], "surrogate"),
    ):
        with pytest.raises(UserError, match=message):
            check_choices(choices, "p")


def test_closed() -> None:
    inner = {"type": "object", "properties": {"b": {}}}
    schema = {"type": "object", "properties": {"a": inner, "free": {"type": "object"}}, "items": [inner]}
    assert closed(schema) == {
        "type": "object",
        "properties": {"a": {**inner, "additionalProperties": False}, "free": {"type": "object"}},
        "items": [{**inner, "additionalProperties": False}],
        "additionalProperties": False,
    }
    for kept in ({"properties": {}, "additionalProperties": {}}, {"properties": {}, "$ref": "#"}, {"allOf": [inner]}):
        assert closed(kept) == kept
