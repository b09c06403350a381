"""Documents -> a folder of token files that training maps into memory, with a manifest that says what they are.

    manifest.json          format version, tokenizer, sources with hashes, the split rule, sizes and hashes of the files
    train.bin  val.bin     the tokens of all documents, one after another, each document closed by the end-of-text token
    train.idx  val.idx     int64: where each document begins in the .bin file, and the end of the last
    tokenizer.json ...     the tokenizer, as a model folder has it

Tokens are little-endian uint16 where the vocabulary allows it, else uint32. The folder appears whole or not at all: it
is written beside, synced and renamed.

The input is read three times: to hash it and divide it (`corpus`), to train the tokenizer on the training part, and to
write. Encoding goes piece by piece, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minga.data.corpus import PIECE, Corpus, Progress, SourceInfo, pieces
from minga.data.sources import Source, find_sources
from minga.data.tokenizer import Tokenizer, train_bpe
from minga.errors import UserError
from minga.runtime.files import sync

FORMAT = "minga-shards"
VERSION = 1
SPLITS = ("train", "val")
_REBUILD = "rebuild it with `minga data ... --force`"


# ---------------------------------------------------------------------------------------------- the manifest


@dataclass(frozen=True)
class SplitInfo:
    """One split. `num_bytes` is the UTF-8 length of its documents, end-of-text tokens not counted."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    sha256: str  # of the .bin file


@dataclass(frozen=True)
class Manifest:
    """What a shards folder holds. `trained_vocab_size` is None if the tokenizer was given instead of trained here."""

    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    trained_vocab_size: int | None
    val_fraction: float
    split_rule: str
    num_duplicates: int
    sources: tuple[SourceInfo, ...]
    splits: dict[str, SplitInfo]

    @property
    def num_documents(self) -> int:
        return sum(split.num_documents for split in self.splits.values())

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self.splits.values())

    @property
    def num_bytes(self) -> int:
        return sum(split.num_bytes for split in self.splits.values())

    @property
    def val_bytes(self) -> int:
        """The denominator of bits per byte."""
        return self.splits["val"].num_bytes

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens

    @property
    def fingerprint(self) -> str:
        """Equal for two folders exactly if training on them is equal."""
        parts = [self.dtype, str(self.eos_id), self.tokenizer_sha256, *(self.splits[split].sha256 for split in SPLITS)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The manifest with its totals, which are written for people and recomputed when read."""
        totals = {name: getattr(self, name) for name in ("num_documents", "num_tokens", "num_bytes", "val_bytes")}
        return {"format": FORMAT, "version": VERSION, **totals, **asdict(self)}

    @classmethod
    def from_json(cls, value: Any, place: str) -> Manifest:
        """Raises `UserError` for another format or version, and for fields that are missing or of the wrong type."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{place} is no manifest of tokenized text. give a folder that `minga data` wrote")
        if value.get("version") != VERSION:
            raise UserError(
                f"{place} has format version {value.get('version')}, this Minga reads {VERSION}. {_REBUILD}"
            )
        sources = _typed(value, "sources", list, place)
        splits = _typed(value, "splits", dict, place)
        trained = value.get("trained_vocab_size")
        return cls(
            **{name: _typed(value, name, str, place) for name in ("tokenizer_sha256", "dtype", "split_rule")},
            **{name: _typed(value, name, int, place) for name in ("vocab_size", "eos_id", "num_duplicates")},
            trained_vocab_size=None if trained is None else _typed(value, "trained_vocab_size", int, place),
            val_fraction=float(_typed(value, "val_fraction", (int, float), place)),
            sources=tuple(_record(SourceInfo, source, place) for source in sources),
            splits={split: _record(SplitInfo, splits.get(split), place) for split in SPLITS},
        )


def _typed(value: Mapping[str, Any], name: str, kind: type | tuple[type, ...], place: str) -> Any:
    item = value.get(name)
    if not isinstance(item, kind) or isinstance(item, bool) or (isinstance(item, (int, float)) and item < 0):
        raise UserError(f"{name!r} is {item!r:.60} ({place}). {_REBUILD}")
    return item


def _record(kind: type[Any], value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"an entry is {value!r:.60} where an object should be ({place}). {_REBUILD}")
    types = {name: str if name in ("name", "sha256") else int for name in kind.__dataclass_fields__}
    return kind(**{name: _typed(value, name, type_, place) for name, type_ in types.items()})


# ---------------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class Shards:
    """An opened shards folder; the files stay on disk and are mapped."""

    path: Path
    manifest: Manifest

    def tokens(self, split: str) -> np.ndarray:
        """The token stream of a split, mapped."""
        return _map(self._file(split, "bin"), self.manifest.dtype)

    def documents(self, split: str) -> np.ndarray:
        """Offsets into `tokens`: document i is `tokens[offsets[i]:offsets[i + 1]]`, end-of-text token included."""
        return _map(self._file(split, "idx"), "<i8")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    @cached_property
    def token_num_bytes(self) -> np.ndarray:
        """(V,) int64: the UTF-8 bytes that each token spells in a text; the end-of-text token spells none."""
        sizes = np.array([len(self.tokenizer.token_bytes(id)) for id in range(self.manifest.vocab_size)], np.int64)
        sizes[self.manifest.eos_id] = 0
        return sizes

    def verify(self) -> None:
        """Reads every token file and compares its hash. Raises `UserError` for one that has changed."""
        for split in SPLITS:
            path = self._file(split, "bin")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.manifest.splits[split].sha256:
                    raise UserError(f"{path} is not what was written (its hash differs). {_REBUILD}")

    def _file(self, split: str, suffix: str) -> Path:
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r} ({self.path}). there are {' and '.join(SPLITS)}")
        return self.path / f"{split}.{suffix}"


def open_shards(path: str | Path) -> Shards:
    """Opens a folder of `build_shards`. Raises `UserError` if a file is missing, cut short or of another build."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist (data). make it with `minga data TEXT --out {path}`")
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path} has no manifest.json (data). make it with `minga data TEXT --out {path}`")
    try:
        value = json.loads((path / "manifest.json").read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path / 'manifest.json'} is damaged (no JSON). {_REBUILD}") from None
    shards = Shards(path, Manifest.from_json(value, str(path / "manifest.json")))
    _check_files(shards)
    return shards


def _check_files(shards: Shards) -> None:
    manifest = shards.manifest
    if manifest.dtype != _dtype_for(manifest.vocab_size) or manifest.eos_id >= manifest.vocab_size:
        raise UserError(
            f"dtype {manifest.dtype} and vocabulary {manifest.vocab_size} do not fit ({shards.path}). {_REBUILD}"
        )
    width = np.dtype(manifest.dtype).itemsize
    for name, split in manifest.splits.items():
        _check_size(shards.path / f"{name}.bin", split.num_tokens * width)
        _check_size(shards.path / f"{name}.idx", (split.num_documents + 1) * 8)
        offsets = shards.documents(name)
        if offsets[0] != 0 or offsets[-1] != split.num_tokens or not bool(np.all(np.diff(offsets) > 0)):
            raise UserError(f"{shards.path / name}.idx does not fit {name}.bin (its offsets are wrong). {_REBUILD}")
    tokenizer = shards.path / "tokenizer.json"
    if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer} is not the tokenizer that the tokens were made with (its hash differs). {_REBUILD}"
        )


def _check_size(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual is None:
        raise UserError(f"{path} is missing. {_REBUILD}")
    if actual != expected:
        cut = "cut short" if actual < expected else "too long"
        raise UserError(f"{path} is {cut} ({actual} bytes, the manifest says {expected}). {_REBUILD}")


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def _dtype_for(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


# ---------------------------------------------------------------------------------------------- building


def build_shards(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Tokenizes `inputs` (see `sources`) into the folder `out`, with `tokenizer` or one trained to `vocab_size`.

    If `out` holds the result already, it is checked and left alone; if it holds another, `force` replaces it.
    `progress` follows the stages ("read", "train tokenizer", "write"), `note` gets a line for what one might not
    expect. Raises `UserError` for whatever is wrong with the input or the place, and leaves nothing half-written.
    """
    if not 0 <= val_fraction <= 0.5:
        raise UserError(f"the held-out share is {val_fraction} (--val-fraction). it must be from 0 to 0.5")
    if tokenizer is not None and tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end-of-text token (eos). Minga closes every document with it: add one")
    found = find_sources(inputs, exclude=exclude)
    if found.skipped:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in found.skipped.most_common())
        note(f"left out {found.skipped.total()} files that are no text by their suffix ({listed})")
    out = Path(out).resolve()
    with _scratch_folder(out) as scratch:
        corpus = Corpus.scan([_spooled(source, scratch) for source in found.sources], val_fraction, progress)
        trained = vocab_size if tokenizer is None else None
        existing = _existing(out, corpus, trained, tokenizer, force)
        if existing is not None:
            note(f"{out} is up to date")
            return existing
        if tokenizer is None:
            tokenizer = train_bpe(corpus.training_texts(progress), vocab_size)
        built = scratch / "shards"
        built.mkdir()
        manifest = _write_shards(built, corpus, tokenizer, trained, progress)
        _publish(built, out)
        return manifest


# ---------------------------------------------------------------------------------------------- writing


class _SplitWriter:
    """Appends documents to one split's two files."""

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, dtype: str) -> None:
        self._tokens, self._offsets, self._dtype = tokens, offsets, dtype
        self._sha256 = hashlib.sha256()
        self._num_documents = self._num_tokens = self._num_bytes = 0
        self._mark()

    def add(self, ids: Sequence[int], *, num_bytes: int, ends_document: bool) -> None:
        data = np.asarray(ids, self._dtype).tobytes()
        self._tokens.write(data)
        self._sha256.update(data)
        self._num_tokens += len(ids)
        self._num_bytes += num_bytes
        if ends_document:
            self._num_documents += 1
            self._mark()

    def finish(self) -> SplitInfo:
        for file in (self._tokens, self._offsets):
            file.flush()
            os.fsync(file.fileno())
        return SplitInfo(self._num_documents, self._num_tokens, self._num_bytes, self._sha256.hexdigest())

    def _mark(self) -> None:
        self._offsets.write(np.int64(self._num_tokens).astype("<i8").tobytes())


def _write_shards(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, trained: int | None, progress: Progress
) -> Manifest:
    eos_id, dtype = tokenizer.eos_id, _dtype_for(tokenizer.vocab_size)
    assert eos_id is not None, "build_shards has checked it"
    with ExitStack() as files:

        def writer(split: str) -> _SplitWriter:
            tokens, offsets = (files.enter_context((folder / f"{split}.{end}").open("wb")) for end in ("bin", "idx"))
            return _SplitWriter(tokens, offsets, dtype)

        writers = {split: writer(split) for split in SPLITS}
        _encode(corpus.parts("write", progress), tokenizer, eos_id, writers)
        splits = {split: writer.finish() for split, writer in writers.items()}
    if not splits["val"].num_tokens and corpus.val_fraction:
        size = sum(corpus.sizes.values())
        raise UserError(f"{size} bytes of text are too few to hold some out (data). add text, or give --val-fraction 0")
    tokenizer.save(folder)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=eos_id,
        dtype=dtype,
        trained_vocab_size=trained,
        val_fraction=corpus.val_fraction,
        split_rule=corpus.split_rule,
        num_duplicates=corpus.num_duplicates,
        sources=tuple(corpus.infos),
        splits=splits,
    )
    _write_synced(folder / "manifest.json", json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n")
    return manifest


def _encode(
    parts: Iterable[tuple[str, str]], tokenizer: Tokenizer, eos_id: int, writers: Mapping[str, _SplitWriter]
) -> None:
    for batch in _batches(_pieces_of(parts)):
        encoded = tokenizer.encode_batch([piece.text for piece in batch])
        for piece, ids in zip(batch, encoded, strict=True):
            end = [eos_id] if piece.ends_document else []
            num_bytes = len(piece.text.encode())
            writers[piece.split].add(ids + end, num_bytes=num_bytes, ends_document=piece.ends_document)


@dataclass(frozen=True)
class _Piece:
    text: str
    split: str
    ends_document: bool


def _pieces_of(parts: Iterable[tuple[str, str]]) -> Iterator[_Piece]:
    for split, text in parts:
        *firsts, last = pieces(text)
        yield from (_Piece(piece, split, ends_document=False) for piece in firsts)
        yield _Piece(last, split, ends_document=True)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Groups of pieces worth encoding together: about sixteen full ones, or many small documents."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= 16 * PIECE or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------- the place


def _existing(
    out: Path, corpus: Corpus, trained: int | None, tokenizer: Tokenizer | None, force: bool
) -> Manifest | None:
    """The manifest in `out` if building would give the same; None if there is nothing in the way."""
    if force or not (out / "manifest.json").exists():
        return None
    shards = open_shards(out)
    manifest = shards.manifest
    same_text = [info.sha256 for info in corpus.infos] == [info.sha256 for info in manifest.sources]
    same_tokenizer = tokenizer is None or tokenizer.sha256 == manifest.tokenizer_sha256
    settings = (manifest.trained_vocab_size, manifest.val_fraction)
    if not (same_text and same_tokenizer and settings == (trained, corpus.val_fraction)):
        what = "settings" if same_text else "text"
        raise UserError(
            f"{out} exists and was made from other {what} (--out). give another place, or --force to replace it"
        )
    shards.verify()
    return manifest


@contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to work in; gone at the end, and so are parents made for it that nothing uses."""
    scratch = out.with_name(f".{out.name}.partial")
    made = [parent for parent in scratch.parents if not parent.exists()]
    try:
        _check_place(out)
        _recover(out)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}). free space or give another --out") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _check_place(out: Path) -> None:
    """Refuses to build over anything that is not a shards folder, whatever `force` says."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file (--out). give a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise UserError(f"{out} holds other files (--out). give a new or empty folder")


def _publish(built: Path, out: Path) -> None:
    """Puts the finished folder in its place. A build before it steps aside first, and back should that fail."""
    aside = _aside(out)
    sync(built)
    replaces = (out / "manifest.json").exists()
    if replaces:
        out.rename(aside)
    try:
        built.rename(out)
    except OSError:
        if replaces:
            aside.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _recover(out: Path) -> None:
    """Ends a replacement that was killed: the old folder comes back unless the new one is in place."""
    aside = _aside(out)
    if aside.exists() and not out.exists():
        aside.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _spooled(source: Source, folder: Path) -> Source:
    """Standard input copied to a file, since it is read more than once."""
    if source.path is not None:
        return source
    path = folder / "stdin.txt"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Source(source.name, path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
