"""Folders that are whole or not there: replacing, crashing, filling the disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from minga.checkpoint import durable
from minga.checkpoint.durable import durable_folder, find_problems, recover, verify_folder
from minga.errors import UserError


def write(path: Path, text: str) -> None:
    with durable_folder(path) as tmp:
        (tmp / "a.safetensors").write_text(text)
        (tmp / "state").mkdir()
        (tmp / "state" / "b.bin").write_bytes(text.encode() * 3)


def names_beside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_a_new_folder_is_listed_and_verifies(tmp_path):
    path = tmp_path / "deep" / "model"
    write(path, "one")
    assert (path / "state" / "b.bin").read_bytes() == b"oneoneone"
    listed = json.loads((path / "checksums.json").read_text())["files"]
    assert sorted(listed) == ["a.safetensors", "state/b.bin"]
    assert listed["a.safetensors"]["size"] == 3
    verify_folder(path)
    assert names_beside(path) == ["model"]


def test_nothing_is_seen_before_the_end_and_the_old_is_replaced(tmp_path):
    path = tmp_path / "model"
    write(path, "one")
    with durable_folder(path) as tmp:
        (tmp / "new.safetensors").write_text("two")
        assert (path / "a.safetensors").read_text() == "one"
        assert tmp.name == f".model.partial-{os.getpid()}"
    assert sorted(entry.name for entry in path.iterdir()) == ["checksums.json", "new.safetensors"]
    assert names_beside(path) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "model"
    write(path, "one")
    with pytest.raises(type(error)), durable_folder(path) as tmp:
        (tmp / "a.safetensors").write_text("two")
        raise error
    verify_folder(path)
    assert (path / "a.safetensors").read_text() == "one"
    assert names_beside(path) == ["model"]


def test_damage_is_found_and_named(tmp_path):
    path = tmp_path / "model"
    write(path, "one")
    (path / "note.txt").write_text("not ours, not listed")
    assert find_problems(path) == []
    (path / "a.safetensors").write_text("onE")
    (path / "state" / "b.bin").write_bytes(b"x")
    assert find_problems(path) == ["a.safetensors does not match its checksum", "state/b.bin has 1 bytes instead of 9"]
    with pytest.raises(UserError, match=r"a\.safetensors does not match its checksum .*earlier checkpoint"):
        verify_folder(path)
    (path / "a.safetensors").unlink()
    assert find_problems(path)[0] == "a.safetensors cannot be read: No such file or directory"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', "[" * 100_000])
def test_damaged_checksums(tmp_path, content):
    (tmp_path / "checksums.json").write_text(content)
    assert find_problems(tmp_path) == ["checksums.json is damaged"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b"])
def test_checksums_of_files_elsewhere(tmp_path, name):
    (tmp_path / "checksums.json").write_text(json.dumps({"files": {name: {"size": 0, "sha256": ""}}}))
    assert find_problems(tmp_path) == ["checksums.json is damaged"]


def test_checksums_of_what_is_no_file(tmp_path):
    """A pipe would be read for ever, as would a link to /dev/zero, whose size is 0 as well."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    listed = {name: {"size": 0, "sha256": ""} for name in ("pipe", "zero", "a\0b", "\ud800")}
    (tmp_path / "checksums.json").write_text(json.dumps({"files": listed}))
    assert [problem.partition(" ")[2] for problem in find_problems(tmp_path)] == [
        *["is no file"] * 2,
        *["has a name that no file can have"] * 2,
    ]
    (tmp_path / "checksums.json").write_text('{"files": {"a": {"size": 1e999, "sha256": ""}}}')
    assert find_problems(tmp_path) == ["checksums.json is damaged"]


def test_no_checksums(tmp_path):
    with pytest.raises(UserError, match=r"checksums\.json cannot be read"):
        verify_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------- what not to touch


def test_other_things_are_not_replaced(tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no model"):
        write(documents, "one")
    with pytest.raises(UserError, match="a file stands where a folder should be"):
        write(documents / "thesis.txt", "one")
    assert (documents / "thesis.txt").read_text() == "years of work"
    (documents / "thesis.txt").unlink()
    write(documents, "one")  # an empty folder may be


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.safetensors").read_text() == "one"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write there: .*choose another"):
        write(tmp_path / "file" / "model", "one")


def test_two_savers_to_one_name(tmp_path):
    path = tmp_path / "model"
    with durable_folder(path) as tmp:
        (tmp / "a.safetensors").write_text("first")
        with pytest.raises(UserError, match="another process is saving there"):
            write(path, "second")
    assert (path / "a.safetensors").read_text() == "first"


# ---------------------------------------------------------------------------------------------------- crashes


def test_what_dead_processes_left_is_removed(tmp_path):
    path = tmp_path / "model"
    write(path, "one")
    for name in (".model.partial-1", f".model.partial-{os.getpid()}", ".model.old-77"):
        shutil.copytree(path, tmp_path / name)
        (tmp_path / name / "checksums.json").unlink()
    (tmp_path / ".model2.partial-1").mkdir()  # of another folder
    write(path, "two")
    assert names_beside(path) == [".model2.partial-1", "model"]


def test_a_crash_between_the_two_renames(tmp_path):
    path, old, new = tmp_path / "model", tmp_path / ".model.old-7", tmp_path / ".model.partial-7"
    write(path, "one")
    write(tmp_path / "other", "two")
    path.rename(old)
    (tmp_path / "other").rename(new)
    recover(path)
    assert (path / "a.safetensors").read_text() == "two"  # the newer one, as it is complete

    shutil.rmtree(path)
    shutil.copytree(old, new)
    (new / "a.safetensors").write_text("tw")  # cut short
    recover(path)
    assert (path / "a.safetensors").read_text() == "one"
    verify_folder(path)
    write(path, "three")
    assert names_beside(path) == ["model"]


def test_recover_waits_for_a_living_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_WAIT_FOR_WRITER", 0.1)
    path = tmp_path / "model"
    with durable_folder(path) as tmp:
        (tmp / "a.safetensors").write_text("one")
        recover(path)
        assert tmp.exists() and not path.exists()


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(path, "one")
    rename = Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(path, "two")
    monkeypatch.undo()
    assert (path / "a.safetensors").read_text() == "one"
    assert names_beside(path) == ["model"]


def _save_forever(folder: str, started: Connection) -> None:
    """Replaces one folder again and again, and writes new ones beside it. Every file says which save it is of."""
    number = max((int(p.name.split("-")[1]) for p in Path(folder).glob("step-*")), default=0)
    started.send(None)
    while True:
        number += 1
        for name in ("latest", f"step-{number}"):
            with durable_folder(Path(folder) / name) as tmp:
                for part in ("a.safetensors", "b.safetensors", "c.safetensors"):
                    (tmp / part).write_text(f"{number:08d}" * 2000)


def test_killed_at_fifty_random_moments(tmp_path):
    """kill -9 during a save, fifty times over: what is there afterwards is whole, and never older than before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minga.checkpoint.durable"])
    dice, latest = random.Random(0), tmp_path / "latest"
    begin = time.monotonic()
    write(latest, "00000000")
    seconds_per_save = time.monotonic() - begin
    last = interrupted = 0
    for _ in range(50):
        waiting, started = context.Pipe(duplex=False)
        saver = context.Process(target=_save_forever, args=(str(tmp_path), started))
        saver.start()
        waiting.recv()
        time.sleep(dice.uniform(0.0, 4 * seconds_per_save))
        saver.kill()
        saver.join()
        interrupted += any(".partial-" in entry.name for entry in tmp_path.iterdir())
        recover(latest)
        verify_folder(latest)
        contents = {file.read_text()[:8] for file in latest.glob("*.safetensors")}
        assert len(contents) == 1
        number = int(contents.pop())
        assert number >= last
        last = number
        for step in tmp_path.glob("step-*"):
            verify_folder(step)
    assert last > 0 and interrupted > 0  # the kills did hit saves, and between them some came through
    write(latest, "end")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".latest")]


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_in_one_line(tmp_path, monkeypatch, number):
    path = tmp_path / "model"
    write(path, "one")

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the device .*nothing was lost"):
        write(path, "two")
    monkeypatch.undo()
    verify_folder(path)
    assert (path / "a.safetensors").read_text() == "one"
    assert names_beside(path) == ["model"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_while_writing(tmp_path):
    write(tmp_path / "model", "one")
    with pytest.raises(UserError, match="no space left on the device"), durable_folder(tmp_path / "model") as tmp:
        (tmp / "a.safetensors").symlink_to("/dev/full")
        (tmp / "a.safetensors").write_text("two")
    verify_folder(tmp_path / "model")
    assert names_beside(tmp_path / "model") == ["model"]


def test_other_errors_of_the_caller_stay_errors(tmp_path):
    with pytest.raises(FileNotFoundError), durable_folder(tmp_path / "model") as tmp:
        (tmp / "missing").read_text()


def test_a_really_full_disk(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("needs root to mount a small disk")
    result = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=200k", "tmpfs", mounted], capture_output=True, check=False
    )
    if result.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        write(mounted / "model", "one")
        with pytest.raises(UserError, match="no space left on the device"), durable_folder(mounted / "model") as tmp:
            (tmp / "a.safetensors").write_bytes(bytes(1_000_000))
        verify_folder(mounted / "model")
        write(mounted / "model", "two")
        assert names_beside(mounted / "model") == ["model"]
    finally:
        subprocess.run([shutil.which("umount") or "umount", mounted], check=True)
