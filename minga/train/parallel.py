"""A run on several processes: who does what, and what they tell each other.

    torchrun --nproc-per-node 4 -m minga train --data shards --out runs/mine --steps 1000 --set ep=2

The processes form a mesh of `pp` x `dp` x `ep`, the last axis over neighbours (its messages are the most frequent):

- **data parallel**: all dp · ep processes of a pipeline stage read their own rows of each batch. Everything but the
  experts is cut into rows over all of them (FSDP2, `minga.train.sharding`), gathered a block at a time when it is needed.
- **expert parallel** (`ep`): each process has E / ep experts of a layer, and tokens travel (`minga.train.dispatch`). The
  experts of one ep position are cut over the dp processes, whole experts each.
- **pipeline parallel** (`pp`): consecutive blocks on different processes (`minga.train.pipeline`).

Batch size and all else in the config are of the run as a whole, so a run means the same on any number of processes:
losses are sums over all tokens divided by their number, wherever they were read. Only rank 0 touches the run folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from minga.config import TrainConfig
from minga.data.packing import MASKED, Batch
from minga.errors import UserError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # a checkpoint of rank 0 is waited for; a dead process is noticed at once


@dataclass(frozen=True)
class Parallel:
    """This process's place in the mesh. The default is a run of one process, for which nothing is ever sent."""

    rank: int = 0
    dp: int = 1
    ep: int = 1
    pp: int = 1
    meshes: dict[str, DeviceMesh] = field(default_factory=dict)  # by axis; "data" is dp and ep together

    @property
    def world(self) -> int:
        return self.pp * self.data_world

    @property
    def data_world(self) -> int:
        """Processes that read different rows."""
        return self.dp * self.ep

    @property
    def data_rank(self) -> int:
        return self.rank % self.data_world

    @property
    def stage(self) -> int:
        """Position in the pipeline."""
        return self.rank // self.data_world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.meshes[axis].get_group()

    # ------------------------------------------------------------------------------------------ what all must agree on

    def sum(self, tensor: Tensor, axis: str | None = None) -> Tensor:
        """The sum over all processes, or over those of one axis, written into `tensor`."""
        if self.world > 1:
            dist.all_reduce(tensor, group=None if axis is None else self.group(axis))
        return tensor

    def any(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return bool(self.sum(torch.tensor(float(wish)))) if self.world > 1 else wish

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64))) if self.world > 1 else value

    def first(self, text: str | None) -> str | None:
        """What the first process that has something to say says."""
        if self.world == 1:
            return text
        texts: list[str | None] = [None] * self.world
        dist.all_gather_object(texts, text)
        return next((said for said in texts if said is not None), None)

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0 acts and all have the result; its `UserError` is raised on all."""
        if self.world == 1:
            return action()
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = action()
            except UserError as error:
                message[1] = error
        dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise message[1]
        return cast(T, message[0])

    def shares(self, batches: Sequence[Batch]) -> list[list[float]]:
        """This process's share of each micro-batch: of its counted targets at every depth, and last of its rows.

        Means over one's own tokens, times these shares, add up to the mean over all tokens.
        """
        own_MK = torch.stack([(batch.targets_KBT != MASKED).sum((1, 2)).double() for batch in batches])
        if self.data_world == 1:
            return [[1.0] * (own_MK.shape[1] + 1) for _ in batches]
        all_MK = self.sum(own_MK.clone(), "data").clamp(min=1)
        return [[*shares_K, 1 / self.data_world] for shares_K in (own_MK / all_MK).tolist()]

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scales all gradients so that the norm of the whole model's is at most `max_norm`; returns what it was."""
        parameters = [p for p in model.parameters() if p.grad is not None]
        if self.world == 1:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        grads = [local_tensor(cast(Tensor, p.grad)) for p in parameters]
        squares = [grad.double().square().sum() for grad in grads if grad.numel()]
        own = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        norm = self.sum(own, "pp" if self.pp > 1 else None).sqrt()  # the replicas of a stage have the same
        for grad in grads:
            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(grad.dtype))
        return norm

    def rows(self, batch: Batch) -> Batch:
        """This process's part of a batch that all have read, for evaluation: the n-th row of every `data_world`.

        A process always gets a row, masked if there is none left, for all must take part in what the model sends.
        """
        if self.data_world == 1:
            return batch
        rows = range(self.data_rank, len(batch.ids_BT), self.data_world)
        spare = not rows
        index = torch.tensor([0] if spare else list(rows))
        targets_KBT = batch.targets_KBT[:, index]
        return Batch(
            ids_BT=batch.ids_BT[index],
            targets_KBT=torch.full_like(targets_KBT, MASKED) if spare else targets_KBT,
            segments_BT=None if batch.segments_BT is None else batch.segments_BT[index],
            positions_BT=None if batch.positions_BT is None else batch.positions_BT[index],
            num_bytes=batch.num_bytes if self.data_rank == 0 else 0,
        )


ALONE = Parallel()


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check(config: TrainConfig, world: int) -> tuple[int, int, int]:
    """(dp, ep, pp) for `world` processes. Raises `UserError` for a run that cannot be divided among them."""
    ep, pp = config.ep, config.pp
    dp = config.dp or max(1, world // (ep * pp))
    if dp * ep * pp != world:
        wanted = f"{dp} x {ep} x {pp} = {dp * ep * pp}" if config.dp else f"a multiple of {ep} x {pp} = {ep * pp}"
        raise UserError(
            f"dp x ep x pp asks for {wanted} processes and there are {world} (run config). start as many with "
            "`torchrun --nproc-per-node N -m minga train ...`, or choose other sizes"
        )
    experts, layers = config.model.n_routed_experts, config.model.num_hidden_layers
    if ep > 1 and (not experts or experts % ep):
        raise UserError(
            f"{experts} experts a layer do not divide among ep {ep} processes (run config). choose an ep that divides them"
        )
    if config.batch_size % (dp * ep):
        raise UserError(
            f"batch_size {config.batch_size} does not divide by dp {dp} x ep {ep} (run config). "
            f"it counts the sequences of all processes: choose a multiple of {dp * ep}"
        )
    if pp > 1 and layers < 2 * pp - 1:
        raise UserError(
            f"pp {pp} cuts a model into {2 * pp} stages and this one has {layers} layers (run config). "
            f"use at most pp {(layers + 1) // 2}"
        )
    if pp > 1 and config.accumulate < 2 * pp - 1:
        raise UserError(
            f"accumulate {config.accumulate} micro-batches do not fill a pipeline of pp {pp} (run config). "
            f"set it to {2 * pp - 1} or more"
        )
    if pp > 1 and ep > 1:
        raise UserError(f"pp {pp} and ep {ep} do not go together (run config). set one of them to 1")
    for name, off in (("batch_warmup", 0.0), ("seq_warmup", 0.0)):
        if pp > 1 and getattr(config, name) != off:
            raise UserError(
                f"{name} {getattr(config, name)} and pp {pp} do not go together: a pipeline's micro-batches are all alike "
                f"(run config). set {name} to {off}"
            )
    for name, only in (("ema_decay", 0.0), ("weight_dtype", "float32")):
        if world > 1 and getattr(config, name) != only:
            raise UserError(
                f"{name} {getattr(config, name)} is for one process and there are {world} (run config). "
                f"set {name} to {only}"
            )
    return dp, ep, pp


@contextmanager
def processes(config: TrainConfig) -> Iterator[Parallel]:
    """Joins the processes that torchrun started, by the environment it set. One process needs no torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    dp, ep, pp = check(config, world)
    if world == 1:
        yield ALONE
        return
    store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store outlives a restart, and a process must not meet the addresses of those that died
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # training is on CPUs so far; a GPU's tensors will need nccl
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        mesh = init_device_mesh("cpu", (pp, dp, ep), mesh_dim_names=("pp", "dp", "ep"))
        meshes = {axis: mesh[axis] for axis in ("pp", "dp", "ep")} | {"data": mesh["dp", "ep"]._flatten("data")}
        yield Parallel(dist.get_rank(), dp, ep, pp, meshes)
    finally:
        dist.destroy_process_group()
