"""pytest tests/serve/test_log.py"""

from __future__ import annotations

import json
import logging
import os
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.errors import UserError
from minga.serve.log import Access, AccessLog, line

ACCESS = Access("req-1", "POST", "/v1/chat/completions", 200, 1.23456789, "ana", "m", 10, 5)


def test_a_line_has_what_is_known() -> None:
    now = datetime(2026, 11, 25, 14, 30, 0, 123456, tzinfo=timezone(timedelta(hours=-5)))
    assert json.loads(line(ACCESS, now)) == {
        "time": "2026-11-25T19:30:00.123Z",
        "request_id": "req-1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 1.2346,
        "key": "ana",
        "model": "m",
        "prompt_tokens": 10,
        "completion_tokens": 5,
    }
    refused = json.loads(line(Access("req-2", "GET", "/x", 404, 0.0), datetime.now(UTC)))
    assert refused["key"] is refused["model"] is refused["prompt_tokens"] is None


@given(st.text(), st.text(), st.text())
def test_nobody_can_forge_a_line_or_write_to_a_terminal(request_id: str, method: str, path: str) -> None:
    text = line(Access(request_id, method, path, 400, 0.1))
    assert text.endswith("\n") and text[:-1].isascii() and text[:-1].isprintable()
    entry = json.loads(text)
    assert entry["request_id"] == request_id[:200] and entry["method"] == method[:200]
    assert entry["path"] == path.partition("?")[0][:200]


@pytest.mark.parametrize("evil", ["\n", "\r\n", "\x1b[2J", "\x7f", "\x9b2J", "\u2028", "\u202e", "\ud800", "\0"])
def test_control_characters_are_escaped(evil: str) -> None:
    text = line(Access("r", "GET", f"/a{evil}b", 404, 0.0))
    assert evil not in text[:-1]
    assert json.loads(text)["path"] == f"/a{evil}b"


def test_a_query_is_not_logged() -> None:
    assert "mk-" not in line(Access("r", "GET", "/v1/models?key=mk-123", 401, 0.0))


def test_a_file_is_the_owners_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    for _ in range(2):
        log = AccessLog(path)
        log.write(ACCESS)
        log.write(ACCESS)
        log.close()
    assert [json.loads(text)["request_id"] for text in path.read_text().splitlines()] == ["req-1"] * 4
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_was_cut_goes_on_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    log = AccessLog(path)
    log.write(ACCESS)
    os.truncate(path, 0)
    log.write(ACCESS)
    log.close()
    assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().startswith(b"{")


def test_without_a_file_it_is_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    log = AccessLog()
    log.write(ACCESS)
    log.close()
    out, err = capfd.readouterr()
    assert out == "" and json.loads(err)["request_id"] == "req-1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_stops_nobody_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    log = AccessLog("/dev/full")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            log.write(ACCESS)
    log.close()
    assert log.num_lost == 3
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"access log cannot be opened: Is a directory"):
        AccessLog(tmp_path)
