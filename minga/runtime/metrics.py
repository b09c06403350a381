"""`run.jsonl`: what happened in a run, one JSON object a line, readable while it is written and after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a file. Each line is flushed whole, so a killed run loses at most the line it was writing."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size and not _ends_with_newline(path):
            self._file.write("\n")  # a run that died in mid-line: its torn line must not swallow our first

    def write(self, kind: str, **values: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

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
