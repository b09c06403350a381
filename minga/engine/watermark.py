"""A watermark in the choice of tokens: invisible, without any change to their probabilities, found with the secret alone.

Tokens are drawn by a race whose numbers come from a seed and a place (minga/engine/sampler.py). A marked answer takes them
from a secret and the `CONTEXT` tokens before the place instead (Aaronson 2022; Kirchenbauer et al., arXiv 2301.10226, study
the length of the context). The winner of a race has a small number; in text that was not drawn by these races the numbers
are ordinary ones, so their sum tells, with an exact p-value. A context that comes again in an answer draws as if unmarked:
two equal draws would change the law of the text, and what repeats itself would go on for ever.

What it cannot do: greedy answers and forced tokens carry no mark, text of little entropy little, and whoever writes the text
anew, by hand or by another model, removes it. Speculation draws the same races, so its text is marked too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch

from minga.engine.sampler import MAX_SEED, exponentials
from minga.errors import UserError

CONTEXT = 4


@dataclass(frozen=True)
class Detection:
    """num_tokens: that were looked at. p_value: how likely so strong a mark is in a text that has none."""

    num_tokens: int
    p_value: float


class Marker:
    """The draws of one answer. seed: for the places that carry no mark."""

    def __init__(self, secret: int, seed: int, num_prompt_tokens: int):
        self._secret, self._seed = secret, seed
        self._first = num_prompt_tokens + CONTEXT  # whoever looks for the mark does not have the prompt
        self._seen: set[tuple[int, ...]] = set()
        self._next = self._first  # the first place whose context is not in `_seen`

    def draws(self, ids: Sequence[int], draft: Sequence[int]) -> list[tuple[int, int]]:
        """Seed and place of the races for the place after the text and after each guess."""
        while self._next < len(ids):
            self._seen.add(tuple(ids[self._next - CONTEXT : self._next]))
            self._next += 1
        found: list[tuple[int, int]] = []
        ahead: set[tuple[int, ...]] = set()
        text = [*ids[-CONTEXT:], *draft]
        start = len(ids) - len(text) + len(draft)  # the place of text[0]
        for place in range(len(ids), len(ids) + len(draft) + 1):
            context = tuple(text[place - start - CONTEXT : place - start]) if place >= self._first else ()
            marked = bool(context) and context not in self._seen and context not in ahead
            found.append((context_seed(self._secret, context), 0) if marked else (self._seed, place))
            ahead.add(context)
        return found


def context_seed(secret: int, context: tuple[int, ...]) -> int:
    data = b"".join(number.to_bytes(8, "little") for number in (secret, *context))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"watermark").digest(), "little") % MAX_SEED


def secret_number(secret: bytes) -> int:
    """Any bytes as the number that a `SamplingParams` takes."""
    return int.from_bytes(hashlib.sha256(secret).digest()[:8], "little") % MAX_SEED


def read_secret(path: str | PathLike[str]) -> int:
    """The secret number of a file, which may hold anything. Raises `UserError` for one that cannot be read or is short."""
    try:
        with open(path, "rb") as file:
            secret = file.read(1 << 16).strip()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}). `minga watermark new {path}` makes one") from None
    if len(secret) < 16:
        raise UserError(
            f"{path} has {len(secret)} bytes (watermark). a secret has 16 or more: `minga watermark new FILE`"
        )
    return secret_number(secret)


def detect(token_ids: Sequence[int], secret: int) -> Detection:
    """Looks for the mark in a text's tokens. Each context counts once, as in making it."""
    seen: set[tuple[int, ...]] = set()
    total = 0.0
    for place in range(CONTEXT, len(token_ids)):
        context = tuple(token_ids[place - CONTEXT : place])
        if context in seen:
            continue
        seen.add(context)
        number = float(exponentials(torch.tensor([token_ids[place]]), context_seed(secret, context), 0))
        total -= float(torch.log(-torch.expm1(torch.tensor(-number, dtype=torch.float64))))
    if not seen:
        return Detection(0, 1.0)
    # without a mark the sum is that of as many unit exponentials
    shape, value = torch.tensor(float(len(seen)), dtype=torch.float64), torch.tensor(total, dtype=torch.float64)
    return Detection(len(seen), float(torch.special.gammaincc(shape, value)))
