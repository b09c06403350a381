"""pytest tests/test_errors.py"""

from __future__ import annotations

import pytest

from minga.errors import UserError


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("más (a.txt). mend it", "más (a.txt). mend it"),
        ("two\nlines\r\n", "two lines"),
        ("red \x1b[31m, half \ud83d, wide \U000e0001", r"red \x1b[31m, half \ud83d, wide \U000e0001"),
        ("x" * 900, "x" * 900),
        ("a" * 10**6 + "b" * 10**6, "a" * 600 + " [...] " + "b" * 300),
    ],
)
def test_a_message_is_one_line_that_a_terminal_can_show(message: str, said: str) -> None:
    assert str(UserError(message)) == said


def test_what_grows_when_it_is_escaped_is_shortened_again() -> None:
    assert len(str(UserError("\0" * 900))) < 1000
