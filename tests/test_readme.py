"""What the documents show is true: commands parse, links lead somewhere, lists are complete in both languages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from minga.cli.main import COMMANDS, build_parser
from minga.errors import UserError

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.es.md")
DOCUMENTS = (
    *READMES,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
)

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_TABLE_COMMAND = re.compile(r"^\| `minga ([a-z]+)` \|", re.MULTILINE)
_TREE_FOLDER = re.compile(r"^[├└]── (\w+)/", re.MULTILINE)


def _text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _command_lines(document: str) -> list[str]:
    lines = (line.strip() for fence in _FENCE.findall(_text(document)) for line in fence.splitlines())
    return [line for line in lines if line.startswith("minga ")]


def _links(document: str) -> list[str]:
    """Targets of links and pictures; what stands in a code block is no link."""
    return _LINK.findall(_FENCE.sub("", _text(document)))


def _anchors(document: Path) -> set[str]:
    """Headings as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    parser, _ = build_parser(words[:1])
    parser.parse_args(words)


@pytest.mark.parametrize("line", sorted({line for readme in READMES for line in _command_lines(readme)}))
def test_command_parses(line: str) -> None:
    _parse(line)


def test_command_that_does_not_parse_is_noticed() -> None:
    with pytest.raises(UserError):
        _parse("minga train --data shards --out runs/first --ours 1")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in _links(document):
        if "://" in target:
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        assert not anchor or anchor in _anchors(file), f"{document}: {target} has no such heading"


def test_both_readmes_show_the_same_commands() -> None:
    english, spanish = map(_command_lines, READMES)
    assert english == spanish and english


@pytest.mark.parametrize("readme", READMES)
def test_every_command_has_its_row(readme: str) -> None:
    assert _TABLE_COMMAND.findall(_text(readme)) == list(COMMANDS)


@pytest.mark.parametrize("readme", READMES)
def test_tree_is_the_package(readme: str) -> None:
    folders = {file.parent.name for file in (ROOT / "minga").glob("*/__init__.py")}
    assert set(_TREE_FOLDER.findall(_text(readme))) == folders


def test_map_names_existing_files() -> None:
    named = set(re.findall(r"`((?:minga|tests)/[\w/]+(?:\.py|/))`", _text("docs/map.md")))
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
