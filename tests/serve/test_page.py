"""The page in a real browser: a first message, sent by `?say=`, must end as an answer on the page."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium"),
]


def _page(url: str, profile: Path) -> str:
    """The document after the page's scripts have run for a minute of the browser's own, fast-forwarded time."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_message_is_answered_on_the_page(llm, address: str, tmp_path: Path) -> None:
    llm.words = ["Hola", "<b>mundo</b>", "desde", "Minga."]
    page = _page(f"{address}/?say=buenos%20d%C3%ADas", tmp_path)
    assert "buenos días" in page
    assert "desde Minga." in page
    assert "<b>mundo</b>" not in page  # what a model says is text, never markup
    assert "&lt;b&gt;mundo" in page
