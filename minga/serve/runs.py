"""What training runs have written so far: each folder under the runs folder that has a `run.jsonl`.

A run that is still going appends to its file. So the last line may be torn, and is left for the next reading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from time import time
from typing import Any

ALIVE_SECONDS = 60
MAX_LINES = 5000  # in one reply
_TAIL_BYTES = 1 << 20  # a summary reads no more than this of a long run


class Runs:
    def __init__(self, folder: Path):
        self._folder = folder

    def summaries(self) -> list[dict[str, Any]]:
        """One entry a run, the latest written first. `ended` is why it did, null if it has not."""
        found = []
        for name, path in self._files().items():
            stat = path.stat()
            alive = time() - stat.st_mtime < ALIVE_SECONDS
            summary = _summary(path, stat.st_mtime_ns, stat.st_size)
            found.append((stat.st_mtime, {"name": name, "alive": alive and summary["ended"] is None, **summary}))
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def lines(self, name: str, after: int) -> dict[str, Any] | None:
        """The entries from line `after` on, and where to go on reading; None if there is no such run.

        The name is looked up among the runs there are, so none leads out of the folder.
        """
        path = self._files().get(name)
        if path is None:
            return None
        whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is nothing, or torn
        lines = whole[after : after + MAX_LINES]
        return {"lines": list(_entries(lines)), "next": min(after, len(whole)) + len(lines)}

    def _files(self) -> dict[str, Path]:
        if not self._folder.is_dir():
            return {}
        paths = (folder / "run.jsonl" for folder in self._folder.iterdir())
        return {path.parent.name: path for path in paths if path.is_file()}


@lru_cache(maxsize=1024)
def _summary(path: Path, _modified: int, size: int) -> dict[str, Any]:
    """Read again only when the file has changed, which its time and size tell."""
    summary: dict[str, Any] = {"step": None, "loss": None, "bits_per_byte": None, "ended": None}
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).split(b"\n")
    for entry in _entries(lines):
        kind = entry.get("kind")
        if kind in ("start", "step", "end"):
            summary["ended"] = entry.get("reason", "done") if kind == "end" else None
        if kind == "step":
            summary |= {"step": entry.get("step"), "loss": entry.get("loss")}
        elif kind == "eval":
            summary["bits_per_byte"] = entry.get("bits_per_byte")
    return summary


def _entries(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; what JSON cannot say again, a loss of NaN, becomes null."""
    for line in lines:
        try:
            entry = json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None, parse_float=_finite)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None
