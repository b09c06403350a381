"""The descriptions of the dialects, and which one a model speaks.

A call is written as

    calls_begin  call_begin before_name NAME before_arguments ARGUMENTS after_arguments call_end  between ...  calls_end

and either NAME and ARGUMENTS stand between markers (DeepSeek, Minga), or they are two values of one JSON object
(Hermes, Llama). *Markers* are the strings that no text of the answer should be taken for. Where the vocabulary has a
marker as a token of its own, only that token is the marker and its spelling is text, so a model can quote the markup
without a call; where it has none, the spelling must do. `dialect_of` notes which are tokens in `Dialect.tokens`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from minga.data.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"


def _no_arguments() -> dict[str, Any]:
    return {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object.

    `strict`: the arguments are held to the schema; else they are any JSON object.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=_no_arguments)
    description: str = ""
    strict: bool = True

    def spec(self) -> dict[str, Any]:
        """The tool in OpenAI's shape, which chat templates know."""
        described = {"description": self.description} if self.description else {}
        return {
            "type": "function",
            "function": {"name": self.name, **described, "parameters": self.parameters or _no_arguments()},
        }


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is JSON text, exactly as the model wrote it."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Dialect:
    """How a family writes calls (see the module's docstring), reasoning, and the results of calls."""

    name: str
    before_arguments: str
    calls_begin: str = ""
    call_begin: str = ""
    before_name: str = ""
    after_arguments: str = ""
    call_end: str = ""
    between: str = ""
    calls_end: str = ""
    prefix: str = ""  # may stand before a call, and is not written
    separator: str = ""  # the marker between name and arguments; none: both are values of a JSON object
    results_begin: str = "<tool_response>\n"  # where the template has no turn for them
    results_end: str = "\n</tool_response>"
    think: str = THINK + "\n"
    end_think: str = "\n" + END_THINK + "\n\n"
    tokens: frozenset[str] = frozenset()

    @cached_property
    def opening(self) -> tuple[str, ...]:
        """The markers that may begin calls, first the one that is written; none where a call begins with its JSON."""
        markers = (self.calls_begin, self.call_begin.strip(), self.prefix)
        return tuple(marker for marker in markers if marker)

    @cached_property
    def closing(self) -> tuple[str, ...]:
        return tuple(marker for marker in (self.call_end.strip(), self.calls_end) if marker)

    @cached_property
    def markers(self) -> frozenset[str]:
        """All of them, those of reasoning included."""
        separator = (self.separator,) if self.separator else ()
        return frozenset((*self.opening, *separator, *self.closing, self.think.strip(), self.end_think.strip()))

    def write_head(self, name: str, markup: Callable[[str], str] = str) -> str:
        """What stands before the arguments of a call. `markup` maps what is neither name nor arguments."""
        name = name if self.separator else json.dumps(name, ensure_ascii=False)[1:-1]
        return markup(self.call_begin + self.before_name) + name + markup(self.before_arguments)

    @property
    def tail(self) -> str:
        """What stands behind the arguments of a call."""
        return self.after_arguments + self.call_end

    def write_calls(self, calls: Iterable[ToolCall], markup: Callable[[str], str] = str) -> str:
        written = (self.write_head(call.name, markup) + call.arguments + markup(self.tail) for call in calls)
        return markup(self.calls_begin) + markup(self.between).join(written) + markup(self.calls_end)


_DEEPSEEK: dict[str, Any] = {
    "calls_begin": "<｜tool▁calls▁begin｜>",
    "call_begin": "<｜tool▁call▁begin｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "calls_end": "<｜tool▁calls▁end｜>",
    "separator": "<｜tool▁sep｜>",
}


def _all_tokens(dialect: Dialect) -> Dialect:
    return replace(dialect, tokens=dialect.markers)


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        dialect.name: dialect
        for dialect in (
            # DeepSeek-V3 and R1.
            _all_tokens(
                Dialect(
                    "deepseek_v3",
                    before_name="function<｜tool▁sep｜>",
                    before_arguments="\n```json\n",
                    after_arguments="\n```",
                    between="\n",
                    **_DEEPSEEK,
                )
            ),
            _all_tokens(Dialect("deepseek_v3_1", before_arguments="<｜tool▁sep｜>", **_DEEPSEEK)),
            # Hermes 2 Pro and 3, Qwen 2.5 and 3.
            Dialect(
                "hermes",
                call_begin="<tool_call>\n",
                before_name='{"name": "',
                before_arguments='", "arguments": ',
                after_arguments="}",
                call_end="\n</tool_call>",
                between="\n",
            ),
            # Llama 3.1 to 3.3; the call is the whole answer.
            Dialect(
                "llama3",
                before_name='{"name": "',
                before_arguments='", "parameters": ',
                after_arguments="}",
                between="; ",
                prefix="<|python_tag|>",
            ),
            # For tokenizers that Minga trains: three tokens a call, and nothing else to learn, to force or to parse.
            _all_tokens(
                Dialect(
                    "minga",
                    call_begin="<|tool_call|>",
                    before_arguments="<|tool_args|>",
                    call_end="<|tool_end|>",
                    separator="<|tool_args|>",
                )
            ),
        )
    }
)

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


def dialect_of(tokenizer: Tokenizer) -> Dialect:
    """What the chat template writes, else what the vocabulary has markers for, else Hermes."""
    dialect = DIALECTS[_name_of(tokenizer)]
    return replace(dialect, tokens=frozenset(marker for marker in dialect.markers if has_token(tokenizer, marker)))


def _name_of(tokenizer: Tokenizer) -> str:
    template = without_comments(tokenizer.chat_template or "")
    deepseek, minga = DIALECTS["deepseek_v3"], DIALECTS["minga"]
    if deepseek.calls_begin in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v3_1"
    if "<tool_call>" in template:
        return "hermes"
    if all(has_token(tokenizer, marker) for marker in (*minga.opening, minga.separator, *minga.closing)):
        return "minga"
    if has_token(tokenizer, deepseek.calls_begin):
        return "deepseek_v3_1"
    if has_token(tokenizer, "<|python_tag|>") or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3"
    return "hermes"


def without_comments(template: str) -> str:
    return _COMMENT.sub("", template)


def token_of(tokenizer: Tokenizer, marker: str) -> int | None:
    """The id of the added token that is spelled so, or None: what ordinary text gives is no marker."""
    ids = tokenizer.encode(marker, specials=True)
    return ids[0] if len(ids) == 1 and ids != tokenizer.encode(marker) else None


def has_token(tokenizer: Tokenizer, marker: str) -> bool:
    return token_of(tokenizer, marker) is not None


def marker_tokens(tokenizer: Tokenizer, dialect: Dialect) -> dict[int, str]:
    """The tokens that are markers of the dialect: `StreamParser.push` wants each by itself, with `control`."""
    ids = {marker: token_of(tokenizer, marker) for marker in sorted(dialect.markers)}
    return {id: marker for marker, id in ids.items() if id is not None}
