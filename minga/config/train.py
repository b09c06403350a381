"""A training run: every number that decides its outcome, in one frozen dataclass that is saved with the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from minga.config.model import ModelConfig
from minga.config.presets import laptop
from minga.errors import UserError

PRECISIONS = ("float32", "bf16", "int8", "fp8")
WEIGHT_DTYPES = ("float32", "bf16")
OPTIMIZER_BITS = (32, 8)


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
    batch_warmup: float = 0.0  # share of the run in which a step's micro-batches grow from 1 to `accumulate`
    seq_warmup: float = 0.0  # share of the run in which sequences grow from `seq_len_start` to `seq_len`
    seq_len_start: int = 64  # tokens; a multiple of 64 that divides `seq_len`
    workers: int = 0  # threads that read batches ahead, for slow disks; any number gives the same batches
    seed: int = 0
    precision: str = "float32"  # of the blocks' matrix products, forward and backward: float32 | bf16 | int8 | fp8
    weight_dtype: str = "float32"  # of weights, gradients, activations: float32 | bf16 (updates rounded stochastically)
    recompute: bool = False  # norms and the latent's up-projection, instead of keeping them for the backward pass
    residual_init: float = 0.0  # scale, at the start, of what writes to the residual stream; 1 is GPT-2's
    # processes (minga/train/parallel.py); none of these changes what is computed
    dp: int = 0  # data parallel; 0: all there are / (ep · pp)
    ep: int = 1  # expert parallel
    pp: int = 1  # pipeline parallel
    # optimizer (minga/train/optim.py)
    lr_matrix: float = 0.009  # Muon: hidden matrices, experts included
    lr_embedding: float = 0.006  # AdamW: embedding and head
    lr_other: float = 0.003  # AdamW: norms, biases, router
    momentum: float = 0.95  # Muon's; it rises to this from `momentum_start` over `momentum_warm_steps`
    momentum_start: float = 0.85
    momentum_warm_steps: int = 300
    weight_decay: float = 0.0
    optimizer_bits: int = 32  # of momentum and moments, except of small tensors: 32 | 8 (minga/train/lowbit.py)
    warmup: float = 0.02  # share of the run
    decay: float = 0.6  # share of the run that ends in a linear fall to lr * final_lr
    final_lr: float = 0.0
    clip: float = 1.0  # norm of all gradients together; 0: off
    ema_decay: float = 0.0  # of a running mean of the weights, kept in each checkpoint's `ema/`; 0: none
    spike_skip: float = (
        0.0  # robust deviations above the running median that skip a step (minga/train/guard.py); 0: off
    )
    # losses and balance (V3 sections 2.1.2, 2.2, 4.2)
    balance_rate: float = 0.03  # of a router's bias, for a missing share of load, in deviations of its scores
    balance_rate_warm: float = 0.3  # of a new router; it falls to the other as 1 / (1 + age / `balance_warm_steps`)
    balance_warm_steps: int = 40
    sequence_loss: float = 1e-4  # weight of the sequence-wise balance loss
    router_z_loss: float = 0.0  # weight of the routers' z-loss (ST-MoE, arXiv 2202.08906, equation 5: 1e-3); 0: off
    mtp_loss: float = 0.3  # weight of the multi-token prediction loss
    mtp_from: float = 0.6  # share of the run after which MTP is trained too (docs/log.md says what it gains)
    # watching
    eval_every: int = 100  # steps; 0: only at the end
    eval_tokens: int = 50_000  # held-out tokens of an evaluation during the run; the last one reads all
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "seq_len", "balance_warm_steps", "keep_checkpoints", "ep", "pp"):
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
            "router_z_loss",
            "mtp_loss",
            "spike_skip",
            "workers",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value} (run config). it must not be negative")
        for name in ("momentum", "momentum_start"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)} (run config). it must be from 0 to below 1")
        for name in ("warmup", "decay", "final_lr", "mtp_from", "batch_warmup", "seq_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)} (run config). it is a share, from 0 to 1")
        for name in ("lr_matrix", "lr_embedding", "lr_other"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name} is {getattr(self, name)} (run config). it must be a positive number")
        for name, known in (
            ("precision", PRECISIONS),
            ("weight_dtype", WEIGHT_DTYPES),
            ("optimizer_bits", OPTIMIZER_BITS),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise UserError(f"{name} {getattr(self, name)!r} is not known (run config). known: {choices}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay} (run config). it must be from 0, which is off, to below 1")
        if self.seq_warmup and (self.seq_len_start < 1 or self.seq_len_start % 64 or self.seq_len % self.seq_len_start):
            raise UserError(
                f"seq_len_start is {self.seq_len_start} (run config). for seq_warmup it must be a multiple of 64 that "
                f"divides seq_len {self.seq_len}"
            )
        if not (self.steps or self.hours):
            raise UserError(
                "neither steps nor hours is set (run config). say how long to train: --steps N or --hours H"
            )
        if self.seq_len > self.model.max_position_embeddings:
            raise UserError(
                f"seq_len {self.seq_len} is above the model's max_position_embeddings "
                f"{self.model.max_position_embeddings} (run config). lower one or raise the other"
            )
