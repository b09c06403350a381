from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from minga.data.sources import find_sources, read_documents
from minga.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("bé\r\n", encoding="utf-8", newline="")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.rst").write_text("c")
    (tmp_path / "deep" / "scan.PDF").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    return tmp_path


def texts(*inputs: str | Path, **options: list[str]) -> list[str]:
    return [document.text for document in read_documents(list(inputs), **options)]


def test_folder_is_read_in_order_without_hidden_files(folder: Path) -> None:
    assert texts(folder) == ["marked", "bé\r\n", "c"]
    assert find_sources([folder]).skipped == {".pdf": 1}
    assert [d.source for d in read_documents([folder / "b.txt"])] == [str(folder / "b.txt")]


def test_globs_files_and_repeats(folder: Path) -> None:
    assert texts(f"{folder}/**/*.rst", folder / "b.txt") == ["c", "bé\r\n"]
    assert texts(folder / "b.txt", folder, f"{folder}/*.txt", exclude=["empty*"]) == ["bé\r\n", "marked", "c"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    assert texts(tmp_path / "a[1].txt") == ["one"]


def test_exclude(folder: Path) -> None:
    assert texts(folder, exclude=["*.md", "*/deep/*"]) == ["bé\r\n"]
    with pytest.raises(UserError, match=r"--exclude leaves no input \(\*\)"):
        find_sources([folder], exclude=["*"])


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("entrée\n".encode())))
    assert texts("-", "-") == ["entrée\n"]
    assert not sys.stdin.closed


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "uno\\u00f1", "id": 1}\n\n{"text": ""}\r\n{"text": "dos"}')
    seen: list[bytes] = []
    assert [d.text for d in find_sources([path]).sources[0].documents(seen.append)] == ["unoñ", "dos"]
    assert b"".join(seen) == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"good \xe9 bad", r"x.txt is not UTF-8 text \(byte 5 is 0xe9\)"),
        ("x.txt", b"\xef\xbb\xbfab\xff", r"byte 5 is 0xff"),
        ("x.txt", b"cut off \xf0\x9f\x98", r"byte 8 is 0xf0"),
        ("x.txt", b"surrogate \xed\xa0\x80", r"byte 10 is 0xed"),
        ("x.txt", b"", "x.txt is empty"),
        ("x.txt", b" \n\t\n", "x.txt is empty"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"x.jsonl is not UTF-8 text \(byte 24 is 0xff\)"),
        ("x.jsonl", b'\xef\xbb\xbf{"text": "\xff"}', r"byte 13 is 0xff"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"no JSON \(.*x.jsonl, line 2: Expecting value\)"),
        ("x.jsonl", b'["a"]', r'no "text" \(.*line 1: it has none\)'),
        ("x.jsonl", b'{"content": "a"}', r"no \"text\" \(.*line 1: it has 'content'\)"),
        ("x.jsonl", b'{"text": 3}', r'no "text"'),
        ("x.jsonl", b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        ("x.jsonl", b"[" * 100_000, r"no JSON \(.*line 1: too deep"),
        ("x.jsonl", b"9" * 5_000, r"no JSON \(.*line 1: too deep or too large"),
    ],
)
def test_what_is_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no input is named"):
        find_sources([])
    with pytest.raises(UserError, match="missing.txt does not exist"):
        find_sources([tmp_path / "missing.txt"])
    with pytest.raises(UserError, match=r"\*.txt does not exist .* check the pattern"):
        find_sources([f"{tmp_path}/*.txt"])
    with pytest.raises(UserError, match="has no text files .it is empty."):
        find_sources([tmp_path])
    (tmp_path / "a.pdf").touch()
    with pytest.raises(UserError, match="has no text files .it holds 1 .pdf."):
        find_sources([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no regular file"):
        find_sources([tmp_path / "pipe"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("secret")
    (tmp_path / "x.txt").chmod(0)
    with pytest.raises(UserError, match="cannot read .*Permission denied"):
        texts(tmp_path / "x.txt")
