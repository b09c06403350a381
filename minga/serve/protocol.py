"""The wire: what a chat request may say, and what the replies look like.

Validation is written by hand, so that each refusal names the field it is about (`messages[1].content`), as OpenAI's own
API does. Three kinds of fields it does not act on are told apart: those that do not change the answer are accepted,
those that would change it are refused unless they hold the value that changes nothing, and unknown ones are refused
with the name that was probably meant. `null` is the same as leaving a field out.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from minga.engine.sampler import MAX_SEED, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from minga.data.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 1024
MAX_BIASES = 1024
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # after each token the text is compared with every beginning of every stop
MAX_TOP_LOGPROBS = 20
# Below these float32 has nothing left to divide by. So small a temperature is greedy, so small a mass one token.
_MIN_TEMPERATURE, _MIN_TOP_P = 1e-5, 1e-6
_MIN_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stream", "stream_options", "n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
    "logit_bias",
)  # fmt: skip
_HARMLESS = (
    "user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention",
)  # fmt: skip
# Fields that would change the answer, with the value that does not; None where there is no such value.
_UNSUPPORTED: dict[str, Any] = {
    "tools": None, "tool_choice": "none", "functions": None, "function_call": "none",
    "response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "prediction": None,
    "web_search_options": None, "reasoning_effort": "none", "verbosity": "medium", "moderation": None,
}  # fmt: skip
_MESSAGE_FIELDS = ("role", "content")
# What clients send back with an assistant's message, and has no place in a chat template here.
_MESSAGE_HARMLESS = ("name", "refusal", "annotations", "reasoning", "reasoning_content")
_MESSAGE_UNSUPPORTED: dict[str, Any] = {"tool_calls": [], "tool_call_id": None, "function_call": None, "audio": None}


class ApiError(Exception):
    """A request that is refused or fails: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return types.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def document(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.document(), self.status, self.headers)


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_bytes(document), status, headers, media_type="application/json")


def json_bytes(document: Any) -> bytes:
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair, \ud83d, is written so in JSON too


# ---------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class ChatRequest:
    """A valid request. `messages` have nothing but a role and a text."""

    model: str | None
    messages: list[dict[str, str]]
    sampling: SamplingParams
    max_tokens: int | None
    stream: bool
    include_usage: bool

    def params_within(self, room: int) -> SamplingParams:
        """How to sample an answer for which the context has `room` tokens left."""
        return replace(self.sampling, max_tokens=min(self.max_tokens or DEFAULT_MAX_TOKENS, room))


def parse_json(body: bytes) -> Any:
    """The JSON document in `body`; it holds neither NaN nor half a character."""
    try:
        text = body.decode("utf-8")
        document = json.loads(text, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # only such escapes can make half a surrogate pair
            _refuse_lone_surrogates(document, "")
    except UnicodeDecodeError as error:
        raise _invalid_json(f"it is not UTF-8 from byte {error.start} on") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid_json("it is nested too deeply") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise _invalid_json("it holds a number that is too long") from None
    return document


def parse_chat_request(document: Any) -> ChatRequest:
    if not isinstance(document, dict):
        raise _wrong_type("", "an object", document)
    fields = Fields(document, "", known=_FIELDS, harmless=_HARMLESS, unsupported=_UNSUPPORTED)
    if (fields.whole("n", 1) or 1) > 1:
        raise _unsupported("n", 1)
    stream = fields.flag("stream")
    return ChatRequest(
        model=fields.text("model"),
        messages=_messages(fields.value("messages")),
        sampling=_sampling(fields),
        max_tokens=_max_tokens(fields),
        stream=stream,
        include_usage=_include_usage(fields.value("stream_options"), stream),
    )


def _sampling(fields: Fields) -> SamplingParams:
    temperature = fields.number("temperature", 0, 2)
    top_p = fields.number("top_p", 0, 1)
    seed = fields.whole("seed", -MAX_SEED - 1, MAX_SEED)
    if top_p == 0:
        raise _invalid("top_p", "0 leaves no token; for the likeliest one set temperature to 0")
    return SamplingParams(
        temperature=1.0 if temperature is None else temperature if temperature >= _MIN_TEMPERATURE else 0,
        top_p=1.0 if top_p is None else max(top_p, _MIN_TOP_P),
        top_k=fields.whole("top_k", 0) or 0,
        min_p=fields.number("min_p", 0, 1) or 0.0,
        seed=None if seed is None else seed % (MAX_SEED + 1),
        stop=_stops(fields.value("stop")),
        logprobs=_num_logprobs(fields),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        logit_bias=_logit_bias(fields.value("logit_bias")),
    )


def _logit_bias(value: Any) -> dict[int, float]:
    """Token ids, which JSON has as strings, to what is added to their logits."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong_type("logit_bias", "an object", value)
    if len(value) > MAX_BIASES:
        raise _invalid("logit_bias", f"it has {len(value)} tokens, and {MAX_BIASES} is the most")
    biases = Fields(value, "logit_bias", known=list(value))
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise _invalid("logit_bias", f"{_short(token)} is no token id; write ids as strings of digits")
    return {int(token): biases.number(token, -100, 100) or 0.0 for token in value}


def _num_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise _invalid("top_logprobs", "it needs `logprobs` set to true")
    return (top or 0) if wanted else None


def _max_tokens(fields: Fields) -> int | None:
    """`max_completion_tokens`, or its older name."""
    new, old = fields.whole("max_completion_tokens", 1), fields.whole("max_tokens", 1)
    if new is not None and old is not None and new != old:
        raise _invalid("max_tokens", "it differs from `max_completion_tokens`, which says the same; send one of them")
    return old if new is None else new


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise _wrong_type("stop", "a string or a list of strings", value)
    if len(stops) > MAX_STOPS:
        raise _invalid("stop", f"it has {len(stops)} strings, and {MAX_STOPS} is the most")
    for index, stop in enumerate(stops):
        path = "stop" if isinstance(value, str) else f"stop[{index}]"
        if not isinstance(stop, str):
            raise _wrong_type(path, "a string", stop)
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise _invalid(path, f"it has {len(stop)} characters, and 1 to {MAX_STOP_LENGTH} are allowed")
    return tuple(stops)


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise _invalid("stream_options", "it needs `stream` set to true")
    if not isinstance(options, dict):
        raise _wrong_type("stream_options", "an object", options)
    return Fields(options, "stream_options", known=["include_usage"], harmless=["include_obfuscation"]).flag(
        "include_usage"
    )


def _messages(value: Any) -> list[dict[str, str]]:
    if value is None:
        raise _missing("messages")
    if not isinstance(value, list):
        raise _wrong_type("messages", "a list", value)
    if not value:
        raise _invalid("messages", 'it is empty; send at least {"role": "user", "content": "..."}')
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong_type(path, "an object", value)
    fields = Fields(value, path, known=_MESSAGE_FIELDS, harmless=_MESSAGE_HARMLESS, unsupported=_MESSAGE_UNSUPPORTED)
    role = fields.text("role")
    if role is None:
        raise _missing(f"{path}.role")
    if role not in _ROLES:
        raise _invalid(f"{path}.role", f"{_short(role)} is not one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _content(fields.value("content"), f"{path}.content")}


def _content(value: Any, path: str) -> str:
    if value is None:
        raise _missing(path)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong_type(path, "a string or a list of text parts", value)
    if not value:
        raise _invalid(path, "it is an empty list; send a text")
    return "\n".join(_text_part(part, f"{path}[{index}]") for index, part in enumerate(value))


def _text_part(value: Any, path: str) -> str:
    if not isinstance(value, dict):
        raise _wrong_type(path, "an object", value)
    kind = value.get("type")
    if kind != "text":
        raise _invalid(f"{path}.type", f'{_short(kind)} is not supported; this model reads "text" parts only')
    text = Fields(value, path, known=["type", "text"], harmless=["prompt_cache_breakpoint"]).text("text")
    if text is None:
        raise _missing(f"{path}.text")
    return text


class Fields:
    """The fields of one JSON object, all of them known; each is read with its type checked."""

    def __init__(
        self,
        values: Mapping[str, Any],
        path: str,
        *,
        known: Sequence[str],
        harmless: Sequence[str] = (),
        unsupported: Mapping[str, Any] | None = None,
    ):
        neutral = unsupported or {}
        self._values, self._path = values, path
        for name, value in values.items():
            if name in neutral and value is not None and value != neutral[name]:
                raise _unsupported(self.path(name), neutral[name])
            if name not in (*known, *harmless, *neutral):
                raise self._unknown(name, (*known, *neutral, *harmless))

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def value(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise _wrong_type(self.path(name), "a string", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong_type(self.path(name), "true or false", value)
        return bool(value)

    def whole(self, name: str, low: int, high: int = MAX_SEED) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_type(self.path(name), "a whole number", value)
        return int(self._within(name, value, low, high))

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _wrong_type(self.path(name), "a number", value)
        return float(self._within(name, value, low, high))

    def _within(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            limits = f"{low} or more" if high == MAX_SEED else f"from {low} to {high}"
            raise _invalid(self.path(name), f"{_short(value)} is out of range; it must be {limits}")
        return value

    def _unknown(self, name: str, known: Iterable[str]) -> ApiError:
        near = difflib.get_close_matches(name[:64], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "leave it out"
        path = self.path(name[:64])
        return ApiError(f"unknown parameter `{path}`; {hint}", param=path, code="unknown_parameter")


# ---------------------------------------------------------------------------------------------- refusals


def _wrong_type(path: str, due: str, value: Any) -> ApiError:
    where = f"`{path}`" if path else "the body"
    message = f"{where} must be {due}, not {_type_name(value)}"
    return ApiError(message, param=path or None, code="invalid_type")


def _invalid(path: str, why: str) -> ApiError:
    return ApiError(f"invalid `{path}`: {why}", param=path, code="invalid_value")


def _missing(path: str) -> ApiError:
    return ApiError(f"`{path}` is missing", param=path, code="missing_required_parameter")


def _unsupported(path: str, neutral: Any) -> ApiError:
    hint = "leave it out" if neutral is None else f"leave it out or send {json.dumps(neutral)}"
    return ApiError(f"`{path}` is not supported here; {hint}", param=path, code="unsupported_parameter")


def _invalid_json(why: str) -> ApiError:
    return ApiError(f"the body is not valid JSON: {why}", code="invalid_json")


def _refuse_constant(name: str) -> None:
    raise _invalid_json(f"{name} is not a JSON number")


def _refuse_lone_surrogates(value: Any, path: str) -> None:
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise ApiError(
            f"`{path}` holds half of a surrogate pair; send the whole character", param=path, code="invalid_value"
        )
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_lone_surrogates(name, f"{path}.*" if path else "*")
            _refuse_lone_surrogates(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_lone_surrogates(item, f"{path}[{index}]")


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names[type(value)] if type(value) in names else f"the number {_short(value)}"


def _short(value: Any) -> str:
    """A value as it stands in a message, of bounded length."""
    if isinstance(value, (dict, list)):
        return _type_name(value)
    if isinstance(value, int) and abs(value) > 10**30:  # Python prints no whole number of more than 4,300 digits
        return f"a number of {math.floor(math.log10(abs(value))) + 1} digits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------------------------- replies


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer share."""

    id: str
    created: int
    model: str

    def completion(
        self, text: str, finish_reason: str, logprobs: dict[str, Any] | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._document("chat.completion", [choice]) | {"usage": usage}

    def chunk(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._document("chat.completion.chunk", [choice])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._document("chat.completion.chunk", []) | {"usage": usage}

    def _document(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


def logprobs_document(logprobs: Sequence[TokenLogprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """OpenAI's shape. `bytes` lets a client put characters together that tokens have cut in two."""
    if logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token_id)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(spelled)}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}
