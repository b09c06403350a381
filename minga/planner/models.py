"""Which model is meant: a preset's name, or a path to a public config, without reading a weight."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from minga.config import PRESETS
from minga.errors import UserError
from minga.planner.architecture import Architecture, architecture_of

MOST_BYTES = 16 * 2**20  # of a config.json; real ones have a few thousand
LONGEST_NAME = 100  # characters of a model's name or path that are said


def read_model(name: str, *, flag: str = "--config") -> tuple[str, Architecture]:
    """(a short name, the model) of a preset, a config.json, or a folder that has one: a model, or a run with checkpoints.

    flag: who asked. Raises `UserError`, with the nearest preset where nothing is there.
    """
    file: Path | str = name
    try:
        if name in PRESETS and not Path(name).exists():
            return name, architecture_of(PRESETS[name]())
        file = _config_file(name, flag)
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
        config = json.loads(text) if len(text) <= MOST_BYTES else None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UserError(f"cannot read {_cut(file)}: {why} ({flag}). give a public config.json") from None
    if len(text) > MOST_BYTES:
        raise UserError(
            f"{file} is above {MOST_BYTES // 2**20} MiB, too large for a config ({flag}). give a config.json"
        )
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no object ({flag}). give a public config.json")
    try:
        return _title(config, file), architecture_of(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _config_file(name: str, flag: str) -> Path:
    """The path itself, or the config inside a folder; of a run the newest checkpoint's."""
    path = Path(name)
    if not name.strip():
        raise UserError(f"the model's name is empty ({flag}). give a config.json, a model's folder or a preset")
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.is_dir():
        found = sorted(
            (file for file in path.glob("*/config.json") if file.is_file()), key=lambda file: file.stat().st_mtime
        )
        if found:
            return found[-1]
        raise UserError(f"{path} has no config.json ({flag}). give a model's folder, or the file itself")
    if path.exists():  # a pipe, a device: reading one may never end
        raise UserError(f"{path} is no regular file ({flag}). save the config, and give that file")
    near = difflib.get_close_matches(name.lower().removeprefix("deepseek-"), PRESETS, n=2)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"give a config.json, a model's folder or one of {', '.join(PRESETS)}"
    )
    raise UserError(f"{_cut(name)!r} is not there, and is no preset ({flag}). {hint}")


def _cut(name: object) -> str:
    text = str(name)
    return text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "..."


def _title(config: dict[str, object], file: Path) -> str:
    name = config.get("_name_or_path") or config.get("name")
    if isinstance(name, str) and name.strip() and len(name) <= LONGEST_NAME and name.isprintable():
        return name
    return file.stem if file.name != "config.json" else file.resolve().parent.name
