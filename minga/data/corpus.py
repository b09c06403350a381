"""The corpus behind shards: what the inputs hold, which documents are copies, and what is held out.

**What is held out.** With at least `MIN_DOCUMENTS_FOR_HASH` different documents, whole documents are: in the order of
their hashes, until the wanted share of bytes is reached. So the same document falls on the same side whatever the
order of the input. With fewer, the tail of each document is, cut at the end of a line. Copies of a document are dropped
first, lest one be trained on and its twin be held out.

The inputs are read several times instead of being kept: memory is one document, and about 100 bytes for each that was
seen. A file that changes between two readings is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from minga.data.sources import Document, Source
from minga.errors import UserError

MIN_DOCUMENTS_FOR_HASH = 20
_TRAINING_TEXT_BYTES = 256 * 2**20  # enough to count the pieces of any vocabulary; a larger corpus is sampled
PIECE = 2**16  # characters encoded at a time

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


@dataclass(frozen=True)
class SourceInfo:
    """One input file. `num_documents` counts what it holds, copies included."""

    name: str
    num_bytes: int
    sha256: str
    num_documents: int


@dataclass
class Corpus:
    """What the first reading found, and how the later ones tell training text from held-out text."""

    sources: list[Source]
    infos: list[SourceInfo]
    sizes: dict[bytes, int]  # of each different document: digest -> UTF-8 bytes, in order
    num_duplicates: int
    val_fraction: float
    held_out: set[bytes] = field(default_factory=set)

    @classmethod
    def scan(cls, sources: list[Source], val_fraction: float, progress: Progress) -> Corpus:
        corpus = cls(sources, [], {}, 0, val_fraction)
        for _, document in corpus._read("read", progress, corpus.infos):
            digest, size = _digest(document.text)
            if digest in corpus.sizes:
                corpus.num_duplicates += 1
            corpus.sizes[digest] = size
        if corpus.by_hash:
            corpus.held_out = _choose_documents(corpus.sizes, val_fraction)
        return corpus

    @property
    def by_hash(self) -> bool:
        return len(self.sizes) >= MIN_DOCUMENTS_FOR_HASH

    @property
    def split_rule(self) -> str:
        if not self.val_fraction:
            return "none"
        return "documents by hash" if self.by_hash else "tail of each document"

    def parts(self, stage: str, progress: Progress) -> Iterator[tuple[str, str]]:
        """(split, text) of each different document, in order; a document cut in two gives both."""
        waiting = set(self.sizes)
        infos: list[SourceInfo] = []
        for source, document in self._read(stage, progress, infos):
            digest, _ = _digest(document.text)
            if digest in waiting:
                waiting.remove(digest)
                yield from self._split(digest, document.text)
            elif digest not in self.sizes:
                raise UserError(f"{source.name} changed while it was read (data). run the command again")
        for before, after in zip(self.infos, infos, strict=True):
            if before != after:
                raise UserError(f"{before.name} changed while it was read (data). run the command again")

    def training_texts(self, progress: Progress) -> Iterator[str]:
        """What the tokenizer learns from: the training part, or evenly spread pieces of it if it is very large."""
        step = 1 + sum(self.sizes.values()) // _TRAINING_TEXT_BYTES
        count = 0
        for split, text in self.parts("train tokenizer", progress):
            if split == "train":
                for piece in pieces(text):
                    if count % step == 0:
                        yield piece
                    count += 1

    def _split(self, digest: bytes, text: str) -> Iterator[tuple[str, str]]:
        if self.by_hash or not self.val_fraction:
            yield ("val" if digest in self.held_out else "train"), text
            return
        cut = _tail_start(text, self.val_fraction)
        yield "train", text[:cut]
        if text[cut:]:
            yield "val", text[cut:]

    def _read(self, stage: str, progress: Progress, infos: list[SourceInfo]) -> Iterator[tuple[Source, Document]]:
        """All documents; `infos` gets what each source turned out to be."""
        done, total = 0, sum(source.path.stat().st_size for source in self.sources if source.path)
        for source in self.sources:
            meter = _Meter(stage, progress, done, total)
            num_documents = 0
            for document in source.documents(meter):
                num_documents += 1
                yield source, document
            infos.append(SourceInfo(source.name, meter.num_bytes, meter.sha256.hexdigest(), num_documents))
            done += meter.num_bytes


class _Meter:
    """Counts and hashes the bytes of one source, and reports how far the stage is."""

    def __init__(self, stage: str, progress: Progress, done: int, total: int) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._stage, self._progress, self._done, self._total = stage, progress, done, total

    def __call__(self, data: bytes) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)
        self._progress(self._stage, self._done + self.num_bytes, self._total)


def _digest(text: str) -> tuple[bytes, int]:
    data = text.encode()
    return hashlib.blake2b(data, digest_size=16).digest(), len(data)


def _choose_documents(sizes: Mapping[bytes, int], fraction: float) -> set[bytes]:
    """Documents in the order of their digests until the share is reached, passing over any that would double it."""
    if not fraction:
        return set()
    wanted = fraction * sum(sizes.values())
    chosen: set[bytes] = set()
    taken = 0
    for digest in sorted(sizes):
        if taken < wanted and taken + sizes[digest] <= 2 * wanted:
            chosen.add(digest)
            taken += sizes[digest]
    return chosen or {min(sizes, key=lambda digest: (sizes[digest], digest))}


def _tail_start(text: str, fraction: float) -> int:
    """Where the held-out tail begins: after a line near the wanted place, else at a space.

    At the end of the text, so that nothing is held out, if either part would be blank.
    """
    length = math.ceil(len(text) * fraction)
    cut = len(text) - length
    earliest = max(0, cut - length)
    line, space = text.rfind("\n", earliest, cut) + 1, text.rfind(" ", earliest, cut)
    start = line or (space if space > 0 else cut)
    return start if text[:start].strip() and text[start:].strip() else len(text)


def pieces(text: str) -> list[str]:
    """The text in parts of about `PIECE` characters, so that encoding a long document takes no more memory than that.

    A cut after a line break, before something visible, is one that every pre-tokenizer here makes itself, so the tokens
    are those of the whole; without line breaks it is made before a space, and as a last resort anywhere.
    """
    parts, start = [], 0
    while len(text) - start > PIECE:
        end = start + PIECE
        cut = text.rfind("\n", start, end) + 1
        while cut > start and text[cut].isspace():
            cut = text.rfind("\n", start, cut - 1) + 1
        cut = cut if cut > start else text.rfind(" ", start + 1, end)
        cut = cut if cut > start else end
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]
