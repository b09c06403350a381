"""Where a run's numbers go besides `run.jsonl`: TensorBoard, trackio, Weights & Biases, each behind the same two verbs.

The packages are extras and are imported only when they are asked for. All three are
told the step of every number, so a resumed run goes on in the curve where it was stopped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from minga.errors import UserError

SINKS = ("tensorboard", "trackio", "wandb")
PROJECT = "minga"


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_sinks(names: Iterable[str], run: Path, config: Mapping[str, Any], *, step: int) -> list[Sink]:
    """Opens each sink for the run in folder `run`, whose next step is `step` + 1."""
    openers: dict[str, Callable[..., Sink]] = {"tensorboard": _TensorBoard, "trackio": _Tracker, "wandb": _Tracker}
    return [openers[name](name, run, config, step) for name in dict.fromkeys(names)]


def check_sinks(names: Iterable[str]) -> None:
    """Raises `UserError` for a name that is not known and for a package that is not there."""
    for name in names:
        if name not in SINKS:
            raise UserError(f"{name!r} is no place to log to (--log). known: {', '.join(SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"the package {name} is not installed (--log {name}). pip install {name}")


class _TensorBoard:
    """Event files in the run's `tensorboard/`; `tensorboard --logdir runs` shows all runs side by side."""

    def __init__(self, name: str, run: Path, config: Mapping[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a killed run wrote after the checkpoint from which this one goes on
        self._writer: Any = SummaryWriter(str(run / name), purge_step=step + 1 if step else None)
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """trackio and wandb, whose `init`, `log` and `finish` are alike. A run is named by its folder.

    wandb knows a run again by an id, which must not be the name: another folder, or the next run in this one, may have it.
    """

    def __init__(self, name: str, run: Path, config: Mapping[str, Any], step: int):
        module: Any = importlib.import_module(name)
        options: dict[str, Any] = {"resume": "allow" if step else "never"}
        if name == "wandb":
            file = run / "wandb.id"
            if not step or not file.is_file():
                file.write_text(uuid.uuid4().hex[:12])
            options |= {"id": file.read_text(), "resume": "allow", "dir": str(run)}
        with redirect_stdout(sys.stderr):  # stdout is for the result, which may be one JSON document
            self._run = module.init(project=PROJECT, name=run.resolve().name, config=dict(config), **options)
        self._finish = module.finish

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._finish()
