"""What a model writes, piece by piece, taken apart into text, reasoning and calls.

The parser is a machine that reads each character once and keeps back only what may still turn out to be markup: the
beginning of a marker, the white space before one, a call whose name is not known yet. So any division of an answer into
pieces gives the same result, an argument of any length streams as it comes, and the time is linear whatever is written.

A call is announced when its name is a declared one and its arguments have begun. Until then its text is kept, and if it
turns out to be none it comes out as `Text`: nothing that a model wrote is lost. What is wrong after that is counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from minga.data.dialects.dialect import Dialect
from minga.data.dialects.scanning import Literals, Scanner, is_object, parsed

_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{_SPACE}]*")
_NAME = re.compile(r"[^\s{`<]*")
_LONGEST_NAME = 256  # characters of a name, a key, or what else stands before them
_ARGUMENT_KEYS = ("arguments", "parameters")  # models mix them up
_OTHER_KEYS = ("id", "type")  # what a Llama may write beside them


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The `index`-th call of the answer begins; its arguments and its end follow."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    index: int


Event = Text | Reasoning | CallStart | CallArguments | CallEnd


class _Fate(Enum):
    """Of the call that is being read."""

    OPEN = auto()  # its text is kept
    ACCEPTED = auto()  # its arguments are streamed
    REFUSED = auto()  # it is text, all of it


class StreamParser:
    """Reads one answer. `tools` are the declared names: a call to another is text, and without any so is all markup.

    `thinking`: the prompt ends inside the reasoning. `malformed` counts the calls that could not be read: bad JSON, an
    undeclared name, cut off. No input raises.
    """

    def __init__(self, dialect: Dialect, *, tools: Sequence[str] = (), thinking: bool = False) -> None:
        self.malformed = 0
        self._dialect = dialect
        self._tools = frozenset(tools)
        self._think, self._end_think = dialect.think.strip(), dialect.end_think.strip()
        opening = dialect.opening if tools else ()
        self._bare = bool(tools) and not dialect.calls_begin and not dialect.call_begin
        self._call_markers = frozenset((*opening, *dialect.closing, dialect.separator)) - {""} if tools else frozenset()
        # The markers that are recognised by their spelling, in the answer, in the reasoning, and inside calls.
        self._in_text = Literals(marker for marker in (*opening, *dialect.closing) if tools and self._spelled(marker))
        self._in_thought = Literals(marker for marker in (self._think, self._end_think) if self._spelled(marker))
        self._in_calls = Literals(filter(self._spelled, self._call_markers))
        self._first = Literals(filter(self._spelled, [self._think]))

        self._events: list[Event] = []
        self._buffer, self._at = "", 0
        self._space: list[str] = []  # white space that is text unless markup follows
        self._thought = False
        self._state: Callable[[bool], bool] = self._read_thought if thinking else self._read_start
        # The call that is being read.
        self._num_calls = 0
        self._orphans: frozenset[str] = frozenset()  # closing markers of a call that was given up
        self._in_section = False
        self._section_has_calls = False
        self._begin_call("")

    # ------------------------------------------------------------------ what the caller uses

    def push(self, text: str, control: bool = False) -> list[Event]:
        """What this piece adds. `control`: it is one token of the vocabulary, spelled out, and not ordinary text.

        Every token of `marker_tokens` has to come so. Others that come so are left out, as in decoded text.
        """
        if not control:
            self._buffer = self._buffer[self._at :] + text
            self._at = 0
            self._run(final=False)
        elif text in self._dialect.markers:
            self._run(final=True)
            self._read_marker(text)
        return self._take_events()

    def close(self) -> list[Event]:
        """What is left at the end of the answer."""
        self._run(final=True)
        if self._state in (self._read_start, self._read_answer):
            self._flush_space()
        elif self._state == self._read_section:
            self._leave_section()
            self._flush_space()
        elif self._state not in (self._read_thought, self._read_between):
            self._give_up()
            self._flush_space()
        return self._take_events()

    # ------------------------------------------------------------------ the machine

    def _run(self, final: bool) -> None:
        """Reads on until the state wants more text. `final`: what may be the beginning of a marker is none."""
        while self._at < len(self._buffer) and self._state(final):
            pass

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _spelled(self, marker: str) -> bool:
        return marker not in self._dialect.tokens

    def _skip_space(self) -> str:
        """Reads white space; what follows, if anything, is something else."""
        match = _SPACES.match(self._buffer, self._at)
        assert match
        self._at = match.end()
        return match.group()

    def _read_marker(self, marker: str) -> None:
        """A marker that was met in whatever state."""
        if self._state == self._read_thought:
            self._end_thought_at(marker)
        elif self._state in (self._read_start, self._read_answer, self._read_between):
            self._answer_marker(marker)
        elif self._state == self._read_section:
            if marker == self._dialect.call_begin:
                self._keep(marker)
                self._state = self._read_head
            elif marker == self._dialect.calls_end:
                self._leave_section(marker)
            else:
                self._leave_section()
                self._answer_marker(marker)
        elif self._state == self._read_tail and marker in self._dialect.closing:
            self._close_call(marker)
        elif self._state == self._read_head and marker == self._dialect.separator:
            self._keep(marker)
            self._end_head()
        elif self._quotes(marker):
            self._take_string(marker)
        else:
            self._give_up()
            self._answer_marker(marker)

    def _quotes(self, marker: str) -> bool:
        """Whether the marker is part of a JSON string: code about markup is a plausible argument."""
        inside = self._state in (self._read_arguments, self._read_object) and self._scanner.in_string
        return inside and (not self._dialect.separator or marker not in self._call_markers)

    def _take_string(self, text: str) -> None:
        if self._state == self._read_arguments:
            self._argue(text)
        else:
            self._string.append(text)
            self._keep(text)

    # ------------------------------------------------------------------ text and reasoning

    def _read_start(self, final: bool) -> bool:
        """Nothing but white space so far."""
        self._space.append(self._skip_space())
        if self._at == len(self._buffer):
            return False
        marker = self._first.match(self._buffer, self._at, final)
        if marker is None:
            return False
        if marker:
            self._at += len(marker)
            self._answer_marker(marker)
        else:
            self._begin_bare_call_or_text()
        return True

    def _read_between(self, final: bool) -> bool:
        """After reasoning or a call: white space belongs to the markup, and so does what stands between bare calls."""
        self._space.append(self._skip_space())
        if self._at == len(self._buffer):
            return False
        if self._bare and self._num_calls and self._buffer[self._at] == ";" and ";" not in self._space:
            self._space.append(";")
            self._at += 1
            return True
        if ";" not in self._space:
            self._space = []
        self._begin_bare_call_or_text()
        return True

    def _begin_bare_call_or_text(self) -> None:
        if self._bare and self._buffer[self._at] == "{":
            self._begin_call("")
            self._state = self._read_object
        else:
            self._state = self._read_answer

    def _read_answer(self, final: bool) -> bool:
        start, marker = self._in_text.search(self._buffer, self._at, final)
        self._say(self._buffer[self._at : start])
        self._at = start + len(marker)
        if marker:
            self._answer_marker(marker)
        return bool(marker)

    def _answer_marker(self, marker: str) -> None:
        """A marker outside of reasoning and calls."""
        if marker in self._dialect.opening and marker in self._call_markers:
            self._begin_call(marker)
            self._in_section = marker == self._dialect.calls_begin
            if not self._dialect.separator:
                self._state = self._read_object
            else:
                self._section_has_calls = False
                self._state = self._read_section if self._in_section else self._read_head
        elif marker in self._orphans:
            self._orphans -= {marker}
            self._state = self._read_between
        elif marker == self._think:
            self._space = []
            self._thought = False
            self._state = self._read_thought
        elif marker != self._end_think:
            self._say(marker)
            self._state = self._read_answer

    def _say(self, text: str) -> None:
        body = text.rstrip(_SPACE) if self._tools else text
        if body:
            self._events.append(Text("".join(self._space) + body))
            self._space = []
        self._space.append(text[len(body) :])

    def _flush_space(self) -> None:
        if text := "".join(self._space):
            self._events.append(Text(text))
        self._space = []

    def _read_thought(self, final: bool) -> bool:
        start, marker = self._in_thought.search(self._buffer, self._at, final)
        self._ponder(self._buffer[self._at : start])
        self._at = start + len(marker)
        if marker:
            self._end_thought_at(marker)
        return bool(marker)

    def _end_thought_at(self, marker: str) -> None:
        begins_call = bool(self._dialect.separator) and marker in self._dialect.opening and marker in self._call_markers
        if begins_call or marker == self._end_think:
            self._space = []
            self._state = self._read_between
            if begins_call:
                self._answer_marker(marker)
        elif marker != self._think or self._thought:
            self._ponder(marker)

    def _ponder(self, text: str) -> None:
        """White space at both ends of the reasoning belongs to the markup."""
        text = text if self._thought else text.lstrip(_SPACE)
        body = text.rstrip(_SPACE)
        if body:
            self._events.append(Reasoning("".join(self._space) + body))
            self._space = []
            self._thought = True
        self._space.append(text[len(body) :])

    # ------------------------------------------------------------------ calls

    def _begin_call(self, marker: str) -> None:
        self._fate = _Fate.OPEN
        self._kept = [marker]  # the text of a call that is not decided yet
        self._name: str | None = None
        self._arguments: list[str] = []
        self._arguments_ended = False
        self._scanner = Scanner()
        self._head = ""
        self._fence = Literals(())  # what may stand here
        self._key: str | None = None
        self._string: list[str] = []
        self._expects = "{"
        self._orphans = frozenset()

    def _keep(self, text: str) -> None:
        """Markup of a call."""
        if self._fate is _Fate.OPEN:
            self._kept.append(text)
        elif self._fate is _Fate.REFUSED:
            self._say(text)

    def _decide(self) -> None:
        """The name is known and the arguments begin."""
        if self._name in self._tools:
            assert self._name is not None
            self._space = []
            self._fate = _Fate.ACCEPTED
            self._section_has_calls = True
            self._events.append(CallStart(self._num_calls, self._name))
            self._num_calls += 1
        else:
            self._refuse()
            self.malformed += 1

    def _refuse(self) -> None:
        self._fate = _Fate.REFUSED
        self._say("".join(self._kept))

    def _argue(self, text: str) -> None:
        """Text of the arguments."""
        self._arguments.append(text)
        if self._fate is _Fate.ACCEPTED and text:
            self._events.append(CallArguments(self._num_calls - 1, text))
        else:
            self._keep(text)

    def _end_arguments(self) -> None:
        self._arguments_ended = True
        if self._fate is _Fate.ACCEPTED:
            self._events.append(CallEnd(self._num_calls - 1))
            self.malformed += not is_object("".join(self._arguments))

    def _give_up(self) -> None:
        """What follows does not belong to the call."""
        if self._fate is _Fate.OPEN:
            # A bare object is an answer like any other until it calls something.
            self.malformed += not self._bare or self._kept[0] != "" or self._name in self._tools
            self._refuse()
        elif self._fate is _Fate.ACCEPTED:
            if not self._arguments_ended:
                self._events.append(CallEnd(self._num_calls - 1))
                self.malformed += 1
            self._orphans = frozenset(self._dialect.closing)
        self._state = self._read_answer

    def _close_call(self, marker: str) -> None:
        """The closing marker of a call, or of all where that of the call is missing."""
        self._keep(marker)
        refused = self._fate is _Fate.REFUSED
        if marker == self._dialect.calls_end:
            self._state = self._read_answer if refused else self._read_between
        elif self._in_section:
            self._begin_call("")
            self._state = self._read_section
        else:
            self._orphans = frozenset() if refused else frozenset({self._dialect.calls_end})
            self._state = self._read_answer if refused else self._read_between

    # ------------------------------------------------------------------ calls between markers

    def _read_section(self, final: bool) -> bool:
        """Where a call may begin, inside the markers around all calls."""
        self._keep(self._skip_space())
        if self._at == len(self._buffer):
            return False
        marker = self._in_calls.match(self._buffer, self._at, final)
        if marker is None:
            return False
        if marker:
            self._at += len(marker)
            self._read_marker(marker)
        else:
            self._leave_section()
        return True

    def _leave_section(self, marker: str = "") -> None:
        if self._section_has_calls:
            self._orphans = frozenset() if marker else frozenset({self._dialect.calls_end})
            self._state = self._read_between if marker else self._read_answer
        else:
            self.malformed += self._kept[0] != ""  # there was not even a call that could be refused
            self._say("".join(self._kept) + marker)
            self._state = self._read_answer

    def _read_head(self, final: bool) -> bool:
        """What stands before the separator: the name, or the kind of tool."""
        start, marker = self._in_calls.search(self._buffer, self._at, final)
        text = self._buffer[self._at : start]
        self._keep(text)
        self._head += text
        self._at = start
        if len(self._head) > _LONGEST_NAME:
            self._give_up()
            return True
        self._at += len(marker)
        if marker:
            self._read_marker(marker)
        return bool(marker)

    def _end_head(self) -> None:
        self._fence = Literals([self._dialect.before_arguments.replace(self._dialect.separator, "").strip()])
        if self._dialect.separator in self._dialect.before_name:
            self._head = ""
            self._state = self._read_name
        else:
            self._name = self._head.strip(_SPACE)
            self._state = self._read_opening

    def _read_name(self, final: bool) -> bool:
        """The name up to the white space behind it."""
        match = _NAME.match(self._buffer, self._at)
        assert match
        self._keep(match.group())
        self._head += match.group()
        self._at = match.end()
        if len(self._head) > _LONGEST_NAME:
            self._give_up()
        elif self._at < len(self._buffer):
            self._name = self._head
            self._state = self._read_opening
        return True

    def _read_opening(self, final: bool) -> bool:
        """The fence and the brace with which the arguments begin."""
        if not self._pass_fence(final):
            return False
        if self._buffer[self._at] != "{":
            self._give_up()
        else:
            self._decide()
            self._state = self._read_arguments
        return True

    def _pass_fence(self, final: bool) -> bool:
        """Reads white space and the fence, if it is there; False where more text is wanted."""
        while True:
            self._keep(self._skip_space())
            if self._at == len(self._buffer):
                return False
            marker = self._fence.match(self._buffer, self._at, final)
            if marker is None:
                return False
            if not marker:
                return True
            self._fence = Literals(())
            self._keep(marker)
            self._at += len(marker)

    def _read_arguments(self, final: bool) -> bool:
        end = self._scanner.feed(self._buffer, self._at, len(self._buffer))
        self._argue(self._buffer[self._at : end])
        self._at = end
        if self._scanner.broken:
            self._give_up()
        elif self._scanner.ended:
            self._end_arguments()
            if self._dialect.separator:
                self._fence = Literals([self._dialect.after_arguments.strip()])
                self._state = self._read_tail
            else:
                self._key, self._expects = None, ",}"
                self._state = self._read_object
        return True

    def _read_tail(self, final: bool) -> bool:
        """What stands behind a call that has been read to its end."""
        if not self._pass_fence(final):
            return False
        marker = self._in_calls.match(self._buffer, self._at, final)
        if marker is None:
            return False
        self._at += len(marker)
        if marker:
            self._read_marker(marker)
        else:
            self._give_up()
        return True

    # ------------------------------------------------------------------ calls that are JSON objects

    def _read_object(self, final: bool) -> bool:
        """One step through the object. `expects`: the characters that may come next; "": inside a key or a value."""
        if not self._expects:
            return self._read_string()
        self._keep(self._skip_space())
        if self._at == len(self._buffer):
            return False
        character = self._buffer[self._at]
        if "*" in self._expects:
            return self._begin_value(character)
        if character not in self._expects:
            if self._arguments_ended and self._fate is not _Fate.OPEN:  # a missing brace takes nothing from the call
                self._state = self._read_tail
            else:
                self._give_up()
            return True
        if character == '"':
            self._begin_string()
            return True
        self._keep(character)
        self._at += 1
        if character == "}":
            self._end_object()
        else:
            self._expects = {"{": '"}', ",": '"', ":": "*"}[character]
        return True

    def _end_object(self) -> None:
        if self._fate is _Fate.OPEN:
            self._give_up()
        elif self._bare:
            self._state = self._read_between if self._fate is _Fate.ACCEPTED else self._read_answer
        else:
            self._state = self._read_tail

    def _begin_string(self) -> None:
        self._scanner, self._string, self._expects = Scanner(), [], ""

    def _begin_value(self, character: str) -> bool:
        if self._key in _ARGUMENT_KEYS and not self._arguments:
            if character != "{":
                self._give_up()
                return True
            if self._name is not None:
                self._decide()
                self._scanner = Scanner()
                self._state = self._read_arguments
                return True
        self._begin_string()
        return True

    def _read_string(self) -> bool:
        """A key, or a value other than arguments that can be streamed."""
        holds_arguments = self._key in _ARGUMENT_KEYS and not self._arguments_ended
        bounded = self._key in (None, "name")
        room = max(0, _LONGEST_NAME - sum(map(len, self._string))) if bounded else len(self._buffer)
        end = self._scanner.feed(self._buffer, self._at, min(len(self._buffer), self._at + room))
        text = self._buffer[self._at : end]
        self._at = end
        self._keep(text)
        self._string.append(text)
        if self._scanner.ended:
            self._end_string("".join(self._string), holds_arguments)
        elif self._scanner.broken or (bounded and len(text) >= room):
            self._give_up()
        return True

    def _end_string(self, text: str, holds_arguments: bool) -> None:
        if self._key is None:
            self._key, self._expects = parsed(text), ":"
            if not isinstance(self._key, str) or (
                self._bare and self._key not in ("name", *_ARGUMENT_KEYS, *_OTHER_KEYS)
            ):
                self._give_up()
            return
        if self._key == "name" and self._name is None:
            name = parsed(text)
            if not isinstance(name, str) or not text.startswith('"'):
                self._give_up()
                return
            self._name = name
            if self._arguments:
                self._decide()
                if self._fate is _Fate.ACCEPTED:
                    self._events.append(CallArguments(self._num_calls - 1, "".join(self._arguments)))
                self._end_arguments()
        elif holds_arguments and not self._arguments:
            self._arguments = [text]
        self._key, self._expects = None, ",}"
