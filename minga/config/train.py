"""A training run: every number that decides its outcome, in one frozen dataclass that is saved with the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from minga.config.model import ModelConfig
from minga.config.presets import laptop
from minga.errors import UserError

PRECISIONS = ("float32", "bf16", "int8", "fp8")


@dataclass(frozen=True)
class TrainConfig:
    """`minga train --data data --out runs/mine` with the defaults below. Units are in the comments.

    Raises `UserError`, naming the field, for numbers that make no run.
    """

    data: str = ""  # folder that `minga data` wrote
    out: str = ""  # run folder
    model: ModelConfig = field(default_factory=laptop)
    steps: int = 0  # optimizer steps; 0: as many as `hours` allows
    hours: float = 0.0  # wall clock for the whole run; the schedule follows the clock when steps is 0
    batch_size: int = 8  # sequences a micro-batch
    accumulate: int = 1  # micro-batches an optimizer step
    seq_len: int = 256  # tokens a sequence
    seed: int = 0
    precision: str = "float32"  # of the blocks' matrix products, forward and backward: float32 | bf16 | int8 | fp8
    # processes (minga/train/parallel.py); none of these changes what is computed
    dp: int = 0  # data parallel; 0: all there are / (ep · pp)
    ep: int = 1  # expert parallel
    pp: int = 1  # pipeline parallel
    # optimizer (minga/train/optim.py)
    lr_matrix: float = 0.02  # Muon: hidden matrices, experts included
    lr_embedding: float = 0.006  # AdamW: embedding and head
    lr_other: float = 0.003  # AdamW: norms, biases, router
    weight_decay: float = 0.0
    warmup: float = 0.02  # share of the run
    decay: float = 0.6  # share of the run that ends in a linear fall to lr * final_lr
    final_lr: float = 0.0
    clip: float = 1.0  # norm of all gradients together; 0: off
    # losses and balance (V3 sections 2.1.2, 2.2, 4.2)
    balance_rate: float = 0.001  # how far the router's bias moves after a step
    balance_rate_warm: float = 0.01  # the same for the first `balance_warm_steps` steps of a router
    balance_warm_steps: int = 400
    sequence_loss: float = 1e-4  # weight of the sequence-wise balance loss
    mtp_loss: float = 0.3  # weight of the multi-token prediction loss
    mtp_from: float = 0.6  # share of the run after which MTP is trained too (docs/log.md says what it gains)
    # watching
    eval_every: int = 100  # steps; 0: only at the end
    eval_tokens: int = 50_000  # held-out tokens of an evaluation during the run; the last one reads all
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "seq_len", "keep_checkpoints", "ep", "pp"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)} (run config). it must be at least 1")
        for name in (
            "steps",
            "hours",
            "dp",
            "eval_every",
            "checkpoint_every",
            "clip",
            "weight_decay",
            "sequence_loss",
            "mtp_loss",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value} (run config). it must not be negative")
        for name in ("warmup", "decay", "final_lr", "mtp_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)} (run config). it is a share, from 0 to 1")
        for name in ("lr_matrix", "lr_embedding", "lr_other"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name} is {getattr(self, name)} (run config). it must be a positive number")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is not known (run config). known: {', '.join(PRECISIONS)}")
        if not (self.steps or self.hours):
            raise UserError(
                "neither steps nor hours is set (run config). say how long to train: --steps N or --hours H"
            )
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len {self.seq_len} is above the model's max_position_embeddings "
                f"{self.model.max_position_embeddings} (run config). lower one or raise the other"
            )
