"""Guesses without a module: what followed when the last three tokens stood in the text before (prompt lookup decoding).

Worth much where an answer repeats its prompt (code, quotations, tables) and nothing elsewhere; it costs a few look-ups.
"""

from __future__ import annotations

_GRAM = 3
MAX_GUESSES = 4
_PATIENCE = 4  # steps with guesses, after which it is judged whether they pay
_LONGEST_PAUSE = 1024


class Grams:
    """Where each run of three tokens of a growing text last ended."""

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}
        self._num_seen = 0

    def after(self, ids: list[int]) -> list[int]:
        """Up to `MAX_GUESSES` tokens that followed the last occurrence of the text's last three."""
        for end in range(
            max(_GRAM, self._num_seen + 1), len(ids)
        ):  # the last three themselves come with the next token
            self._end_of[tuple(ids[end - _GRAM : end])] = end
        self._num_seen = max(self._num_seen, len(ids) - 1)
        end = self._end_of.get(tuple(ids[-_GRAM:]), len(ids))
        return ids[end : end + MAX_GUESSES]


class Lookup:
    """Whether such guesses pay: where reading them cost more than they gave, they rest for a while, ever longer."""

    def __init__(self) -> None:
        self._seconds = self._worth = 0.0
        self._num, self._pause, self._left = 0, 16, 0

    def worth_a_try(self) -> bool:
        self._left -= 1
        return self._left < 0

    def note(self, seconds: float, *, worth: float) -> None:
        """worth: seconds that the tokens which came would have taken without guesses."""
        self._seconds, self._worth, self._num = self._seconds + seconds, self._worth + worth, self._num + 1
        if self._num < _PATIENCE:
            return
        if self._worth > self._seconds:
            self._pause = 16
        else:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._left = self._pause
        self._seconds = self._worth = 0.0
        self._num = 0
