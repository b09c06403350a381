"""A made-up language to test on: enough repetition for a tokenizer, accents and lines as in real text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minga.data.shards import Shards, build_shards, open_shards
from minga.data.tokenizer import Tokenizer, train_bpe

_SYLLABLES = [
    "ba",
    "né",
    "co",
    "du",
    "fí",
    "lla",
    "mo",
    "ña",
    "pe",
    "qui",
    "ro",
    "sol",
    "tú",
    "ver",
    "zan",
    "th",
    "ing",
    "er",
]


def _make_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    words = ["".join(random.Random(w).choices(_SYLLABLES, k=1 + w % 4)) for w in range(600)]
    text = []
    for _ in range(num_words):
        text.append(words[int(len(words) * rng.random() ** 2)])
        text.append(rng.choice([" "] * 8 + [", ", ".\n", "; 12 ", " «", "»\n\n"]))
    return "".join(text)


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    """(seed, number of words) -> text."""
    return _make_text


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([_make_text(seed, 400) for seed in range(10)], 512)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents of different lengths."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(30):
        (folder / f"{seed:02}.txt").write_text(_make_text(seed, 20 + 7 * seed), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    out = tmp_path_factory.mktemp("built") / "shards"
    build_shards([corpus], out, tokenizer=tokenizer, val_fraction=0.2)
    return open_shards(out)
