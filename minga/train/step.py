"""One optimizer step: forward and backward over the micro-batches, clip, update, balance.

B batch, T tokens, D model dim
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minga.config import TrainConfig
from minga.data.packing import MASKED, Batch
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter
from minga.train.guard import Diverged, Guard, first_not_finite
from minga.train.losses import head_loss, router_z, sequence_balance
from minga.train.optim import Optimizer
from minga.train.parallel import ALONE, Parallel


@dataclass
class StepMetrics:
    loss: float = 0.0  # nats a token, main head
    mtp_loss: float | None = None
    grad_norm: float = 0.0
    tokens: int = 0
    cpu_seconds: float = 0.0  # of the whole step, all threads: what it costs whatever else the machine does
    load: list[Tensor] = field(default_factory=list)  # relative expert load, a tensor a layer
    skipped: str | None = None  # why the guard let this step pass without an update

    @property
    def max_over_mean(self) -> float:
        """The most loaded expert of any layer, over its layer's mean."""
        return max((float(load_E.max()) for load_E in self.load), default=1.0)

    def add(self, main: float, mtp: float | None, batch: Batch, num_batches: int) -> None:
        """One of `num_batches` micro-batches."""
        self.loss += main / num_batches
        self.tokens += batch.ids_BT.numel()
        if mtp is not None:
            self.mtp_loss = (self.mtp_loss or 0.0) + mtp / num_batches

    def sum_over(self, parallel: Parallel, counter: LoadCounter) -> None:
        """Own losses, tokens and expert counts become those of all processes, in one message."""
        if parallel.world == 1:
            return
        own = torch.tensor([self.loss, self.mtp_loss or 0.0, self.tokens], dtype=torch.float64)
        total = parallel.sum(torch.cat([own, *(counted.double() for counted in counter.totals)]))
        self.loss, self.tokens = float(total[0]), int(total[2])
        self.mtp_loss = None if self.mtp_loss is None else float(total[1])
        for counted, summed in zip(counter.totals, total[3:].split(list(map(len, counter.totals))), strict=True):
            counted.copy_(summed)


def locations(batch: Batch) -> dict[str, Any]:
    """Which document each token is of, and where in it."""
    return {"segments_BT": batch.segments_BT, "positions_BT": batch.positions_BT}


def head_losses(
    model: Transformer,
    hidden_BTD: Tensor,
    batch: Batch,
    config: TrainConfig,
    *,
    with_mtp: bool,
    shares: Sequence[float],
    nats: Callable[..., Tensor] = head_loss,
) -> tuple[Tensor, float, float | None]:
    """Loss to differentiate, main loss and MTP loss (nats a token) of one micro-batch, from its hidden states.

    shares: what part of the micro-batch's targets (by depth) and rows (last) is here; 1.0 where all of it is. Each loss
    is weighted with its share, so that what several processes return adds up to the mean over all.
    """
    main = nats(model, hidden_BTD, batch.targets_KBT[0], precision=config.precision) * shares[0]
    loss, mtp_loss = main, None
    if with_mtp:
        # V3 equation 25: lambda times the mean over the modules
        losses = []
        for depth in range(len(model.mtp)):
            next_ids_BT = batch.targets_KBT[depth].masked_fill(batch.targets_KBT[depth] == MASKED, 0)
            hidden_BTD = model.mtp_hidden(depth, next_ids_BT, hidden_BTD, **locations(batch))
            loss_K = nats(model, hidden_BTD, batch.targets_KBT[depth + 1], precision=config.precision)
            losses.append(loss_K * shares[depth + 1])
        mtp = torch.stack(losses).mean()
        loss, mtp_loss = loss + config.mtp_loss * mtp, float(mtp.detach())
    return loss, float(main.detach()), mtp_loss


def batch_loss(
    model: Transformer,
    batch: Batch,
    config: TrainConfig,
    counter: LoadCounter,
    *,
    with_mtp: bool,
    shares: Sequence[float] | None = None,
) -> tuple[Tensor, float, float | None]:
    """`head_losses` of one micro-batch, with the routers' losses; expert choices go to `counter`. `shares` None: all here."""
    shares = shares or [1.0] * (len(batch.targets_KBT) + 1)
    hidden_BTD = model.hidden(batch.ids_BT, **locations(batch))
    loss, main, mtp = head_losses(model, hidden_BTD, batch, config, with_mtp=with_mtp, shares=shares)
    for number, layer in enumerate(counter.layers):
        if layer.routing is not None:
            index_NA, score_NE = layer.routing
            layer.routing = None
            counter.add(number, index_NA, score_NE)
            if config.sequence_loss:
                loss = loss + config.sequence_loss * shares[-1] * sequence_balance(
                    index_NA, score_NE, len(batch.ids_BT)
                )
            if config.router_z_loss and layer.gate.logits_NE is not None:
                loss = loss + config.router_z_loss * shares[-1] * router_z(layer.gate.logits_NE)
            layer.gate.logits_NE = None
    return loss, main, mtp


def forward_backward(
    model: Transformer,
    batches: Sequence[Batch],
    config: TrainConfig,
    counter: LoadCounter,
    metrics: StepMetrics,
    *,
    with_mtp: bool,
    shares: Sequence[Sequence[float]],
) -> None:
    """Gradients of the mean loss of all micro-batches, one after the other."""
    for batch, batch_shares in zip(batches, shares, strict=True):
        loss, main, mtp = batch_loss(model, batch, config, counter, with_mtp=with_mtp, shares=batch_shares)
        (loss / len(batches)).backward()
        metrics.add(main, mtp, batch, len(batches))


def train_step(
    model: Transformer,
    batches: Sequence[Batch],
    optimizer: Optimizer,
    config: TrainConfig,
    counter: LoadCounter,
    *,
    with_mtp: bool,
    balance_rates: Sequence[float],
    guard: Guard | None = None,
    parallel: Parallel = ALONE,
    run: Callable[..., None] = forward_backward,
) -> StepMetrics:
    """`batches` are this process's rows; the step and its metrics are those of all processes together.

    guard: may skip the update, weights and biases alike, and says why in `StepMetrics.skipped`; all processes give it
    the same numbers. run: `forward_backward` or a pipeline in its place. Raises `Diverged` when loss or gradient is no
    longer a number; the weights are then as before the step.
    """
    metrics = StepMetrics()
    optimizer.zero_grad()
    run(model, batches, config, counter, metrics, with_mtp=with_mtp, shares=parallel.shares(batches))
    metrics.sum_over(parallel, counter)
    norm = parallel.clip_grad_norm(model, config.clip or float("inf"))
    metrics.grad_norm = float(norm)
    if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
        where = first_not_finite(
            model, lambda batch: batch_loss(model, batch, config, counter, with_mtp=with_mtp)[0], batches, parallel
        )
        raise Diverged(f"loss {metrics.loss}, gradient norm {metrics.grad_norm}, {where}")
    metrics.load = counter.relative()
    if guard is not None:
        regime = f"mtp {with_mtp}, {batches[0].ids_BT.shape[1]} tokens a row"
        metrics.skipped = guard.judge(metrics.loss, metrics.grad_norm, regime=regime)
    if metrics.skipped is not None:
        counter.reset()
        return metrics
    optimizer.step()
    counter.update_bias(balance_rates)
    return metrics
