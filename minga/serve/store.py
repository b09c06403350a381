"""One SQLite file for what a server must not forget: its API keys and who has used what.

A commit is on the disk when it returns. In WAL mode with synchronous=NORMAL it would survive a killed process, but not
a power cut: a revoked key could come to life again and billed tokens be gone. FULL costs one fsync a commit, and nobody
waits for it: keys change rarely, and usage is written in batches by a thread of its own (meter.py). WAL lets `minga usage`
read while the server writes, and a process killed in the middle leaves a file that opens with all that was committed.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minga.errors import UserError

DEFAULT_PATH = "minga.db"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x4D494E47  # "MING" in the file's header: tells our file from any other SQLite file
BUSY_SECONDS = 5.0  # how long a writer waits for another one, such as `minga keys add` for the server
_MAKING = threading.Lock()  # for the file to be made before another connection of this process opens it: see _make_file
_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,            -- the first digits of the key, which are no secret
    digest BLOB NOT NULL,           -- SHA-256 of the whole key
    name TEXT NOT NULL,
    created REAL NOT NULL,          -- seconds since 1970, as all times here
    revoked REAL,                   -- NULL while the key is good
    requests_per_minute INTEGER,    -- NULL: no limit, and so below
    tokens_per_minute INTEGER,
    max_concurrent INTEGER,
    max_output_tokens INTEGER
);
CREATE UNIQUE INDEX keys_name ON keys (name) WHERE revoked IS NULL;
CREATE TABLE usage (
    time REAL NOT NULL,
    key TEXT NOT NULL,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    request_id TEXT NOT NULL,
    status INTEGER NOT NULL,
    finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL,
    busy_seconds REAL NOT NULL
);
CREATE INDEX usage_time ON usage (time);
"""


class Store:
    """A connection to the file. Threads may share it, but one that commits makes the others wait for the disk.

    Raises `UserError` for a file that is no such file, is damaged, was written by a newer Minga, or cannot be written, when
    it is opened or at any time after.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True):
        """create: make the file where there is none, readable and writable by its owner only."""
        self.path = Path(path)
        self._lock = threading.Lock()
        with _MAKING:
            self._make_file(create)
        with self._told():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query finds. It waits for no writer of another connection."""
        with self._lock, self._told():
            return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside or, after an exception, nothing."""
        with self._lock, self._told():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite itself rolls back when the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    # ------------------------------------------------------------------ opening

    def _make_file(self, create: bool) -> None:
        """SQLite would create it readable by all; the files beside it, -wal and -shm, take over its mode.

        A file that is there is not opened: closing it again would drop the locks that other connections of this process
        hold on it, as POSIX has it, and another process would take the -wal away from under them.
        """
        try:
            if create:
                with suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            is_file = stat.S_ISREG(self.path.stat().st_mode)
            if is_file and not os.access(self.path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except FileNotFoundError:
            hint = "check the folder" if create else "`minga keys add NAME` makes it"
            raise UserError(f"there is no such file ({self.path}). {hint}") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot be opened: {reason} ({self.path}). check the path and its permissions") from None
        if not is_file:
            raise UserError(f"this is no file ({self.path}). choose another name")

    def _prepare(self) -> None:
        with self._told():
            if self._check_header() == 0:
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._create_schema()
            self._connection.execute("PRAGMA synchronous = FULL")

    def _check_header(self) -> int:
        """The schema's version, 0 in an empty file."""
        # In this order: where another process commits the schema in between, the application is its, whatever was read before.
        version, tables, application = (
            self._connection.execute(sql).fetchone()[0]
            for sql in ("PRAGMA user_version", "SELECT count(*) FROM sqlite_master", "PRAGMA application_id")
        )
        if application != APPLICATION_ID and (application or version or tables):
            raise UserError(f"this is another program's database ({self.path}). choose another name")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"the file has format {version}, and this Minga knows {SCHEMA_VERSION} ({self.path}). "
                "update Minga, or choose another file"
            )
        return int(version)

    def _create_schema(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            if self._check_header() == 0:  # another process may have been first
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    # ------------------------------------------------------------------ errors

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors that are the user's to mend, in the user's words."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            message = _MESSAGES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)  # without what SQLite adds to a code
            if message is None:
                raise
            what, remedy = message
            raise UserError(f"{what} ({self.path}). {remedy}") from error


_MESSAGES = {
    sqlite3.SQLITE_NOTADB: ("this is no SQLite file", "choose another name"),
    sqlite3.SQLITE_CORRUPT: ("the database is damaged", "`sqlite3 FILE .recover` saves what is left"),
    sqlite3.SQLITE_FULL: ("the disk is full", "free some space"),
    sqlite3.SQLITE_READONLY: ("the database cannot be written", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("the database cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_PERM: ("the database cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_BUSY: ("another program holds the database", "end it, or try again"),
    sqlite3.SQLITE_IOERR: ("the disk fails to read or write the database", "check the disk and the space on it"),
}
