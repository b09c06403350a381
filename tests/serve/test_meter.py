"""pytest tests/serve/test_meter.py"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.serve.meter import BATCH_ROWS, Meter, Total, Usage, report
from minga.serve.store import Store

ROOT = Path(__file__).parent.parent.parent
NEVER = 3600.0  # seconds: no batch is due in this test but by number, flush or close


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "minga.db")
    yield opened
    opened.close()


@pytest.fixture
def meter(store: Store) -> Iterator[Meter]:
    meter = Meter(store, batch_seconds=NEVER)
    yield meter
    meter.close()


def usage(number: int = 0, **fields: object) -> Usage:
    return Usage(
        **{"key": "ana", "model": "m", "endpoint": "/v1/chat/completions", "request_id": f"r{number}"} | fields
    )


def num_rows(store: Store) -> int:
    return store.rows("SELECT count(*) FROM usage")[0][0]


def fill_disk(store: Store) -> None:
    store.rows("PRAGMA max_page_count = 1")  # no more than it has


def free_disk(store: Store) -> None:
    store.rows("PRAGMA max_page_count = 1000000")


def test_a_row_has_all_that_was_recorded(store: Store, meter: Meter) -> None:
    meter.record(
        Usage(
            key="ana",
            model="m",
            endpoint="/v1/responses",
            request_id="r",
            status=499,
            finish_reason="abort",
            prompt_tokens=1,
            cached_tokens=2,
            completion_tokens=3,
            reasoning_tokens=4,
            busy_seconds=0.5,
            time=6.0,
        )
    )
    meter.flush()
    columns = "time, key, model, endpoint, request_id, status, finish_reason, prompt_tokens, cached_tokens, "
    columns += "completion_tokens, reasoning_tokens, busy_seconds"
    row = (6.0, "ana", "m", "/v1/responses", "r", 499, "abort", 1, 2, 3, 4, 0.5)
    assert store.rows(f"SELECT {columns} FROM usage") == [row]


def test_flush_and_close_write_what_is_left(store: Store) -> None:
    meter = Meter(store, batch_seconds=NEVER)
    meter.flush()
    for number in range(10):
        meter.record(usage(number))
    meter.flush()
    assert num_rows(store) == 10
    meter.record(usage())
    meter.close()
    assert num_rows(store) == 11
    meter.record(usage())  # too late
    assert (meter.num_lost, meter.num_failed_writes) == (1, 0)


def test_batches_are_written_without_being_asked(store: Store) -> None:
    """By time, and by number; `close` would write too, so it is the thread's own commit that is waited for."""
    for seconds, rows in ((0.0, 1), (NEVER, BATCH_ROWS)):
        before = num_rows(store)
        meter = Meter(store, batch_seconds=seconds)
        for number in range(rows):
            meter.record(usage(number))
        with meter._changed:
            assert meter._changed.wait_for(lambda: meter._num_done, timeout=60)  # noqa: B023
        assert num_rows(store) == before + rows
        meter.close()


def test_a_full_disk_stops_nobody_and_what_was_kept_is_written_later(
    store: Store, meter: Meter, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk(meter._store)
    for _ in range(3):
        for number in range(100):
            meter.record(usage(number))
        meter.flush()
    assert meter.num_failed_writes == 3
    assert len(caplog.records) == 1 and "the disk is full" in caplog.text
    free_disk(meter._store)
    meter.flush()
    assert num_rows(store) == 300
    assert meter.num_lost == 0
    assert "usage is written again" in caplog.text


def test_of_what_cannot_be_written_the_oldest_is_lost(store: Store) -> None:
    meter = Meter(store, batch_seconds=NEVER, max_unwritten=150)
    fill_disk(meter._store)
    for number in range(200):
        meter.record(usage(number))
    meter.flush()
    assert meter.num_lost == 50
    free_disk(meter._store)
    meter.close()
    assert store.rows("SELECT min(cast(substr(request_id, 2) AS INTEGER)), count(*) FROM usage") == [(50, 150)]


def test_what_cannot_be_written_at_the_end_is_counted(store: Store) -> None:
    meter = Meter(store, batch_seconds=NEVER)
    fill_disk(meter._store)
    for number in range(200):
        meter.record(usage(number))
    meter.close()
    assert meter.num_lost == 200


def test_a_row_that_no_database_takes_holds_up_nobody(
    store: Store, meter: Meter, caplog: pytest.LogCaptureFixture
) -> None:
    meter.record(usage(prompt_tokens=2**64))
    meter.flush()
    meter.record(usage())
    meter.flush()
    assert num_rows(store) == 1
    assert meter.num_lost == 1
    assert "OverflowError" in caplog.text


def test_a_killed_server_keeps_what_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "minga.db"
    code = (
        "import sys; from minga.serve.meter import Meter; from minga.serve.store import Store\n"
        "from tests.serve.test_meter import usage\n"
        "meter = Meter(Store(sys.argv[1]))\n"
        "[meter.record(usage(n)) for n in range(7)]\n"
        "meter.flush()\n"
        "print('flushed', flush=True)\n"
        "while True: meter.record(usage())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "flushed\n"
        process.send_signal(signal.SIGKILL)
    store = Store(path, create=False)
    assert store.rows("PRAGMA integrity_check") == [("ok",)]
    assert num_rows(store) >= 7
    store.close()


# ---------------------------------------------------------------------- sums


def test_a_report_sums_by_key_model_and_day(store: Store, meter: Meter) -> None:
    first, second = (datetime(2026, 11, day, 12).timestamp() for day in (1, 2))
    tokens = {
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "reasoning_tokens": 2,
        "busy_seconds": 0.5,
    }
    for key, model, time in (("ana", "m", first), ("ben", "m", second), ("ana", "n", second)):
        meter.record(usage(key=key, model=model, time=time, **tokens))
    meter.flush()
    one = (1, 10, 4, 5, 2, 0.5)
    two = (2, 20, 8, 10, 4, 1.0)
    assert report(store) == [Total("ana", *two), Total("ben", *one)]
    assert report(store, by="model") == [Total("m", *two), Total("n", *one)]
    assert report(store, by="day") == [Total("2026-11-01", *one), Total("2026-11-02", *two)]
    assert report(store, since=second) == [Total("ana", *one), Total("ben", *one)]
    assert report(store, until=second) == [Total("ana", *one)]
    assert report(store, since=second + 1) == []
    assert sum(report(store), Total("total")) == Total("total", 3, 30, 12, 15, 6, 1.5)
    assert Total("ana", *two).num_tokens == 30


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("mn"), st.integers(0, 10**6)), max_size=30))
def test_every_report_has_every_token(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]]
) -> None:
    store = Store(tmp_path_factory.mktemp("usage") / "minga.db")
    with store.transaction() as connection:
        insert = "INSERT INTO usage VALUES (?, ?, ?, '', '', 200, NULL, ?, 0, 0, 0, 0)"
        connection.executemany(insert, [(n * 1e4, key, model, tokens) for n, (key, model, tokens) in enumerate(rows)])
    for by in ("key", "model", "day"):
        assert sum(total.prompt_tokens for total in report(store, by=by)) == sum(tokens for _, _, tokens in rows)
        assert sum(total.num_requests for total in report(store, by=by)) == len(rows)
    store.close()
