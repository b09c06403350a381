"""A training checkpoint: a model folder as anyone can open, with `training_state/` beside the weights.

    checkpoint-000200/
        config.json  model.safetensors  tokenizer.json ...   the model (docs/formats.md)
        ema/                                                 the mean of the weights, a model folder too, if there is one
        training_state/state.json                            step, seconds, loader position, what the guard remembers
        training_state/optimizer.safetensors                 every moment, and torch's random state
        checksums.json                                       sha256 of each file, written last

A resumed run is the uninterrupted one bit for bit, because all that a step reads is here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minga.checkpoint import hf
from minga.checkpoint.durable import durable_folder
from minga.config import ModelConfig
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.store import checkpoint_steps, load, write_into
from minga.train.ema import Ema
from minga.train.guard import require_finite_weights
from minga.train.optim import Optimizer

RANDOM_STATE = "torch random state"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. `loader` and `guard` are their `state_dict`; `seconds` the time trained so far."""

    step: int
    tokens: int
    seconds: float
    loader: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    state: TrainingState,
    model: Transformer,
    moments: dict[str, Tensor],
    tokenizer: Tokenizer,
    *,
    keep: int,
    ema: Ema | None = None,
) -> Path:
    """Writes `checkpoint-STEP` whole or not at all, then drops all but the newest `keep` up to this one.

    moments: the optimizer's state. Raises `Diverged`, before anything is written, for a model whose weights are not finite.
    """
    require_finite_weights(model)
    folder = run / f"checkpoint-{state.step:06d}"
    with durable_folder(folder) as partial:
        write_into(partial, model, tokenizer)
        if ema is not None:
            (partial / "ema").mkdir()
            write_into(partial / "ema", ema.model, tokenizer)
        training = partial / "training_state"
        training.mkdir()
        tensors = {**moments, RANDOM_STATE: torch.get_rng_state()}
        tensors = dict(
            sorted(tensors.items())
        )  # a resumed run, whose moments came in file order, writes the same bytes
        hf.write_tensors(training / "optimizer.safetensors", tensors)
        (training / "state.json").write_text(json.dumps(vars(state), indent=2) + "\n")
    # A later one can only be damaged, else the run had gone on from there: it must not count among those to keep.
    for step in [step for step in checkpoint_steps(run) if step <= state.step][:-keep]:
        shutil.rmtree(run / f"checkpoint-{step:06d}")
    return folder


def load_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer, *, ema: Ema | None = None) -> TrainingState:
    """Puts weights, their mean, moments and random state back. Raises `UserError` if the folder is of another model or no run."""
    weights, moments, state = read_checkpoint(folder, model.config)
    model.load_state_dict(weights)
    optimizer.load_state_tensors(moments)
    if ema is not None:
        ema.model.load_state_dict(load(folder / "ema").state_dict())
    return state


def read_checkpoint(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainingState]:
    """(weights, optimizer state, where the run stood) of a checkpoint of `config`; sets torch's random state.

    Raises `UserError` as `load_checkpoint` does.
    """
    file = folder / "training_state" / "state.json"
    if not file.is_file():
        raise UserError(f"this is a model without training state ({folder}). choose a run's checkpoint to resume")
    saved = load(folder)
    if saved.config != config:
        raise UserError(
            f"the checkpoint has another model config than this run ({folder}). resume with the same settings"
        )
    with safe_open(folder / "training_state" / "optimizer.safetensors", framework="pt") as tensors:
        moments = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118  not a dict
    torch.set_rng_state(moments.pop(RANDOM_STATE))
    return saved.state_dict(), moments, TrainingState(**json.loads(file.read_text()))
