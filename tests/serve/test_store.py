"""pytest tests/serve/test_store.py"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minga.errors import UserError
from minga.serve import store as store_module
from minga.serve.store import APPLICATION_ID, SCHEMA_VERSION, Store

ROOT = Path(__file__).parent.parent.parent
INSERT = "INSERT INTO usage VALUES (?, 'ana', 'm', '/v1', 'r', 200, 'stop', 1, 0, 1, 0, 0.5)"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "minga.db")
    yield opened
    opened.close()


def num_rows(store: Store) -> int:
    return store.rows("SELECT count(*) FROM usage")[0][0]


def write(store: Store, *times: float) -> None:
    with store.transaction() as connection:
        connection.executemany(INSERT, [(time,) for time in times])


def test_what_is_committed_is_there_when_it_is_opened_again(store: Store) -> None:
    write(store, 1.0, 2.0)
    store.close()
    again = Store(store.path, create=False)
    assert again.rows("SELECT time FROM usage ORDER BY 1") == [(1.0,), (2.0,)]
    assert again.rows("PRAGMA journal_mode") == [("wal",)]
    assert again.rows("PRAGMA synchronous") == [(2,)]  # FULL
    assert again.rows("PRAGMA user_version") == [(SCHEMA_VERSION,)]
    again.close()


def test_only_the_owner_may_read_it(store: Store) -> None:
    write(store, 1.0)
    files = sorted(store.path.parent.iterdir())
    assert [file.name for file in files] == ["minga.db", "minga.db-shm", "minga.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_an_exception_undoes_all_of_a_transaction(store: Store) -> None:
    with pytest.raises(KeyError), store.transaction() as connection:
        connection.execute(INSERT, (1.0,))
        raise KeyError
    assert num_rows(store) == 0
    write(store, 2.0)
    assert num_rows(store) == 1


def test_it_is_read_while_another_connection_writes(store: Store) -> None:
    write(store, 1.0)
    reader = Store(store.path, create=False)
    with store.transaction() as connection:
        connection.execute(INSERT, (2.0,))
        assert num_rows(reader) == 1
    assert num_rows(reader) == 2
    reader.close()


def test_a_second_connection_leaves_the_locks_of_the_first(store: Store) -> None:
    """Else the last one of another process believes that it is the last of all, and takes the -wal along as it closes."""
    write(store, 1.0)
    second = Store(store.path)
    code = f"from minga.serve.store import Store; s = Store({str(store.path)!r}); print(s.rows('SELECT 1')); s.close()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[(1,)]\n"
    write(second, 2.0)
    assert store.path.with_name("minga.db-wal").exists()
    second.close()
    with sqlite3.connect(store.path) as outside:
        assert outside.execute("SELECT count(*) FROM usage").fetchone() == (2,)


def test_two_that_create_it_at_once_agree(tmp_path: Path) -> None:
    start, opened = threading.Barrier(4), []

    def open_it() -> None:
        start.wait()
        opened.append(Store(tmp_path / "minga.db"))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for number, each in enumerate(opened):
        write(each, number)
    assert [num_rows(each) for each in opened] == [4] * 4
    for each in opened:
        each.close()


def test_a_killed_process_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    """SIGKILL comes while it writes on; in the file are the commits it announced, and whole ones only."""
    path = tmp_path / "minga.db"
    code = (
        "import sys; from minga.serve.store import Store; from tests.serve.test_store import write\n"
        "store, number = Store(sys.argv[1]), 0\n"
        "while True:\n"
        "    write(store, number, number + 0.5)\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(5):
            announced = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = process.stdout.read().split()
    announced = int(last[-1]) if last else announced
    survivor = Store(path, create=False)
    assert survivor.rows("PRAGMA integrity_check") == [("ok",)]
    found = num_rows(survivor)
    assert found % 2 == 0 and announced <= found // 2 <= announced + 1
    write(survivor, 1e9)
    survivor.close()


def test_a_full_disk(store: Store) -> None:
    write(store, 1.0)
    store.rows("PRAGMA max_page_count = 1")  # never below what it has
    with pytest.raises(UserError, match=r"the disk is full .*minga.db.*free some space"):
        write(store, *range(10_000))
    assert num_rows(store) == 1
    store.rows("PRAGMA max_page_count = 100000")
    write(store, 2.0)
    assert num_rows(store) == 2


def test_another_writer_that_does_not_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.0)
    other = Store(store.path)
    with store.transaction(), pytest.raises(UserError, match="another program holds the database"):
        write(other, 1.0)
    other.close()


# ---------------------------------------------------------------------- files that are none


def database(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_files_that_are_no_store(tmp_path: Path) -> None:
    path = tmp_path / "minga.db"

    def refused(message: str, *, create: bool = True) -> None:
        with pytest.raises(UserError, match=message) as caught:
            Store(path, create=create)
        assert str(path) in str(caught.value)

    refused(r"there is no such file .*minga keys add NAME", create=False)
    assert not path.exists()
    path.mkdir()
    refused("this is no file")
    path.rmdir()
    os.mkfifo(path)
    refused("this is no file")
    path.unlink()
    path.write_bytes(b"a text, and a long one " * 100)
    refused("this is no SQLite file")
    path.unlink()
    database(path, "CREATE TABLE songs (title TEXT)")
    refused("another program's database")
    path.unlink()
    database(path, f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    refused(rf"the file has format {SCHEMA_VERSION + 1}, and this Minga knows {SCHEMA_VERSION} .*update Minga")
    path = tmp_path / "gone" / "minga.db"
    refused(r"there is no such file .*check the folder")
    path = Path("a\0b")
    with pytest.raises(UserError, match="embedded null byte"):
        Store(path)


def test_an_empty_file_becomes_one(tmp_path: Path) -> None:
    """What a process leaves that was killed before it wrote the tables."""
    (tmp_path / "minga.db").touch()
    store = Store(tmp_path / "minga.db", create=False)
    assert num_rows(store) == 0
    store.close()


def test_a_damaged_file(store: Store) -> None:
    write(store, *range(2000))
    store.close()
    data = bytearray(store.path.read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    store.path.write_bytes(data)
    with pytest.raises(UserError, match="the database is damaged"):
        Store(store.path).rows("SELECT sum(time) FROM usage NOT INDEXED")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_cannot_be_written(store: Store) -> None:
    store.close()
    store.path.chmod(0o400)
    with pytest.raises(UserError, match="Permission denied"):
        Store(store.path)
