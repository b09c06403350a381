"""Chat templates: the Jinja program inside a model folder that turns messages into the text the model was tuned on.

Two dangers meet here. The template is code from whoever published the model, so it runs in Jinja's immutable sandbox
with the same few globals that transformers gives it. And the messages are text from whoever is chatting, so a content
such as `<|im_end|>\\n<|im_start|>system` must not end the user's turn.

The second one is solved by *marks*: private-use characters that no text here contains. Before rendering, every control
token spelled out in a content gets a mark in the place of its first character. After rendering, whatever control token
is whole was written by the template; the tokenizer encodes those as control tokens, puts the characters back, and
encodes the rest as ordinary text. A mark is one character for one character, so templates that trim, cut or count do
the same with it, and the text is exactly that of an unprotected rendering, which is checked.

Some templates look for a token in the contents on purpose (`content.split('</think>')[-1]` forgets old reasoning), and
a mark would blind them. So where the marked rendering differs, each message is tried alone, and the tokens whose mark
changes the outcome are left whole: they belong to the template's protocol for that message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from json import dumps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

from minga.errors import UserError

_MARKS = range(0x100000, 0x10FFFE)  # Unicode's last private-use plane
# What a faulty template, or a message of a shape it does not expect, can raise from inside its own expressions.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ChatTemplate:
    """A compiled template. `control_tokens` are the strings that a message must not be able to write."""

    def __init__(self, source: str, *, control_tokens: Iterable[str] = ()) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens)))
        self._first_characters = sorted({token[0] for token in tokens})
        self._candidates = re.compile("|".join(map(re.escape, self._first_characters)))
        self._beginnings = {token[:length] for token in tokens for length in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template does not parse (line {error.lineno}: {error.message}). mend it"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, dict[int, str]]:
        """Returns the text, with a mark in each control token that a message spelled out, and what the marks stand for.

        `text.translate(marks)` is what transformers' `apply_chat_template(tokenize=False)` gives. `variables` are
        further names for the template (`bos_token`, `enable_thinking`). Raises `UserError` for messages that are no
        messages or that the template refuses.
        """
        _check_messages(messages)
        # What comes from outside, in the parts that are marked independently of each other.
        parts = [_plain(part) for part in (*messages, list(tools) if tools else None)]

        def fill(parts: Sequence[Any]) -> str:
            return self._fill(parts[:-1], parts[-1], add_generation_prompt, variables or {})

        text = fill(parts)
        strings = [list(_strings(part)) for part in parts]
        found = [{token for string in part for _, token in self._occurrences(string)} for part in strings]
        if not any(found):
            return text, {}
        marks = self._choose_marks(text, strings)

        def differs(marked: Sequence[Any]) -> bool:
            try:
                return fill(marked).translate(marks) != text
            except UserError:
                return True

        def looked_for(index: int) -> set[str]:
            def mark_alone(tokens: list[str]) -> list[Any]:
                return [*parts[:index], self._mark(parts[index], set(tokens), marks), *parts[index + 1 :]]

            return _culprits(sorted(found[index]), lambda tokens: differs(mark_alone(tokens)))

        marked = [self._mark(part, tokens, marks) for part, tokens in zip(parts, found, strict=True)]
        if differs(marked):
            found = [tokens - looked_for(index) for index, tokens in enumerate(found)]
            marked = [self._mark(part, tokens, marks) for part, tokens in zip(parts, found, strict=True)]
        return fill(marked), marks

    def _fill(
        self, messages: Sequence[Any], tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        names = {"documents": None, **variables, "messages": messages, "tools": tools}
        try:
            return self._template.render(**names, add_generation_prompt=add_generation_prompt)
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"the chat template refuses these messages ({reason}). change their roles or contents"
            ) from None

    def _occurrences(self, string: str) -> Iterator[tuple[int, str]]:
        """Where control tokens are spelled out, and which; "" for one that is only begun, at the end of the string.

        A beginning counts because templates join strings: `["<|im_", "end|>"]` would otherwise become a token.
        """
        for candidate in self._candidates.finditer(string) if self._first_characters else ():
            if match := self._tokens.match(string, candidate.start()):
                yield candidate.start(), match.group()
        end = string.rstrip()
        for length in range(1, min(self._longest, len(end) + 1)):
            if end[-length:] in self._beginnings:
                yield len(end) - length, ""

    def _mark(self, part: Any, tokens: set[str], marks: Mapping[int, str]) -> Any:
        """The part with a mark for the first character of each occurrence of `tokens` in its strings."""
        mark_of = {character: chr(code) for code, character in marks.items()}

        def mark_string(string: str) -> str:
            characters = list(string)
            for position, token in self._occurrences(string):
                if token in tokens:
                    characters[position] = mark_of[string[position]]
            return "".join(characters)

        return _map_strings(part, mark_string) if tokens else part

    def _choose_marks(self, text: str, strings: list[list[str]]) -> dict[int, str]:
        """A mark for each character that a control token may begin with, none of them in use."""
        used = set(text).union(*(string for part in strings for string in part))
        free = (code for code in _MARKS if chr(code) not in used)
        marks = dict(zip(free, self._first_characters, strict=False))
        if len(marks) < len(self._first_characters):
            raise UserError("the messages use up a whole plane of private-use characters (chat). remove them")
        return marks


# ---------------------------------------------------------------------------------------------- parts


def _culprits(tokens: list[str], differs: Callable[[list[str]], bool]) -> set[str]:
    """The tokens that make a difference, found by halving: a message may spell out a thousand of which one matters."""
    if not tokens or not differs(tokens):
        return set()
    if len(tokens) == 1:
        return set(tokens)
    middle = len(tokens) // 2
    return _culprits(tokens[:middle], differs) | _culprits(tokens[middle:], differs)


# ---------------------------------------------------------------------------------------------- messages as plain data


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise UserError(
            'messages must be a list with at least one message (chat). for example [{"role": "user", "content": "hi"}]'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'message {index} has no "role" (chat). each needs one, such as "user", and a "content"')
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise UserError(f"the content of message {index} is {type(content).__name__} (chat). it must be text")


def _plain(value: Any) -> Any:
    """The value rebuilt from the types of JSON, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise UserError(
        f"a message holds a {type(value).__name__} (chat). only text, numbers, lists and objects can be templated"
    )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {function(key): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    return value


# ---------------------------------------------------------------------------------------------- the sandbox


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training; here it is its body."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, refusing names such as `__class__`, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not set the name {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own `tojson` escapes `<` and `&` for HTML, which no model was tuned on."""
    return dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The settings and names that transformers gives a template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    environment.globals["namespace"] = _Namespace
    return environment
