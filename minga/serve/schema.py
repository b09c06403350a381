"""Bodies of requests: pydantic models, from which the OpenAPI document is made too, and refusals that name the field.

A body is a `Body`: it refuses unknown fields, and nothing is converted: "1" is no number. `null` is the same as leaving a
field out. Fields of OpenAI's API that do not act here come in two kinds: those that do not change the answer are
`Ignored`, those that would are `Unsupported` and take null only, or the one value that changes nothing.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from minga.serve.errors import ApiError

MAX_DEPTH, MAX_NODES = 64, 250_000  # of a body: lists and objects in one another, and values in all

Model = TypeVar("Model", bound="Body")


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Here, and not by pydantic, for the refusal to know which names there are."""
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if isinstance(values, dict):
            field = cls.model_fields.get("type")
            kind = None if field is None or "type" not in values else field.annotation
            if get_origin(kind) is Literal and values["type"] not in get_args(kind):
                # its other fields are no mistakes then
                tag = {"name": "type", "given": values["type"], "known": list(get_args(kind))}
                raise PydanticCustomError("tag", "another type", tag)
            for name in values:
                if name not in known:
                    raise PydanticCustomError("unknown", "unknown parameter", {"name": name, "known": known})
        return values


Ignored = Annotated[Any, Field(description="Accepted; does not change the answer here.")]


def _refuse(value: Any) -> Any:
    if value is not None:
        raise ValueError("unsupported")
    return value


Unsupported = Annotated[
    Any, BeforeValidator(_refuse), WithJsonSchema({"type": "null", "description": "Not supported: leave it out."})
]


def few(most: int) -> BeforeValidator:
    """Refuses an object with more entries before each of them is checked. Lists have `fail_fast` for that."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("dict_too_long", "too long", {"max_length": most})
        return value

    return BeforeValidator(check)


def needs(field: str, **needed: Any) -> dict[str, Any]:
    """For the OpenAPI document: where the field is given, each of these has one of its values (None: or is left out)."""
    values = {name: list(value) if isinstance(value, tuple) else [value] for name, value in needed.items()}
    required = [name for name in values if None not in values[name]]
    there = {"properties": {name: {"enum": found} for name, found in values.items()}}
    return {"anyOf": [{"properties": {field: {"type": "null"}}}, there | ({"required": required} if required else {})]}


def parse_body(model: type[Model], body: bytes) -> Model:
    """The checked body. Raises `ApiError` 400 that says what is wrong, where, and what would be right."""
    return check(model, parse_json(body))


def check(model: type[Model], document: Any) -> Model:
    if not isinstance(document, dict):
        raise ApiError(f"the body must be an object, not {_type_name(document)}", code="invalid_type")
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise _refusal(error, document) from None


# ---------------------------------------------------------------------------------------------- JSON


def parse_json(body: bytes) -> Any:
    """The JSON document in `body`; it holds neither NaN nor half a character, and is not nested deeply."""
    try:
        text = body.decode("utf-8")
        document = json.loads(text, parse_constant=_refuse_constant, parse_float=_parse_float)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # only such escapes can make half a surrogate pair
            for path, value in _strings(document, ""):
                if re.search("[\ud800-\udfff]", value):
                    message = f"`{path}` holds half of a surrogate pair; send the whole character"
                    raise ApiError(message, param=path, code="invalid_value")
    except UnicodeDecodeError as error:
        raise _invalid_json(f"it is not UTF-8 from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid_json("it is nested too deeply") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise _invalid_json("it holds a number that is too long") from None
    _check_size(document)
    return document


def _check_size(document: Any) -> None:
    level, num_nodes = [document], 0
    for _ in range(MAX_DEPTH):
        num_nodes += len(level)
        if num_nodes > MAX_NODES:
            raise _invalid_json(f"it has more than {MAX_NODES} values")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise _invalid_json(f"it is nested deeper than {MAX_DEPTH} levels")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield (f"{path}.*" if path else "*"), name
            yield from _strings(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")


def _invalid_json(why: str) -> ApiError:
    return ApiError(f"the body is not valid JSON: {why}", code="invalid_json")


def _refuse_constant(name: str) -> None:
    raise _invalid_json(f"{name} is not a JSON number")


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # a reply that repeats it could not be written as JSON
        raise _invalid_json(f"{text[:80]} is too large a number")
    return value


# ---------------------------------------------------------------------------------------------- refusals

_TYPES = {
    "string_type": "a string", "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
    "none_required": "null",
}  # fmt: skip
_UNITS = {"string": "characters", "list": "entries", "dict": "entries"}


def _refusal(error: ValidationError, document: Any) -> ApiError:
    """The one that leads deepest into the document: of the forms that a field may have, the one that was meant."""
    found = [(*_place(each, document), each) for each in error.errors(include_url=False)]
    length = next((each for each in found if _is_length(each, found)), None)
    found = found if length is None else [length]
    deepest = max(len(path) for path, _, _ in found)
    ends = [each for each in found if len(each[0]) == deepest]
    path, value, first = next((each for each in ends if each[2]["type"] != "tag"), ends[0])
    here = [each for place, _, each in found if place == path]
    alternatives = [each["type"] for each in here]
    first = next((each for each in here if each["type"] not in _TYPES), first)  # of the form whose type is right
    if first["loc"][-1:] == ("[key]",):  # of an object: its name is wrong, and no value
        value = first["input"]
    kind, context, name = str(first["type"]), first.get("ctx") or {}, path_name(path)
    if all(each in _TYPES for each in alternatives):
        due = " or ".join(dict.fromkeys(_TYPES[each] for each in alternatives))
        return ApiError(f"`{name}` must be {due}, not {_type_name(value)}", param=name, code="invalid_type")
    if kind == "missing":
        return _missing(name)
    if kind == "union_tag_not_found":
        return _missing(f"{name}.{context['discriminator'].strip(chr(39))}")
    if kind == "union_tag_invalid":
        name = f"{name}.{context['discriminator'].strip(chr(39))}"
        return invalid(name, f"{short(context['tag'])} is not one of {context['expected_tags'].replace(chr(39), '')}")
    if kind == "tag":
        tags = [tag for each in here for tag in each["ctx"]["known"]]
        return invalid(name, f"{short(context['given'])} is not one of {', '.join(dict.fromkeys(tags))}")
    if kind == "unknown":
        return unknown(name, context["known"])
    if kind == "value_error":
        reason = str(context["error"])
        if reason == "unsupported":
            return ApiError(f"`{name}` is not supported here; leave it out", param=name, code="unsupported_parameter")
        return invalid(name, reason)
    return invalid(name, _reason(kind, context, value))


def _is_length(error: tuple[Any, Any, ErrorDetails], found: list[tuple[Any, Any, ErrorDetails]]) -> bool:
    """Whether a list is only too long or too short; what is wrong in it by other forms of the field are mere types."""
    path, _, details = error
    if details["type"] not in ("too_long", "too_short"):
        return False
    inner = (each["type"] for place, _, each in found if len(place) > len(path) and place[: len(path)] == path)
    return all(each in _TYPES for each in inner)


def _reason(kind: str, context: Mapping[str, Any], value: Any) -> str:
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        words = {
            "ge": "or more", "gt": "or more, and not that itself", "le": "or less", "lt": "or less, and not that itself",
        }  # fmt: skip
        (bound, limit), *_ = context.items()
        limit = int(limit) if float(limit).is_integer() else limit
        return f"{short(value)} is out of range; it must be {limit} {words[bound]}"
    if kind == "literal_error":
        return f"{short(value)} is not one of {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if kind.endswith(("too_short", "too_long")):
        unit = _UNITS.get(kind.partition("_")[0], "entries" if isinstance(value, list | dict) else "characters")
        least, most = context.get("min_length"), context.get("max_length")
        return f"it has {len(value)} {unit}, and {f'{least} is the least' if most is None else f'{most} is the most'}"
    if kind == "finite_number":
        return "it must be finite"
    if kind == "string_pattern_mismatch":
        return f"{short(value)} does not look like `{context['pattern']}`"
    return f"{short(value)} is not allowed here"


def _place(error: ErrorDetails, document: Any) -> tuple[tuple[int | str, ...], Any]:
    """The part of pydantic's location that leads through the document, and the value there: names of forms are left out."""
    path: list[int | str] = []
    value, loc = document, error["loc"]
    for index, step in enumerate(loc):
        is_last, is_missing = index == len(loc) - 1, error["type"] == "missing"
        if is_last and not is_missing and value is error["input"]:
            break  # at a form that is called as one of its own fields is
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if in_list or (isinstance(value, dict) and step in value):
            value = value[step]
        elif is_last and is_missing:
            value = None
        else:
            continue
        path.append(step)
    if error["type"] in ("unknown", "tag"):
        path.append(error["ctx"]["name"])
    return tuple(path), value


def path_name(path: tuple[int | str, ...]) -> str:
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step[:64]}" if name else step[:64]
    return name


def invalid(path: str, why: str) -> ApiError:
    return ApiError(f"invalid `{path}`: {why}", param=path, code="invalid_value")


def unknown(path: str, known: list[str]) -> ApiError:
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else "leave it out"
    return ApiError(f"unknown parameter `{path}`; {hint}", param=path, code="unknown_parameter")


def _missing(path: str) -> ApiError:
    return ApiError(f"`{path}` is missing", param=path, code="missing_required_parameter")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names[type(value)] if type(value) in names else f"the number {short(value)}"


def short(value: Any) -> str:
    """A value as it stands in a message, of bounded length."""
    if isinstance(value, (dict, list)):
        return _type_name(value)
    if isinstance(value, int) and abs(value) > 10**30:  # Python prints no whole number of more than 4,300 digits
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
