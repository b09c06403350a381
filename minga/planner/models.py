"""Which model is meant: a preset's name, or a path to a public config, without reading a weight."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from minga.config import PRESETS
from minga.errors import UserError
from minga.planner.architecture import Architecture, architecture_of

MOST_BYTES = 16 * 2**20  # of a config.json; real ones have a few thousand


def read_model(name: str) -> tuple[str, Architecture]:
    """(a short name, the model) of a preset, a config.json, or a folder that has one: a model, or a run with checkpoints.

    Raises `UserError`, with the nearest preset where nothing is there.
    """
    if name in PRESETS and not Path(name).exists():
        return name, architecture_of(PRESETS[name]())
    file = _config_file(Path(name))
    try:
        text = file.read_bytes()[: MOST_BYTES + 1]
        config = json.loads(text) if len(text) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UserError(f"cannot read {file}: {why} (--config). give a public config.json") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no object (--config). give a public config.json")
    try:
        return _title(config, file), architecture_of(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _config_file(path: Path) -> Path:
    """The path itself, or the config inside a folder; of a run the newest checkpoint's."""
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.is_dir():
        found = sorted(path.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
        if found:
            return found[-1]
        raise UserError(f"{path} has no config.json (--config). give a model's folder, or the file itself")
    near = difflib.get_close_matches(str(path), PRESETS, n=2)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"give a config.json, a model's folder or one of {', '.join(PRESETS)}"
    )
    raise UserError(f"{str(path)!r} is not there, and is no preset (--config). {hint}")


def _title(config: dict[str, object], file: Path) -> str:
    name = config.get("_name_or_path") or config.get("name")
    if isinstance(name, str) and name.strip() and len(name) < 100:
        return name
    return file.stem if file.name != "config.json" else file.resolve().parent.name
