"""One optimizer step: forward and backward over the micro-batches, clip, update, balance.

B batch, T tokens, D model dim
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def batch_loss(
    model: Transformer, batch: Batch, config: TrainConfig, counter: LoadCounter, *, with_mtp: bool
) -> tuple[Tensor, float, float | None]:
    """Loss to differentiate, main loss and MTP loss (nats a token) of one micro-batch; expert choices go to `counter`."""
    where: dict[str, Any] = {"segments_BT": batch.segments_BT, "positions_BT": batch.positions_BT}
    hidden_BTD = model.hidden(batch.ids_BT, **where)
    main = head_loss(model, hidden_BTD, batch.targets_KBT[0], precision=config.precision)
    loss, mtp_loss = main, None
    if with_mtp:
        # V3 equation 25: lambda times the mean over the modules
        losses = []
        for depth in range(len(model.mtp)):
            next_ids_BT = batch.targets_KBT[depth].masked_fill(batch.targets_KBT[depth] == MASKED, 0)
            hidden_BTD = model.mtp_hidden(depth, next_ids_BT, hidden_BTD, **where)
            losses.append(head_loss(model, hidden_BTD, batch.targets_KBT[depth + 1], precision=config.precision))
        mtp = torch.stack(losses).mean()
        loss, mtp_loss = loss + config.mtp_loss * mtp, float(mtp.detach())
    for number, layer in enumerate(counter.layers):
        if layer.routing is not None:
            index_NA, score_NE = layer.routing
            layer.routing = None
            counter.add(number, index_NA)
            if config.sequence_loss:
                loss = loss + config.sequence_loss * sequence_balance(index_NA, score_NE, len(batch.ids_BT))
            if config.router_z_loss and layer.gate.logits_NE is not None:
                loss = loss + config.router_z_loss * router_z(layer.gate.logits_NE)
            layer.gate.logits_NE = None
    return loss, float(main.detach()), mtp_loss


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
) -> StepMetrics:
    """Raises `Diverged` when loss or gradient is no longer a number; the weights are then as before the step.

    guard: may skip the update, weights and biases alike, and says why in `StepMetrics.skipped`.
    """
    metrics = StepMetrics()
    optimizer.zero_grad()
    for batch in batches:
        loss, main, mtp = batch_loss(model, batch, config, counter, with_mtp=with_mtp)
        (loss / len(batches)).backward()
        metrics.loss += main / len(batches)
        metrics.tokens += batch.ids_BT.numel()
        if mtp is not None:
            metrics.mtp_loss = (metrics.mtp_loss or 0.0) + mtp / len(batches)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or float("inf"))
    metrics.grad_norm = float(norm)
    if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
        where = first_not_finite(
            model, lambda batch: batch_loss(model, batch, config, counter, with_mtp=with_mtp)[0], batches
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
