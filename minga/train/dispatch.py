"""Expert parallelism: tokens travel to the process that has their expert, and back (GShard, arXiv 2006.16668; V3 3.2.2).

A token's rows are sorted by expert, so that what goes to one process lies together, and sent by one all-to-all; the
receiver runs its experts and sends every row back the way it came. Weights stay with the sender. Rows travel in their
own dtype.

    counts -> dispatch ........... experts -> combine
                    shared expert                         computed while rows are under way, and so is its gradient

An all-to-all is two autograd functions, `_Start` and `_Wait`. Backward runs them in reverse: `_Wait` sends the gradient
off, `_Start` waits for it, and what was computed between them in the forward pass is differentiated meanwhile.

N tokens of this process, A active experts a token, E experts, L experts of this process, P processes, R rows received
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minga.model.experts import MoE


class Exchange:
    """One all-to-all of rows: `sent[p]` rows go to process p of the group, `received[p]` come from it."""

    def __init__(self, group: dist.ProcessGroup, sent: list[int], received: list[int]):
        self.group, self.sent, self.received = group, sent, received
        self._work: Any = None
        self._buffers: tuple[Tensor, Tensor] | None = None  # (in, out), alive while they travel

    def reverse(self) -> Exchange:
        return Exchange(self.group, self.received, self.sent)

    def start(self, rows: Tensor) -> Tensor:
        """Sends `rows` off. What is returned may be read after `wait`."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(self.received), *rows.shape[1:]))
        self._work = dist.all_to_all_single(out, rows, self.received, self.sent, self.group, async_op=True)
        self._buffers = rows, out
        return out

    def wait(self) -> Tensor:
        assert self._buffers is not None
        if self._work is not None:
            self._work.wait()
        out = self._buffers[1]
        self._work = self._buffers = None
        return out


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there.start(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.wait(), None, None  # `_Wait` has sent it; the gradient passed here only keeps the order


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        there.wait()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.back.start(grads[0])
        return grads[0], None, None


class ExpertParallelMoE(MoE):
    """An `MoE` whose experts are spread over a process group; takes the place of the whole layer it was made from.

    `experts` keeps this process's share, experts rank · L to rank · L + L - 1.
    """

    def __init__(self, layer: MoE, group: dist.ProcessGroup):
        nn.Module.__init__(self)
        self.gate, self.shared_experts, self.routing = layer.gate, layer.shared_experts, None
        self.experts = layer.experts
        rank, self.group, self.num_processes = group.rank(), group, group.size()
        for name, p in list(self.experts.named_parameters()):
            own = p.detach().chunk(self.num_processes)[rank].clone()
            setattr(self.experts, name, nn.Parameter(own))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        index_NA, weight_NA, score_NE = self.gate(x_ND)
        if self.training:
            self.routing = (index_NA, score_NE)
        order = index_NA.flatten().argsort(stable=True)
        token = order // index_NA.shape[1]
        counts_E = torch.bincount(index_NA.flatten(), minlength=score_NE.shape[1])
        counts_PL = torch.empty_like(counts_E).view(self.num_processes, -1)
        dist.all_to_all_single(counts_PL, counts_E.view_as(counts_PL), group=self.group)
        sent, received = (counts.view(self.num_processes, -1).sum(1).tolist() for counts in (counts_E, counts_PL))

        there = Exchange(self.group, sent, received)
        back = there.reverse()
        under_way_RD = _Start.apply(x_ND[token], there, back)  # type: ignore[no-untyped-call]
        shared_BTD = None if self.shared_experts is None else self.shared_experts(x_BTD)
        rows_RD = cast(Tensor, _Wait.apply(under_way_RD, there, back))  # type: ignore[no-untyped-call]

        local = torch.arange(counts_PL.shape[1], device=x_ND.device).repeat(self.num_processes)
        out_RD = self._run_experts(rows_RD, local.repeat_interleave(counts_PL.flatten()))

        there = Exchange(self.group, received, sent)
        back = there.reverse()
        under_way = _Start.apply(out_RD, there, back)  # type: ignore[no-untyped-call]
        answer_RD = cast(Tensor, _Wait.apply(under_way, there, back))  # type: ignore[no-untyped-call]
        weighted = answer_RD * weight_NA.to(x_ND.dtype).flatten()[order, None]
        out_BTD = torch.zeros_like(x_ND).index_add(0, token, weighted).view_as(x_BTD)
        return out_BTD if shared_BTD is None else out_BTD + shared_BTD

    def _run_experts(self, rows_RD: Tensor, expert_R: Tensor) -> Tensor:
        """Each row through its one expert. With no row at all, a row of zeros keeps the weights' gradients defined."""
        num_rows = len(rows_RD)
        if not num_rows:
            rows_RD, expert_R = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])]), expert_R.new_zeros(1)
        out_RD = self.experts(rows_RD, expert_R[:, None], rows_RD.new_ones(len(rows_RD), 1))
        return out_RD[:num_rows]
