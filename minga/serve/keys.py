"""API keys: who may ask, and how much.

A key is `mk-` and 64 hexadecimal digits from the system's random source. The first 12 are its id, by which it is found and
listed; the other 52 are 208 bits of secret. Only the SHA-256 of the whole is stored. Slow hashes (argon2, scrypt) are for
passwords, which people choose and machines guess; nobody guesses 208 random bits, however fast the hash, and a slow one
would let strangers keep the server busy with wrong keys.

Nothing is kept in memory: each look-up reads the file by the id, in some microseconds, so that a key that was added or
revoked by `minga keys` counts from the next request on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import astuple, dataclass, fields

from minga.errors import UserError
from minga.serve.store import Store

STATIC_NAME = "default"
_ID = slice(3, 15)
_KEY = re.compile(r"mk-[0-9a-f]{64}")
_NAME = re.compile(r"[^\W_][\w.@+-]{0,63}")  # also fit for a table, a log and a shell


@dataclass(frozen=True)
class Key:
    """A good key's name and its limits; None is no limit."""

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True)
class KeyRecord:
    """A key as it is listed. Times are seconds since 1970; `revoked` is None while it is good."""

    key: Key
    id: str
    created: float
    revoked: float | None


_LIMITS = tuple(field.name for field in fields(Key) if field.name != "name")
_COLUMNS = ", ".join(("name", *_LIMITS))


class Keys:
    """The keys of a store, and the one of `--api-key`, which is named "default" and has no limits."""

    def __init__(self, store: Store | None = None, *, static: str | None = None):
        self._store = store
        self._static = None if static is None else _digest(static)

    def add(
        self,
        name: str,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrent: int | None = None,
        max_output_tokens: int | None = None,
    ) -> str:
        """A new key, which can be read here and never again. Raises `UserError` for a name that is taken or no name."""
        key = Key(name, requests_per_minute, tokens_per_minute, max_concurrent, max_output_tokens)
        _check(key)
        secret = f"mk-{secrets.token_hex(32)}"
        with self._opened().transaction() as connection:
            if connection.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone():
                raise UserError(f"there is a key named {name} already (keys). revoke it, or choose another name")
            connection.execute(
                f"INSERT INTO keys (id, digest, created, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (secret[_ID], _digest(secret), time.time(), *astuple(key)),
            )
        return secret

    def list(self) -> list[KeyRecord]:
        """All of the store, revoked ones too, oldest first."""
        rows = self._opened().rows(f"SELECT id, created, revoked, {_COLUMNS} FROM keys ORDER BY created, id")
        return [KeyRecord(Key(*limits), id, created, revoked) for id, created, revoked, *limits in rows]

    def revoke(self, name: str) -> None:
        """From now on the key opens nothing; its usage stays. Raises `UserError` if there is no such key."""
        with self._opened().transaction() as connection:
            change = "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL"
            if not connection.execute(change, (time.time(), name)).rowcount:
                raise UserError(f"there is no key named {name} (keys). `minga keys list` shows them all")

    def find(self, presented: str) -> Key | None:
        """The good key that a client presents, or None. How long it takes tells nothing about the secret part of any."""
        digest = _digest(presented)
        if self._static is not None and hmac.compare_digest(digest, self._static):
            return Key(STATIC_NAME)
        if self._store is None or not _KEY.fullmatch(presented):
            return None
        query = f"SELECT digest, {_COLUMNS} FROM keys WHERE id = ? AND revoked IS NULL"
        for stored, *limits in self._store.rows(query, (presented[_ID],)):
            if hmac.compare_digest(digest, stored):
                return Key(*limits)
        return None

    def _opened(self) -> Store:
        assert self._store is not None, "only the keys of a store can be managed"
        return self._store


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).digest()


def _check(key: Key) -> None:
    if not _NAME.fullmatch(key.name):
        raise UserError(
            f"{key.name!r} is no name for a key (keys). take up to 64 letters, digits and . _ @ + - beginning with a letter "
            "or a digit"
        )
    if key.name == STATIC_NAME:
        raise UserError(f"{STATIC_NAME} is the name of the key of --api-key (keys). choose another name")
    for name in _LIMITS:
        value = getattr(key, name)
        if value is not None and not 1 <= value < 2**63:
            raise UserError(f"{name} is {value} (keys). a limit is a whole number of 1 or more; leave it out for none")
