"""Where documents come from: files, folders, globs, standard input, and JSON lines.

    notes.txt          a file is one document, whatever its suffix
    corpus/            a folder is searched for the suffixes in `TEXT_SUFFIXES`, hidden files left out, in sorted order
    'src/**/*.py'      a glob names its files
    pages.jsonl        each line is a document: {"text": "..."}
    -                  standard input is one document

Text is UTF-8 and is taken as it is: nothing is repaired, because a wrong guess would be trained on. The first byte that
is no UTF-8 is an error that says where it stands.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from minga.errors import UserError

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".jsonl", ".ndjson"})
_LINE_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Document:
    text: str
    source: str


@dataclass(frozen=True)
class Source:
    """One file, or standard input (`path` is None). `name` is what messages and the manifest call it."""

    name: str
    path: Path | None

    def documents(self, on_bytes: Callable[[bytes], object] | None = None) -> Iterator[Document]:
        """Reads the documents in order; `on_bytes` is called with the raw bytes as they are read (hash, progress).

        Raises `UserError`, naming file and place, for bytes that are no UTF-8, lines that are no documents, and a file
        without any text. Memory: one document (a file of JSON lines is never held whole).
        """
        with self._open() as file:
            texts = _line_texts if self._is_lines else _whole_text
            empty = True
            for text in texts(file, self.name, on_bytes or (lambda _: None)):
                empty = False
                yield Document(text, self.name)
        if empty:
            raise UserError(f"{self.name} is empty (input). leave it out, or put text into it")

    @property
    def _is_lines(self) -> bool:
        return self.path is not None and self.path.suffix.lower() in _LINE_SUFFIXES

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if self.path is None:
            return nullcontext(sys.stdin.buffer)
        try:
            return self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.name} ({error.strerror}). check the path and its permissions") from None


@dataclass
class Found:
    """What a list of inputs amounts to. `skipped` counts, by suffix, the files that folders hold beside text."""

    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def find_sources(inputs: Sequence[str | Path], *, exclude: Sequence[str] = ()) -> Found:
    """Lists the files that `inputs` name, each once, in order. `exclude`: patterns for file names or whole paths.

    Raises `UserError` for an input that does not exist or holds no text files, and if nothing is left.
    """
    if not inputs:
        raise UserError("no input is named (data). give files, folders, globs, or - for standard input")
    found = Found()
    seen: set[Path | None] = set()
    for name in map(str, inputs):
        for source in _sources_of(name, found.skipped):
            key = source.path.resolve() if source.path else None
            if key not in seen and not _excluded(source, exclude):
                found.sources.append(source)
            seen.add(key)
    if not found.sources:
        raise UserError(f"--exclude leaves no input ({', '.join(exclude)}). loosen the patterns")
    return found


def read_documents(inputs: Sequence[str | Path], *, exclude: Sequence[str] = ()) -> Iterator[Document]:
    """All documents of all inputs, in order."""
    for source in find_sources(inputs, exclude=exclude).sources:
        yield from source.documents()


# ---------------------------------------------------------------------------------------------- names to files


def _sources_of(name: str, skipped: Counter[str]) -> list[Source]:
    if name == "-":
        return [Source("stdin", None)]
    path = Path(name)
    if path.is_dir():
        return _sources_in_folder(path, skipped)
    if path.exists():
        return [_regular(path)]
    matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))] if glob.has_magic(name) else []
    files = [_regular(match) for match in matches if not match.is_dir()]
    if not files:
        hint = "check the pattern" if glob.has_magic(name) else "check the path"
        raise UserError(f"{name} does not exist (input). {hint}")
    return files


def _regular(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"{path} is no regular file (input). pipe it in and use - for standard input")
    return Source(str(path), path)


def _sources_in_folder(folder: Path, skipped: Counter[str]) -> list[Source]:
    """Files that are text by suffix; an empty one is passed over, since nobody named it."""
    sources = []
    others: Counter[str] = Counter()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent, name)
            if path.suffix.lower() not in TEXT_SUFFIXES or not path.is_file():
                others[path.suffix.lower() or "no suffix"] += 1
            elif path.stat().st_size:
                sources.append(Source(str(path), path))
    if not sources:
        has = (
            f"it holds {', '.join(f'{n} {suffix}' for suffix, n in others.most_common(5))}" if others else "it is empty"
        )
        raise UserError(f"{folder} has no text files ({has}). name other files by a glob, such as '{folder}/**/*.py'")
    skipped.update(others)
    return sources


def _excluded(source: Source, patterns: Sequence[str]) -> bool:
    names = (source.name, Path(source.name).name)
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)


# ---------------------------------------------------------------------------------------------- files to texts


def _whole_text(file: BinaryIO, name: str, on_bytes: Callable[[bytes], object]) -> Iterator[str]:
    data = file.read()
    on_bytes(data)
    text = _decode(data.removeprefix(_BYTE_ORDER_MARK), name, at=len(data) - len(data.removeprefix(_BYTE_ORDER_MARK)))
    if text.strip():
        yield text


def _line_texts(file: BinaryIO, name: str, on_bytes: Callable[[bytes], object]) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        on_bytes(line)
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            text = _text_of_line(_decode(content, name, at=offset + len(line) - len(content)), f"{name}, line {number}")
            if text.strip():
                yield text
        offset += len(line)


def _decode(data: bytes, name: str, *, at: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise UserError(
            f"{name} is not UTF-8 text (byte {at + error.start} is 0x{byte:02x}). "
            "convert it, as with `iconv -f latin1 -t utf-8`, or leave it out with --exclude"
        ) from None


def _text_of_line(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too large"
        raise UserError(f'no JSON ({place}: {reason}). each line must be an object such as {{"text": "..."}}') from None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        keys = f"it has {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, dict) and value else "it has none"
        raise UserError(f'no "text" ({place}: {keys}). each line must be an object such as {{"text": "..."}}')
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"half of a surrogate pair in the text ({place}). write whole characters")
    return text
