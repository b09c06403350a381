"""The page: its Markdown under node, its files as text, and the whole of it in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import minga.serve

PAGE = Path(minga.serve.__file__).parent / "page"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

needs_node = pytest.mark.skipif(NODE is None, reason="there is no node: apt install nodejs")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")


# ---------------------------------------------------------------------------------------------- files


def _scripts() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in PAGE.glob("*.js")}


def test_no_script_makes_markup_out_of_text():
    for name, text in _scripts().items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), name


def test_every_import_is_a_file_of_the_page():
    imported = {file for text in _scripts().values() for file in re.findall(r'from "\./(\S+)"', text)}
    assert imported | {"app.js"} == set(_scripts())  # and none is left over


def test_every_word_is_said_in_english_and_spanish():
    scripts = _scripts()
    table = dict(re.findall(r"^\t(\w+): \[(.*)\],$", scripts["words.js"], re.MULTILINE))
    assert all(len(json.loads(f"[{texts}]")) == 2 for texts in table.values())
    used = set(re.findall(r'data-t(?:-label|-hint)?="(\w+)"', (PAGE / "index.html").read_text(encoding="utf-8")))
    for text in scripts.values():
        used |= set(re.findall(r'\bt\("(\w+)"', text))
    assert used <= set(table) and len(used) > 40


def test_every_element_that_a_script_looks_up_is_there():
    ids = re.findall(r'\bid="([\w-]+)"', (PAGE / "index.html").read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))
    assert {found for text in _scripts().values() for found in re.findall(r'\$\("([\w-]+)"\)', text)} <= set(ids)


# ---------------------------------------------------------------------------------------------- Markdown


def _markdown(*texts: str) -> list[Any]:
    """The trees that markdown.js makes, [tag, attributes, ...children], here without the attributes."""
    program = """
        import { readFileSync } from "node:fs";
        const source = readFileSync(process.argv[1], "utf8");
        const { markdown } = await import(`data:text/javascript;base64,${Buffer.from(source).toString("base64")}`);
        const bare = (tree) => typeof tree === "string" ? tree : [tree[0], ...tree.slice(2).map(bare)];
        console.log(JSON.stringify(JSON.parse(readFileSync(0)).map((text) => markdown(text).map(bare))));
    """
    command = [str(NODE), "--input-type=module", "-e", program, str(PAGE / "markdown.js")]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@needs_node
def test_markdown():
    cases = {
        "one\ntwo\n\nthree": [["p", "one", ["br"], "two"], ["p", "three"]],
        "**bold *both*** and *one*": [["p", ["strong", "bold ", ["em", "both"]], " and ", ["em", "one"]]],
        "`a**b**<i>`": [["p", ["code", "a**b**<i>"]]],
        "2 * 3 * 4, a*b*c, **open": [["p", "2 * 3 * 4, a*b*c, **open"]],
        "see:\n- a\n- *b*\n3. c": [["p", "see:"], ["ul", ["li", "a"], ["li", ["em", "b"]]], ["ol", ["li", "c"]]],
        "## Title": [["h3", "Title"]],
        "```py\n<b>\n\n  x\n```\nafter": [["pre", ["code", "<b>\n\n  x"]], ["p", "after"]],
        "```\nstill coming": [["pre", ["code", "still coming"]]],
        "<script>alert(1)</script>": [["p", "<script>alert(1)</script>"]],
        "": [],
    }
    assert _markdown(*cases) == list(cases.values())


@needs_node
def test_hostile_markdown_is_read_in_no_time():
    texts = [piece * 20_000 for piece in ("*", "**", "`", "*a ", "**a** ", "`*", "- ", "# ", "```\n")]
    assert len(_markdown(*texts)) == len(texts)  # within the timeout, and without a stack overflow


# ---------------------------------------------------------------------------------------------- browser


def _rendered(url: str, profile: Path) -> str:
    """The document after the page's scripts have run for ten seconds of the browser's own, fast-forwarded time."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=10000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@needs_chromium
def test_a_message_is_answered_on_the_page(llm, address: str, tmp_path: Path) -> None:
    llm.words = ["**Hola**", "<b>mundo</b>", "desde", "Minga."]
    page = _rendered(f"{address}/?say=buenos%20d%C3%ADas", tmp_path / "profile")
    assert "buenos días" in page
    assert "<strong>Hola</strong>" in page and "desde Minga." in page
    assert "<b>mundo</b>" not in page  # what a model says is text, never markup
    assert "&lt;b&gt;mundo" in page
    assert ">4 tokens" in page


@pytest.mark.slow
@needs_chromium
def test_a_run_is_shown_on_the_page(address: str, tmp_path: Path) -> None:
    watched = {"mfu": 0.375, "memory": 1.25e9, "grad_norm": 1.0}
    steps = [{"kind": "step", "step": n, "loss": 5 - n / 10, "seconds": n, **watched} for n in range(1, 21)]
    steps[4]["expert_load"] = [[2.0, 1.0], [1, 1], [1, 1]]
    steps[9]["expert_load"] = [[0.5, 1.5], [1, 1], [2, 0]]
    lines = [
        {"kind": "start", "config": {"steps": 20}, "parameters": {"total": 12_300_000, "active": 4_560_000}},
        *steps,
        {"kind": "skip", "step": 7, "reason": "leapt"},
        {"kind": "eval", "step": 20, "val_loss": 3.2, "bits_per_byte": 2.125, "mtp_acceptance": 0.64},
        {"kind": "sample", "step": 20, "prompt": "To be", "text": ", or <i>not</i>"},
        {"kind": "end", "reason": "done", "seconds": 20},
    ]
    (tmp_path / "village").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st'
    (tmp_path / "village" / "run.jsonl").write_text(text)
    page = _rendered(f"{address}/#runs/village", tmp_path / "profile")
    for value in ("12.3M", "2.125", "64%", "3.00", "20 s", "finished", "38%", "1.25 GB"):
        assert f">{value}<" in page, value
    assert "<b>To be</b>, or &lt;i&gt;not&lt;/i&gt;" in page
    assert page.count("<polyline") == 9  # loss, MFU, norm twice; held-out loss, bits per byte, MTP acceptance
    assert len(re.findall(r'<circle [^>]*class="dot spike"', page)) == 1
    shades = re.findall(r'<path class="(hot|cold)" fill-opacity="([\d.]+)" d="([^"]*)"', page)
    assert {(kind, shade): d.count("M") for kind, shade, d in shades} == {
        ("hot", "1"): 2, ("hot", "0.6"): 1, ("cold", "1"): 2,
    }  # fmt: skip
    assert len(re.findall(r'<rect [^>]*class="(?:hot|cold)"', page)) == 6
