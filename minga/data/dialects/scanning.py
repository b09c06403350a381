"""Finding things in a text that is still coming, each character looked at once: fixed strings, and ends of JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any


class Literals:
    """A few strings to find in a text that is still coming."""

    def __init__(self, literals: Iterable[str]) -> None:
        self._literals = sorted(filter(None, literals), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._literals)))
        self._beginnings = {literal[:length] for literal in self._literals for length in range(1, len(literal))}
        self._longest = max(map(len, self._literals), default=0)

    def search(self, text: str, start: int, final: bool) -> tuple[int, str]:
        """Where the first of them is, and which; else "" and where the text ends that cannot be the beginning of one."""
        match = self._pattern.search(text, start) if self._literals else None
        if match:
            return match.start(), match.group()
        if not final:
            for length in range(min(self._longest - 1, len(text) - start), 0, -1):
                if text[-length:] in self._beginnings:
                    return len(text) - length, ""
        return len(text), ""

    def match(self, text: str, start: int, final: bool) -> str | None:
        """The one that stands here, "" for none, or None where that cannot be said yet."""
        match = self._pattern.match(text, start) if self._literals else None
        if match:
            return match.group()
        rest = text[start : start + self._longest]
        return None if not final and rest in self._beginnings else ""


_SCALAR_END = re.compile(r"[\s,\]}<]")
_OUTSIDE = re.compile(r'["{}\[\]<]')
_INSIDE = re.compile(r'["\\\x00-\x1f]')


class Scanner:
    """Finds where a JSON value ends, or where it can no longer be one: at `<`, or at a line break inside a string."""

    def __init__(self) -> None:
        self.in_string = self.ended = self.broken = False
        self._escaped = self._scalar = False
        self._depth = -1  # not begun

    def feed(self, text: str, start: int, stop: int) -> int:
        """Reads `text[start:stop]` up to where the value ends, which it returns."""
        at = start
        if self._depth < 0:
            self._depth = 0
            self._scalar = text[at] not in '"{['
        if self._scalar:
            match = _SCALAR_END.search(text, at, stop)
            self.ended = match is not None
            return match.start() if match else stop
        while at < stop and not self.ended:
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            match = (_INSIDE if self.in_string else _OUTSIDE).search(text, at, stop)
            if match is None:
                return stop
            at, character = match.end(), match.group()
            if character == '"':
                self.in_string = not self.in_string
            elif character == "\\":
                self._escaped = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            else:
                self.broken = True
                return match.start()
            self.ended = not self.in_string and self._depth == 0
        return at


def parsed(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are JSON to Python only

    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def is_object(text: str) -> bool:
    return isinstance(parsed(text), dict)
