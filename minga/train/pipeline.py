"""Pipeline parallelism: consecutive blocks on different processes, by `torch.distributed.pipelining`.

The model is cut into two stages a process, laid out as a V, and run by a zero-bubble schedule (ZB-V, arXiv 2401.10241,
section 6): gradients of weights are put off and fill the time in which a process would wait.

    process 0    embedding, first blocks                    last blocks, norm, head, MTP
    process 1         next blocks                       blocks before those
    ...                   ...                        ...

Both ends are on process 0, so embedding and head, which the MTP modules use too, have one home (as V3 has it, section
3.2.2). Every process keeps the whole `Transformer`; the parts that are elsewhere are on the meta device. Data-parallel
replicas (`dp`) of a stage add up their gradients at the end of the step.

B batch, T tokens, D model dim, M micro-batches
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble

from minga.config import TrainConfig
from minga.data.packing import Batch
from minga.model.block import Block
from minga.model.experts import MoE
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter
from minga.train.losses import cross_entropy, router_z, sequence_balance
from minga.train.parallel import Parallel
from minga.train.step import StepMetrics, head_losses, locations


def stage_layers(num_layers: int, pp: int) -> list[range]:
    """The blocks of each of the 2 · pp stages; the last, which has head and MTP besides, gets no more than the others."""
    bounds = [0]
    for stage in range(2 * pp):
        bounds.append(bounds[-1] + num_layers // (2 * pp) + (stage < num_layers % (2 * pp)))
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def keep_stages(model: Transformer, parallel: Parallel) -> None:
    """Moves all that belongs to other processes to the meta device, in place."""
    stages = stage_layers(len(model.model.layers), parallel.pp)
    mine = {*stages[parallel.stage], *stages[2 * parallel.pp - 1 - parallel.stage]}
    for number, block in enumerate(model.model.layers):
        if number not in mine:
            block.to("meta")
    if parallel.stage:
        for module in (model.model.embed_tokens, model.model.norm, model.lm_head, model.mtp):
            if module is not None:
                module.to("meta")


class _AddLoss(torch.autograd.Function):
    """Passes activations through and lets a loss of this stage take part in backward, as if added to the last one."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.detach()
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.loss)


def _plain_head_loss(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor, *, precision: str) -> Tensor:
    """`head_loss` by operations whose backward may run twice, as it does here: for inputs, and later for weights."""
    return cross_entropy(model.head(hidden_BTD), targets_BT)


class _Stage(nn.Module):
    """Some blocks of the model, with the embedding before them or norm, head, MTP and loss after them."""

    def __init__(self, model: Transformer, config: TrainConfig, layers: range, *, first: bool, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(model.model.layers[number] for number in layers)
        self.ends = nn.ModuleList()  # the schedule asks a stage for its parameters
        if first or (last and (len(model.mtp) or model.lm_head is None)):
            self.ends.append(model.model.embed_tokens)
        if last:
            self.ends.extend([model.model.norm, model.mtp, *([model.lm_head] if model.lm_head is not None else [])])
        self.first, self.last, self.config = first, last, config
        self._model = (model,)  # in a tuple: not a part of this module
        self.step: tuple[Sequence[Batch], Sequence[Sequence[float]], LoadCounter, StepMetrics, bool]

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """Micro-batch `number` of the step, from the stage before; the last stage returns its loss, shape (1,)."""
        model = self._model[0]
        batches, all_shares, counter, metrics, with_mtp = self.step
        batch, shares = batches[int(number)], all_shares[int(number)]
        context = model.context(batch.ids_BT, cache=None, **locations(batch))
        x_BTD = model.model.embed_tokens(batch.ids_BT) if self.first else x
        for block in self.blocks:
            x_BTD = self._with_balance(block(x_BTD, context), cast(Block, block).mlp, counter, shares[-1])
        if not self.last:
            return x_BTD.clone()  # the schedule detaches it in place, which a view does not let it do
        loss, main, mtp = head_losses(
            model,
            model.model.norm(x_BTD),
            batch,
            self.config,
            with_mtp=with_mtp,
            shares=shares,
            nats=_plain_head_loss,
        )
        metrics.add(main, mtp, batch, len(batches))
        for module in model.mtp if with_mtp else ():
            loss = self._with_balance(loss, cast(Any, module).block.mlp, counter, shares[-1])
        return torch.stack([loss / len(batches)])

    def _with_balance(self, x: Tensor, layer: nn.Module, counter: LoadCounter, share: float) -> Tensor:
        """Counts a layer's routing and lets its router's losses act."""
        if not isinstance(layer, MoE) or layer.routing is None:
            return x
        (index_NA, score_NE), layer.routing = layer.routing, None
        counter.add(counter.layers.index(layer), index_NA, score_NE)
        logits_NE, layer.gate.logits_NE = layer.gate.logits_NE, None
        batches = self.step[0]
        losses = []
        if self.config.sequence_loss:
            losses.append(self.config.sequence_loss * sequence_balance(index_NA, score_NE, len(batches[0].ids_BT)))
        if self.config.router_z_loss and logits_NE is not None:
            losses.append(self.config.router_z_loss * router_z(logits_NE))
        if not losses:
            return x
        loss = torch.stack(losses).sum() * (share / len(batches))
        return cast(Tensor, _AddLoss.apply(x, loss))  # type: ignore[no-untyped-call]


class Pipeline:
    """Forward and backward of all micro-batches of a step; takes the place of `step.forward_backward`."""

    def __init__(self, model: Transformer, config: TrainConfig, parallel: Parallel):
        self.parallel, self.model = parallel, model
        pp, num_stages = parallel.pp, 2 * parallel.pp
        layers = stage_layers(len(model.model.layers), pp)
        rows = config.batch_size // parallel.data_world
        between = torch.empty(rows, config.seq_len, config.model.hidden_size, requires_grad=True)
        self.stages = []
        for index in (parallel.stage, num_stages - 1 - parallel.stage):
            first, last = index == 0, index == num_stages - 1
            stage = _Stage(model, config, layers[index], first=first, last=last)
            self.stages.append(
                PipelineStage(
                    stage,
                    index,
                    num_stages,
                    torch.device("cpu"),
                    input_args=torch.zeros(1, dtype=torch.long) if first else between,
                    output_args=torch.empty(1, requires_grad=True) if last else between,
                    group=parallel.group("pp"),
                )
            )
        self.schedule = ScheduleZBVZeroBubble(
            cast(Any, self.stages), config.accumulate, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
        )

    def __call__(
        self,
        model: Transformer,
        batches: Sequence[Batch],
        config: TrainConfig,
        counter: LoadCounter,
        metrics: StepMetrics,
        *,
        with_mtp: bool,
        shares: Sequence[Sequence[float]],
    ) -> None:
        for stage in self.stages:
            cast(_Stage, stage.submod).step = (batches, shares, counter, metrics, with_mtp)
        numbers = torch.arange(len(batches))
        if self.parallel.stage == 0:
            self.schedule.step(numbers, number=numbers, target=numbers, return_outputs=False)
        else:
            self.schedule.step(number=numbers, return_outputs=False)
        self._sum_replicas()

    def _sum_replicas(self) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.parallel.data_world == 1 or not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=self.parallel.group("data"))
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
