"""Who used what: a row for each request, and sums of rows.

Rows are written by one thread, some at a time, since each commit waits for the disk (store.py): the event loop only
appends to a list. A server that is killed loses the rows of the last fifth of a second. When a write fails, as on a full
disk, requests go on; the rows are kept for the next attempt, up to a bound, and above it the oldest are lost, and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Literal

from minga.errors import UserError
from minga.serve.store import Store

BATCH_SECONDS = 0.2
BATCH_ROWS = 256
RETRY_SECONDS = 5.0
MAX_UNWRITTEN_ROWS = 100_000  # about 50 MB

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """One request. Cached tokens are among those of the prompt, reasoning tokens among those of the completion.

    busy_seconds: the model's time that this request took; where several are answered side by side, its share of it.
    """

    key: str
    model: str
    endpoint: str
    request_id: str
    status: int = 200
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    busy_seconds: float = 0.0
    time: float = field(default_factory=time.time)  # seconds since 1970


class Meter:
    """Writes usage; `record` may be called from any thread. `close` it, or the last rows are lost."""

    def __init__(self, store: Store, *, batch_seconds: float = BATCH_SECONDS, max_unwritten: int = MAX_UNWRITTEN_ROWS):
        self.num_failed_writes = 0
        self.num_lost = 0
        # Of its own: who shares a connection with the writer waits for the disk with it, and keys are looked up on the loop.
        self._store = Store(store.path, create=False)
        self._batch_seconds, self._max_unwritten = batch_seconds, max_unwritten
        self._changed = threading.Condition()
        self._rows: list[Usage] = []
        self._num_begun = self._num_done = 0  # batches
        self._hurry = self._closing = self._failing = self._ended = False
        self._thread = threading.Thread(target=self._write_batches, name="minga-meter", daemon=True)
        self._thread.start()

    def record(self, usage: Usage) -> None:
        with self._changed:
            if self._closing:
                self.num_lost += 1
                return
            self._rows.append(usage)
            if len(self._rows) in (1, BATCH_ROWS):
                self._changed.notify_all()

    def flush(self) -> None:
        """Returns when all that was recorded before is on the disk, or could not be written. Not for the event loop."""
        with self._changed:
            due = self._num_begun + 1  # one that is under way may have begun before the last row came
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_done >= due or self._ended)

    def close(self) -> None:
        """Writes what is left and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._store.close()

    def _write_batches(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._hurry or self._closing)
                patience = max(self._batch_seconds, RETRY_SECONDS) if self._failing else self._batch_seconds
                self._changed.wait_for(self._is_due, timeout=patience)
                batch, self._rows = self._rows, []
                self._num_begun += 1
                closing, self._hurry = self._closing, False
            written = self._write(batch)
            with self._changed:
                if not written:
                    kept = [] if closing else (batch + self._rows)[-self._max_unwritten :]
                    self.num_lost += len(batch) + len(self._rows) - len(kept)
                    self._rows = kept
                self._num_done += 1
                self._ended = closing
                self._changed.notify_all()
            if closing:
                return

    def _is_due(self) -> bool:
        return self._hurry or self._closing or (len(self._rows) >= BATCH_ROWS and not self._failing)

    def _write(self, batch: Sequence[Usage]) -> bool:
        try:
            if batch:
                with self._store.transaction() as connection:
                    connection.executemany(_INSERT, map(_values, batch))
        except UserError as error:
            self.num_failed_writes += 1
            if not self._failing:
                log.error("usage cannot be written; requests go on, and it is tried again: %s", error)
            self._failing = True
            return False
        except Exception:  # a bug of ours: these rows would fail again, and must not hold up the next ones
            self.num_failed_writes += 1
            self.num_lost += len(batch)
            log.exception("usage cannot be written")
            return True
        if batch and self._failing:
            log.warning("usage is written again")
            self._failing = False
        return True


_FIELDS = [f.name for f in fields(Usage)]
_values = attrgetter(*_FIELDS)  # `dataclasses.astuple` copies deeply, at ten times the price
_INSERT = f"INSERT INTO usage ({', '.join(_FIELDS)}) VALUES ({', '.join('?' * len(_FIELDS))})"


# ---------------------------------------------------------------------------------------------- sums

By = Literal["key", "model", "day"]


@dataclass(frozen=True)
class Total:
    """Sums over the requests of one key, model or day."""

    group: str
    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    busy_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Total) -> Total:
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "group")
        return Total(self.group, *sums)


def report(store: Store, *, since: float | None = None, until: float | None = None, by: By = "key") -> list[Total]:
    """Usage from the time `since` up to but without `until`, in groups in the order of their names. Days are local ones."""
    group = {"key": "key", "model": "model", "day": "date(time, 'unixepoch', 'localtime')"}[by]
    sums = ", ".join(f"sum({f.name})" for f in fields(Total) if f.name not in ("group", "num_requests"))
    within = "time >= ? AND time < ?"
    times = (float("-inf") if since is None else since, float("inf") if until is None else until)
    rows = store.rows(f"SELECT {group}, count(*), {sums} FROM usage WHERE {within} GROUP BY 1 ORDER BY 1", times)
    return [Total(*row) for row in rows]
