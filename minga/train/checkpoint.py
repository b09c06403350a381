"""A training checkpoint: a model folder as anyone can open, with `training_state/` beside the weights.

    checkpoint-000200/
        config.json  model.safetensors  tokenizer.json ...   the model (docs/formats.md)
        training_state/state.json                            step, seconds, loader position
        training_state/optimizer.safetensors                 every moment, and torch's random state
        checksums.json                                       sha256 of each file, written last

A resumed run is the uninterrupted one bit for bit, because all that a step reads is here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
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
from minga.train.optim import Optimizer

RANDOM_STATE = "torch random state"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. `loader` is the loader's `state_dict`; `seconds` the time trained so far."""

    step: int
    tokens: int
    seconds: float
    loader: dict[str, Any]


def save_checkpoint(
    run: Path, state: TrainingState, model: Transformer, moments: dict[str, Tensor], tokenizer: Tokenizer, *, keep: int
) -> Path:
    """Writes `checkpoint-STEP` whole or not at all, then drops all but the newest `keep`. `moments`: the optimizer's state."""
    folder = run / f"checkpoint-{state.step:06d}"
    with durable_folder(folder) as partial:
        write_into(partial, model, tokenizer)
        training = partial / "training_state"
        training.mkdir()
        tensors = {**moments, RANDOM_STATE: torch.get_rng_state()}
        hf.write_tensors(training / "optimizer.safetensors", tensors)
        (training / "state.json").write_text(json.dumps(vars(state), indent=2) + "\n")
    for step in checkpoint_steps(run)[:-keep]:
        shutil.rmtree(run / f"checkpoint-{step:06d}")
    return folder


def load_checkpoint(folder: Path, model: Transformer, optimizer: Optimizer) -> TrainingState:
    """Puts weights, moments and random state back. Raises `UserError` if the folder is of another model or no run."""
    weights, moments, state = read_checkpoint(folder, model.config)
    model.load_state_dict(weights)
    optimizer.load_state_tensors(moments)
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
