"""`run.jsonl`: what happened in a run, one JSON object a line, readable while it is written and after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minga.errors import UserError


class MetricsLog:
    """Appends to a file. Each line is written at once, so a killed run loses at most the line it was writing.

    Raises `UserError` when the file cannot be written, as on a full disk.
    """

    def __init__(self, path: Path):
        self._path = path
        # without a buffer: one that could not be emptied would be tried again, and fail again, at the program's end
        self._file = path.open("ab", buffering=0)
        if path.stat().st_size and not _ends_with_newline(path):
            self._append("\n")  # a run that died in mid-line: its torn line must not swallow our first

    def write(self, kind: str, **values: Any) -> None:
        self._append(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")

    def _append(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[self._file.write(data) :]
        except OSError as error:
            raise UserError(
                f"cannot write the run's log: {error.strerror} ({self._path}). free some space or check the rights, and "
                "give the same command: the run goes on from its last checkpoint"
            ) from None

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; torn ones are passed over."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # not splitlines: a text may hold U+2028
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
