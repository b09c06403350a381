"""The access log: one JSON object a line for each request, for people's `grep` and programs' `jq`.

It holds no prompt, no answer and no key: of a path, the part before `?` only, for clients put keys where they should not.
What clients choose (paths, ids) is escaped to printable ASCII, so that nobody can forge a line or write to a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from minga.errors import UserError

_LONGEST = 200  # characters of what a client chooses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """One request. `key` is the key's name. What is not known, as for a refused request, is None."""

    request_id: str
    method: str
    path: str
    status: int
    seconds: float
    key: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class AccessLog:
    """Appends to a file, which is created readable by its owner only, or writes to stderr where no path is given.

    Each line is one write and never in a buffer: a killed server has logged all that it answered, and a file that is cut
    by logrotate's `copytruncate` goes on from its start. A write that fails is reported once, and requests go on.
    Raises `UserError` for a file that cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.num_lost = 0
        self._owned = path is not None
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self._descriptor = sys.stderr.fileno() if path is None else os.open(path, flags, 0o600)
        except OSError as error:
            message = f"the access log cannot be opened: {error.strerror} ({path}). check the path and its permissions"
            raise UserError(message) from None

    def write(self, access: Access) -> None:
        try:
            data = line(access).encode("ascii")
            while data:  # a pipe or a disk that is nearly full takes a part
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self.num_lost += 1
            if self.num_lost == 1:
                log.error("the access log cannot be written, and requests go on: %s", error.strerror)

    def close(self) -> None:
        if self._owned:
            os.close(self._descriptor)


def line(access: Access, now: datetime | None = None) -> str:
    """`access` as a line of JSON, with the time in UTC in front."""
    moment = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds")
    entry: dict[str, Any] = {"time": moment.replace("+00:00", "Z"), **vars(access)}
    entry["path"] = access.path.partition("?")[0]
    entry["seconds"] = round(access.seconds, 4)
    entry = {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in entry.items()}
    # JSON leaves DEL, alone of all control characters, as it is
    return json.dumps(entry, ensure_ascii=True).replace("\x7f", "\\u007f") + "\n"
