"""What training runs have written so far: each folder under the runs folder that has a `run.jsonl`.

A run that is still going appends to its file. So the last line may be torn, and is left for the next reading.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from time import time
from typing import Any

ALIVE_SECONDS, ALIVE_STEPS = 60, 5  # silent for longer than both, a run is taken for dead
MAX_LINES = 5000  # in one reply
_TAIL_BYTES = 1 << 20  # a summary reads no more than this of a long run


class Runs:
    def __init__(self, folder: Path):
        self._folder = folder

    def summaries(self) -> list[dict[str, Any]]:
        """One entry a run, the latest written first. `ended` is why it did, null if it has not."""
        found = []
        for name, path in self._files().items():
            with suppress(OSError):  # deleted, or put out of our reach, since the folder was listed
                stat = path.stat()
                summary, pace = _summary(path, stat.st_mtime_ns, stat.st_size)
                alive = time() - stat.st_mtime < max(ALIVE_SECONDS, ALIVE_STEPS * pace)
                found.append((stat.st_mtime, {"name": name, "alive": alive and summary["ended"] is None, **summary}))
        return [entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def lines(self, name: str, after: int) -> dict[str, Any] | None:
        """The entries from line `after` on, and where to go on reading; None if there is no such run.

        The name is looked up among the runs there are, so none leads out of the folder.
        """
        try:
            whole = self._files()[name].read_bytes().split(b"\n")[:-1]
        except (KeyError, OSError):  # unknown, or gone since the folder was listed
            return None
        # what followed the last newline was nothing, or torn
        lines = whole[after : after + MAX_LINES]
        return {"lines": list(_entries(lines)), "next": min(after, len(whole)) + len(lines)}

    def _files(self) -> dict[str, Path]:
        try:
            paths = [folder / "run.jsonl" for folder in self._folder.iterdir()]
        except OSError:  # not there yet, or not ours to read
            return {}
        return {path.parent.name: path for path in paths if os.path.isfile(path)}


@lru_cache(maxsize=1024)
def _summary(path: Path, _modified: int, size: int) -> tuple[dict[str, Any], float]:
    """What the list shows of a run, and the seconds its latest step took.

    Read again only when the file has changed, which its time and size tell.
    """
    seconds: list[float] = []  # since the start, at each step
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
            seconds += [entry["seconds"]] if isinstance(entry.get("seconds"), int | float) else []
        elif kind == "eval":
            summary["bits_per_byte"] = entry.get("bits_per_byte")
    return summary, seconds[-1] - seconds[-2] if len(seconds) > 1 else 0.0


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
