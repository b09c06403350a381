"""Amounts as people write them: 14.8t tokens, 8GB of memory, 20Mbit of a link."""

from __future__ import annotations

import re

from minga.errors import UserError

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_SIZES = {"": 1} | {f"{unit}{i}": (1024 if i else 1000) ** n for n, unit in enumerate("KMGT", 1) for i in ("", "I")}
MOST = 1e18  # no count of a plan or a run comes near


def parse_count(text: str, flag: str) -> int:
    """10m is ten million, 14.8t or 14.8e12 a training set. Raises `UserError` for what is no number from 1 on."""
    match = re.fullmatch(r"\s*([\d_.,]{1,40}(?:e\+?\d{1,2})?)\s*([kmbgt]?)\s*", text, re.IGNORECASE)
    try:
        value = float(match[1].replace(",", "").replace("_", "")) * _COUNTS[match[2].lower()] if match else 0.0
    except ValueError:
        value = 0.0
    if not 1 <= value <= MOST:
        raise UserError(
            f"{text!r:.60} is no number of {flag.strip('-')} ({flag}). write it as 10m, 1.5b, 14.8t or 250000"
        )
    return round(value)


def parse_bytes(size: int | str, name: str) -> int:
    """4GB is 4e9, 4GiB 2^32. Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]I?)?B?\s*", str(size), re.IGNORECASE)
    if match is None:
        raise UserError(f"{name} is {size!r:.60} (a size). write it as 4GB, 512MB, 1.5GiB or a number of bytes")
    return int(float(match[1]) * _SIZES[(match[2] or "").upper()])


def parse_link(text: str, flag: str) -> float:
    """Bytes a second of 20Mbit, 1.5Gbit/s or 3MB/s. Raises `UserError`."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmg])(bit|b)(?:/s|ps)?\s*", text, re.IGNORECASE)
    value = 0.0
    if match:
        bits = match[3].lower() == "bit" or match[3] == "b"
        value = float(match[1]) * _COUNTS[match[2].lower()] / (8 if bits else 1)
    if not 0 < value <= 1e15:
        raise UserError(f"{text!r:.60} is no speed of a link ({flag}). write it as 20Mbit, 1.5Gbit or 3MB/s")
    return value
