"""Grammars in llguidance's Lark: what a model may write next, made from a dialect and the tools.

Free text and reasoning are never constrained. Where the vocabulary has the opening marker as a token, that token
switches the grammar on (`CallGrammar.triggers`); else the grammar holds from the first token and leaves all text free
up to the marker. Inside calls nothing is free that need not be: the white space is that of Python's `json.dumps`, which
models are trained on, and with which most tokens of a call are forced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minga.data.dialects.dialect import Dialect, Tool, token_of
from minga.data.json_schema import closed, understood
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError

_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


@dataclass(frozen=True)
class CallGrammar:
    """`triggers`: the tokens that switch the grammar on, and with which it begins; none: it holds from the start."""

    lark: str
    triggers: frozenset[int]


def call_grammar(
    dialect: Dialect,
    tools: Sequence[Tool],
    *,
    choice: str = "auto",
    parallel: bool = True,
    tokenizer: Tokenizer,
    may_think: bool = False,
    thinking: bool = False,
) -> CallGrammar:
    """The calls that `tools` allow. `choice`: "auto", "required", or the name of the tool to call.

    `parallel`: several calls may follow each other, and the answer ends after them. `may_think`: reasoning may come
    first; `thinking`: the prompt ends inside it (`opens_thinking`), so it does. Raises `UserError` for a name that no
    tool has.
    """
    ids = {marker: token_of(tokenizer, marker) for marker in sorted(dialect.tokens)}
    tokens = {marker: id for marker, id in ids.items() if id is not None}
    tools = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not tools:
        raise UserError(f"no tool is named {choice!r} (tool_choice). name one of `tools`")
    opening = dialect.opening[0] if dialect.calls_begin or dialect.call_begin else ""
    triggers = frozenset({tokens[opening]} if choice == "auto" and opening in tokens else ())
    # Without a token for it, the opening marker ends the free text before the first call, so it is not said again.
    said = opening if choice == "auto" and not triggers else ""

    begin, between = dialect.calls_begin.removeprefix(said), dialect.between
    if said and not dialect.calls_begin:
        between += said
    calls = []
    rules = []
    for number, tool in enumerate(tools):
        head = dialect.write_head(tool.name)
        head = head if dialect.calls_begin else head.removeprefix(said)
        calls.append(f"call_{number}")
        schema = closed(tool.parameters or {"type": "object"}) if tool.strict else {"type": "object"}
        rules.append(f"call_{number}: {_terms(head, tokens)} args_{number} {_terms(dialect.tail, tokens)}")
        rules.append(f"args_{number}: {_json(schema)}")
    more = f" ({_terms(between, tokens)} call)*" if parallel else ""
    rules.append(f"call: {' | '.join(calls)}")
    rules.append(f"calls: {_terms(begin, tokens)} call{more} {_terms(dialect.calls_end, tokens)}")
    if triggers:
        return CallGrammar("\n".join(["start: calls", *rules]), triggers)

    forced = choice != "auto"
    # Where a token begins the calls that are due, text before it can only be reasoning, so that may begin unannounced.
    unannounced = forced and opening in tokens
    thoughts = _thoughts(dialect, tokens, unannounced, thinking) if may_think or thinking else []
    first = f"thoughts{'' if thinking else '?'} " if thoughts else ""
    prefix = f"(<[{tokens[dialect.prefix]}]>)? " if dialect.prefix in tokens else ""
    if forced:
        rules.append(f"start: {first}{prefix}calls")
    elif said:
        rules += [
            f"start: {first}(FREE | marked calls)",
            f"marked[lazy]: FREE {_literal(said)}",
            _free(dialect, thoughts),
        ]
    else:
        rules += [f"start: {first}(PROSE | {prefix}calls)", r"PROSE: /\s*([^{\s](?s:.*))?/"]
    return CallGrammar("\n".join([*rules, *thoughts]), frozenset())


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """JSON that fits the schema, or any JSON object."""
    return f"start: {_json({'type': 'object'} if schema is None else schema)}"


def regex_grammar(pattern: str) -> str:
    """Text that the pattern matches as a whole."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1:
        pattern = pattern[:-1]
    escaped = re.sub(r"\\.|/|\n|\r", lambda match: _ESCAPES.get(match.group(), match.group()), pattern, flags=re.DOTALL)
    return f"start: TEXT\nTEXT: /{escaped}/"


def choice_grammar(choices: Sequence[str]) -> str:
    """One of the texts."""
    return "start: " + " | ".join(map(_literal, choices))


# ---------------------------------------------------------------------------------------------- parts

_ESCAPES = {"/": "\\/", "\n": "\\n", "\r": "\\r", "\\\n": "\\n", "\\\r": "\\r"}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _terms(text: str, tokens: Mapping[str, int]) -> str:
    """The text as literals and, for the markers in it, tokens."""
    if not tokens:
        return _literal(text) if text else ""
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return " ".join(f"<[{tokens[piece]}]>" if piece in tokens else _literal(piece) for piece in pieces if piece)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**understood(schema), 'x-guidance': _OPTIONS}, ensure_ascii=False)}"


def _thoughts(dialect: Dialect, tokens: Mapping[str, int], unannounced: bool, thinking: bool) -> list[str]:
    """The rules for a block of reasoning, which nothing constrains but its end."""
    opening, closing = dialect.think.strip(), dialect.end_think.strip()
    if (opening in tokens) != (closing in tokens):
        return []
    if closing in tokens:
        begin = "" if thinking else f"(<[{tokens[opening]}]>)? " if unannounced else f"<[{tokens[opening]}]> "
        return [f"thoughts: {begin}THOUGHT <[{tokens[closing]}]> BREAK", r"THOUGHT: /(?s:.*)/", r"BREAK: /\n{0,2}/"]
    begin = "" if thinking else _literal(opening) + " "
    return [
        f"thoughts: {begin}thought BREAK",
        f"thought[lazy]: THOUGHT {_literal(closing)}",
        r"THOUGHT: /(?s:.*)/",
        r"BREAK: /\n{0,2}/",
    ]


def _free(dialect: Dialect, thoughts: Sequence[str]) -> str:
    """Free text, which does not begin as reasoning does: it would hide the reasoning from the grammar."""
    opening = dialect.think.strip()
    spelled = thoughts and opening not in dialect.tokens
    return "FREE: /(?s:.*)/" + (f" & ~(/{re.escape(opening)}/ /(?s:.*)/)" if spelled else "")
