"""The command line: one module for each subcommand, with `add_parser(subparsers)` and `run(args) -> int`.

`main` finds the module by the command's name and imports no other. A module imports what is heavy inside `run`.
"""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(rows: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """A table for a terminal or a file; the first `num_texts` columns are texts, the others numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:{'<' if i < num_texts else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
