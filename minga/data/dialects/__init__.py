"""How model families write tool calls and reasoning: one description each, from which all else is made.

- `dialect.py`: the descriptions, and which of them a tokenizer calls for
- `prompt.py`: messages and tools -> token ids, and training samples
- `parser.py`: what a model writes, piece by piece -> text, reasoning and calls
- `scanning.py`: what the parser is made of
- `grammar.py`: tools -> a grammar that lets a model write only calls that fit them
"""

from minga.data.dialects.dialect import DIALECTS, Dialect, Tool, ToolCall, dialect_of, marker_tokens
from minga.data.dialects.grammar import CallGrammar, call_grammar, choice_grammar, json_grammar, regex_grammar
from minga.data.dialects.parser import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    Reasoning,
    StreamParser,
    Text,
)
from minga.data.dialects.prompt import conversation, opens_thinking, render_prompt

__all__ = [
    "DIALECTS",
    "CallArguments",
    "CallEnd",
    "CallGrammar",
    "CallStart",
    "Dialect",
    "Event",
    "Reasoning",
    "StreamParser",
    "Text",
    "Tool",
    "ToolCall",
    "call_grammar",
    "choice_grammar",
    "conversation",
    "dialect_of",
    "json_grammar",
    "marker_tokens",
    "opens_thinking",
    "regex_grammar",
    "render_prompt",
]
