"""Folders that are either whole or not there, whatever happens while they are written.

A save may be cut short by a kill, a crash, a full disk or a power cut. So the files are written into a hidden folder
beside the target, forced to the disk, listed with their checksums, and only then given the target's name:

  .NAME.partial-PID     being written; a lock on it is held as long as its writer lives
  checksums.json        sha256 and size of every other file; written last, so its presence means "complete"
  .NAME.old-PID         the folder that was there before, for the instant between two renames

POSIX cannot swap two folders in one step. A process killed between the two renames leaves nothing under NAME, but two
whole folders beside it: `recover` (called by every reader and by the next save) puts the newer one in place. Whatever
else a dead process left behind is removed by the next save to the same name.

Liveness is a kernel lock (flock), not the process number: numbers are reused, and in a container every first process
has the number 1.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minga.errors import UserError
from minga.runtime.files import sync

CHECKSUMS = "checksums.json"
# EFBIG: a file too large for the file system (4 GB on FAT32) or for `ulimit -f`
_NO_SPACE = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "no space left on the device"}
_NO_SPACE |= {errno.EFBIG: "a file would be larger than is allowed there"}
_WAIT_FOR_WRITER = 5.0  # seconds; between its two renames a living writer needs microseconds


@contextmanager
def durable_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`with durable_folder(path) as tmp:` write files below `tmp`; at the end they are `path`, all or nothing.

    A folder already at `path` is replaced, if it is empty or holds a model. On any exception, Ctrl-C included, nothing
    of the new folder stays and the old one is as it was. Raises `UserError` for a full disk, for a target that cannot
    be written or should not be replaced, and while another process saves to the same name.
    """
    target = Path(path).resolve()
    with _explain_failure(target):
        _refuse_to_replace_other_things(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        partial.mkdir()
    with _explain_failure(target, only_no_space=True), _lock(partial):
        try:
            yield partial
            _seal(partial)
            _replace(target, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def recover(path: str | os.PathLike[str]) -> None:
    """Finishes a replacement that a crash cut in two. Does nothing if `path` is there, or nothing to recover is."""
    target = Path(os.path.realpath(path))  # unlike `resolve` it has an answer for links in a circle
    deadline = time.monotonic() + _WAIT_FOR_WRITER
    while not target.exists() and any(_is_live(folder) for folder in _leftovers(target, "partial")):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
    if target.exists():
        return
    complete = [folder for folder in _leftovers(target, "partial") if not find_problems(folder)]
    for folder in (*complete, *_leftovers(target, "old")):
        folder.rename(target)
        sync(target.parent)
        return


def find_problems(folder: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a folder that `durable_folder` wrote, one line a file; empty if every byte is as written.

    Files that `checksums.json` does not list are ignored.
    """
    folder = Path(folder)
    try:
        listed = json.loads((folder / CHECKSUMS).read_bytes())["files"]
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in listed.items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in expected):
            raise ValueError
    except OSError as error:
        return [f"{CHECKSUMS} cannot be read: {error.strerror}"]
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return [f"{CHECKSUMS} is damaged"]
    checked = ((name, _file_problem(folder / name, *entry)) for name, entry in expected.items())
    return [f"{name} {problem}" for name, problem in checked if problem]


def verify_folder(folder: str | os.PathLike[str]) -> None:
    """Raises `UserError` naming the first damaged or missing file of a folder that `durable_folder` wrote."""
    problems = find_problems(folder)
    if problems:
        raise UserError(
            f"{problems[0]} ({folder}). use an earlier checkpoint, or copy the folder again from its source"
        )


# ---------------------------------------------------------------------------------------------------- steps


def _refuse_to_replace_other_things(target: Path) -> None:
    """A mistyped path must not cost anyone their documents, nor a run folder its checkpoints."""
    if target.is_dir():
        names = [entry.name for entry in target.iterdir()]
        if names and CHECKSUMS not in names and not any(name.endswith(".safetensors") for name in names):
            raise UserError(f"the folder is not empty and holds no model ({target}). choose another name, or empty it")
    elif target.exists():
        raise UserError(f"a file stands where a folder should be written ({target}). choose another name")


def _sweep(target: Path) -> None:
    """Removes what dead writers left behind."""
    if any(_is_live(folder) for folder in _leftovers(target, "partial")):
        raise UserError(f"another process is saving there ({target}). wait for it to end, or choose another name")
    recover(target)
    for folder in (*_leftovers(target, "partial"), *_leftovers(target, "old")):
        shutil.rmtree(folder, ignore_errors=True)


def _seal(partial: Path) -> None:
    """Forces every file to the disk, then lists them with their checksums, then forces the folders."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    for file in files:
        sync(file)
    listed = {file.relative_to(partial).as_posix(): _measure(file) for file in files}
    sums = partial / CHECKSUMS
    sums.write_text(json.dumps({"files": listed}, indent=1) + "\n")
    sync(sums)
    for folder in (*(entry for entry in partial.rglob("*") if entry.is_dir()), partial):
        sync(folder)


def _replace(target: Path, partial: Path) -> None:
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():  # a Ctrl-C may come when the new one is in place already
            aside.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- helpers


@contextmanager
def _explain_failure(target: Path, *, only_no_space: bool = False) -> Iterator[None]:
    """Turns the operating system's refusals into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(_existing_parent(target)).free / 1e6
            raise UserError(
                f"{_NO_SPACE[error.errno]} ({target}, {free:.1f} MB free). nothing was lost: "
                "what was there before is untouched. free some space, or save elsewhere"
            ) from error
        if only_no_space:
            raise
        raise UserError(
            f"cannot write there: {error.strerror} ({error.filename or target}). choose another folder"
        ) from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Marks the folder as being written, until the block or the process ends. The lock survives a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks; then two savers are the user's to avoid
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_live(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False  # its writer has just renamed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _leftovers(target: Path, kind: str) -> list[Path]:
    """`.NAME.kind-*` beside the target, the newest first."""
    prefix = f".{target.name}.{kind}-"
    try:
        found = [entry for entry in os.scandir(target.parent) if entry.name.startswith(prefix) and entry.is_dir()]
        return [Path(entry.path) for entry in sorted(found, key=lambda entry: entry.stat().st_mtime, reverse=True)]
    except FileNotFoundError:  # no parent folder, or an entry renamed while we look
        return []


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _file_problem(file: Path, size: int, sha256: str) -> str | None:
    try:
        if file.exists() and not file.is_file():
            return "is no file"  # a pipe or a device has no end
        if file.stat().st_size != size:  # before hashing gigabytes
            return f"has {file.stat().st_size} bytes instead of {size}"
        return None if _measure(file)["sha256"] == sha256 else "does not match its checksum"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:
        return "has a name that no file can have"
