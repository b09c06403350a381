"""Cutting a model, its gradients and its optimizer over processes, and putting them together again for a checkpoint.

FSDP2 (`fully_shard`) holds each parameter as rows over the data-parallel processes, gathers a block when it runs, and
sums and cuts its gradients. Experts are not cut but dealt out whole.

The optimizer never sees any of this: `ShardedOptimizer` gives it plain tensors. AdamW works number by number, so it
gets the rows that are here. Muon needs whole matrices. An expert is whole already; every other matrix has an owner:

    gradient rows -> owner:  momentum, Newton-Schulz, update of the whole matrix  -> rows of the new weights

Two all-to-alls a step, of 1/P of the matrices each, where gathering every matrix everywhere would send P times as much
and have P processes compute the same thing. Each matrix is updated with one process's arithmetic, so the result does
not depend on the number of processes, and its momentum is whole for the checkpoint.

A checkpoint is therefore the same folder from any number of processes, and is read by any number: rank 0 collects the
pieces and joins them, or cuts them and deals them out.

P processes
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from minga.config import TrainConfig
from minga.model.block import Block
from minga.model.experts import MoE
from minga.model.transformer import Transformer
from minga.train.checkpoint import TrainingState, load_checkpoint, read_checkpoint
from minga.train.dispatch import ExpertParallelMoE
from minga.train.ema import Ema
from minga.train.lowbit import NUM_WHOLE
from minga.train.optim import Optimizer, is_elementwise
from minga.train.parallel import Parallel, local_tensor

EXPERTS = ".mlp.experts."  # in the name of every parameter that is a stack of experts


def shard(model: Transformer, parallel: Parallel) -> None:
    """Cuts a whole model, the same on every process, in place. Parameters keep their names."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    layers = [block.mlp for block in blocks if isinstance(block.mlp, MoE)]
    if parallel.ep > 1:
        for block in blocks:
            if isinstance(block.mlp, MoE):
                block.mlp = ExpertParallelMoE(block.mlp, parallel.group("ep"))
        layers = [block.mlp for block in blocks if isinstance(block.mlp, MoE)]
    mine: set[nn.Parameter] = set()  # not cut any further
    for layer in layers:
        if parallel.dp > 1:
            fully_shard(layer.experts, mesh=parallel.meshes["dp"])
        else:
            mine.update(layer.experts.parameters())
    data = parallel.meshes["data"]
    for module in (*model.model.layers, *model.mtp):
        fully_shard(module, mesh=data, ignored_params=mine)
    # What is left, embedding, last norm and head, stays whole from the first use to the end of backward: the MTP modules
    # and the loss use it too.
    fully_shard(model, mesh=data, ignored_params=mine)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: every process has divided by the tokens of all
            module.set_force_sum_reduction_for_comms(True)


def optimizer_of(model: Transformer, config: TrainConfig, parallel: Parallel) -> Optimizer:
    """The optimizer of what this process holds of a model."""
    if parallel.world == 1:
        return Optimizer(model, config)
    if parallel.pp > 1:
        return Optimizer(_Named({name: p for name, p in model.named_parameters() if not p.is_meta}), config)
    return ShardedOptimizer(model, config, parallel)


# ---------------------------------------------------------------------------------------------- which part is where


def piece(name: str, size: int, rank: int, parallel: Parallel) -> slice:
    """Rows of a parameter, of `size` in all, that process `rank` of the data-parallel ones holds (as `torch.chunk` cuts)."""
    if EXPERTS not in name:
        return _chunk(size, parallel.data_world, rank)
    dp_rank, ep_rank = divmod(rank, parallel.ep)
    group = _chunk(size, parallel.ep, ep_rank)
    part = _chunk(group.stop - group.start, parallel.dp, dp_rank)
    return slice(group.start + part.start, group.start + part.stop)


def _chunk(size: int, parts: int, index: int) -> slice:
    length = -(-size // parts)
    return slice(min(size, index * length), min(size, (index + 1) * length))


def _join(name: str, parts: list[Tensor], parallel: Parallel) -> Tensor:
    """The whole of what `piece` cuts; numbers that are not cut, such as a step count, are the same everywhere."""
    if parts[0].ndim == 0 or len(parts) == 1 or parallel.pp > 1:  # whole, in each replica of its stage
        return parts[0]
    order = list(range(len(parts)))
    if EXPERTS in name:  # of the pieces of one ep position, those of its dp processes follow each other
        order = [dp * parallel.ep + ep for ep in range(parallel.ep) for dp in range(parallel.dp)]
    return torch.cat([parts[rank] for rank in order])


# ---------------------------------------------------------------------------------------------- the optimizer


class _Named(nn.Module):
    """Stands for a model where only names and parameters are asked for."""

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        self._named = parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


class ShardedOptimizer(Optimizer):
    """The `Optimizer` of what this process updates: its rows, its experts, and the matrices that it owns."""

    def __init__(self, model: Transformer, config: TrainConfig, parallel: Parallel):
        self.parallel = parallel
        self._sources = dict(model.named_parameters())
        matrices = {n: p for n, p in self._sources.items() if EXPERTS not in n and not is_elementwise(n, p)}
        self.owners = _assign({name: p.shape for name, p in matrices.items()}, parallel.data_world)
        parameters: dict[str, nn.Parameter] = {}
        whole = self._to_owners({name: local_tensor(p.detach()) for name, p in matrices.items()})
        for name, p in self._sources.items():
            if name not in matrices:
                parameters[name] = nn.Parameter(local_tensor(p.detach()))  # shares the memory of p
                setattr(parameters[name], NUM_WHOLE, p.numel() * (parallel.ep if EXPERTS in name else 1))
            elif name in whole:
                parameters[name] = nn.Parameter(whole[name])
        self.parameters = parameters
        super().__init__(_Named(parameters), config)

    @torch.no_grad()
    def step(self) -> None:
        grads = {n: local_tensor(p.grad) for n, p in self._sources.items() if p.grad is not None}
        whole = self._to_owners({name: grad for name, grad in grads.items() if name in self.owners})
        for name, p in self.parameters.items():
            p.grad = whole.get(name) if name in self.owners else grads.get(name)
        super().step()
        super().zero_grad()
        self._from_owners([name for name in self.owners if name in grads])

    def zero_grad(self) -> None:
        for p in self._sources.values():
            p.grad = None

    def refresh(self) -> None:
        """Owners take over weights that were loaded into the model."""
        weights = {name: local_tensor(self._sources[name].detach()) for name in self.owners}
        for name, weight in self._to_owners(weights).items():
            self.parameters[name].data.copy_(weight)

    def _to_owners(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Everyone's rows of each matrix to its owner. Returns the whole matrices owned here."""
        if not rows:
            return {}
        rank, world = self.parallel.data_rank, self.parallel.data_world
        names = sorted(rows, key=lambda name: self.owners[name])  # stable: all processes have the same order
        own = [name for name in names if self.owners[name] == rank]
        sent = [0] * world
        for name in names:
            sent[self.owners[name]] += rows[name].numel()
        out_shapes = [[self._piece_shape(name, source) for name in own] for source in range(world)]
        received = [sum(r * c for r, c in shapes_of) for shapes_of in out_shapes]
        flat = torch.cat([rows[name].flatten() for name in names])
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=self.parallel.group("data"))
        pieces = [
            part.split([r * c for r, c in shapes_of])
            for part, shapes_of in zip(out.split(received), out_shapes, strict=True)
        ]
        return {
            name: torch.cat([pieces[source][i].view(out_shapes[source][i]) for source in range(world)])
            for i, name in enumerate(own)
        }

    def _from_owners(self, names: list[str]) -> None:
        """The inverse: every process writes its rows of the updated matrices into the model."""
        if not names:
            return
        rank, world = self.parallel.data_rank, self.parallel.data_world
        names = sorted(names, key=lambda name: self.owners[name])
        own = [name for name in names if self.owners[name] == rank]
        parts = [
            self.parameters[name].detach()[piece(name, self._sources[name].shape[0], target, self.parallel)].flatten()
            for target in range(world)
            for name in own
        ]
        sent = [sum(p.numel() for p in parts[t * len(own) : (t + 1) * len(own)]) for t in range(world)]
        shapes = [self._piece_shape(name, rank) for name in names]
        received = [0] * world
        for name, (r, c) in zip(names, shapes, strict=True):
            received[self.owners[name]] += r * c
        some = local_tensor(self._sources[names[0]].detach())
        flat = torch.cat(parts) if parts else some.new_empty(0)
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=self.parallel.group("data"))
        for name, part, shape in zip(names, out.split([r * c for r, c in shapes]), shapes, strict=True):
            local_tensor(self._sources[name].detach()).copy_(part.view(shape))

    def _piece_shape(self, name: str, rank: int) -> tuple[int, int]:
        rows, columns = self._sources[name].shape
        part = piece(name, rows, rank, self.parallel)
        return part.stop - part.start, columns


def _assign(shapes: dict[str, torch.Size], world: int) -> dict[str, int]:
    """An owner for each matrix so that all have about the same Newton-Schulz work: the largest first, to the idlest."""
    work = {name: min(shape) ** 2 * max(shape) for name, shape in shapes.items()}
    load = [0] * world
    owners = {}
    for name in sorted(shapes, key=lambda name: -work[name]):
        owners[name] = load.index(min(load))
        load[owners[name]] += work[name]
    return {name: owners[name] for name in shapes}


# ---------------------------------------------------------------------------------------------- checkpoints


def gather_model(model: Transformer, parallel: Parallel) -> Transformer | None:
    """The whole model on rank 0, None elsewhere. All processes must call it."""
    if parallel.world == 1:
        return model
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some whole
    replica = parallel.pp > 1 and parallel.data_rank > 0
    own = {name: local_tensor(t) for name, t in model.state_dict().items() if not (replica or t.is_meta)}
    pieces = _collect(own, parallel)
    if pieces is None:
        return None
    buffers = dict(model.named_buffers())
    with torch.device("meta"):
        whole = Transformer(model.config)
    state = {name: t[0] if name in buffers else _join(name, t, parallel) for name, t in _by_name(pieces).items()}
    whole.load_state_dict(state, assign=True)
    return whole.train(model.training)


def gather(
    model: Transformer, optimizer: Optimizer, parallel: Parallel
) -> tuple[Transformer, dict[str, Tensor]] | None:
    """The whole model and the whole optimizer state on rank 0, None elsewhere. All processes must call it."""
    whole = gather_model(model, parallel)
    if parallel.world == 1:
        return model, optimizer.state_tensors()
    replica = parallel.pp > 1 and parallel.data_rank > 0
    pieces = _collect({} if replica else optimizer.state_tensors(), parallel)
    if whole is None or pieces is None:
        return None
    return whole, {key: _join(key, parts, parallel) for key, parts in _by_name(pieces).items()}


def restore(
    folder: Path, model: Transformer, optimizer: Optimizer, parallel: Parallel, *, ema: Ema | None = None
) -> TrainingState:
    """`load_checkpoint` for a model that is spread over processes; rank 0 reads. One process alone may have an `ema`."""
    if parallel.world == 1:
        return load_checkpoint(folder, model, optimizer, ema=ema)
    whole = []

    def read() -> tuple[TrainingState, Tensor]:
        weights, moments, state = read_checkpoint(folder, model.config)
        whole.append((weights, moments))
        return state, torch.get_rng_state()

    state, random_state = parallel.on_main(read)
    torch.set_rng_state(random_state)
    scatter(whole[0] if whole else None, model, optimizer, parallel)
    return state


def scatter(
    whole: tuple[dict[str, Tensor], dict[str, Tensor]] | None,
    model: Transformer,
    optimizer: Optimizer,
    parallel: Parallel,
) -> None:
    """The inverse of `gather`: rank 0 has (weights, optimizer state), all others None."""
    ours = {name: local_tensor(t) for name, t in model.state_dict().items() if not t.is_meta}
    if not isinstance(optimizer, ShardedOptimizer):  # a pipeline: every process takes what it has a place for
        all_weights, all_moments = whole or ({}, {})
        all_weights = _deal([all_weights] * parallel.world if whole else [], parallel)
        all_moments = _deal([all_moments] * parallel.world if whole else [], parallel)
        for name, t in ours.items():
            t.copy_(all_weights[name])
        optimizer.load_state_tensors({key: t for key, t in all_moments.items() if key.rsplit("|", 1)[0] in ours})
        return
    buffers = dict(model.named_buffers())
    weights: list[dict[str, Tensor]] = []
    moments: list[dict[str, Tensor]] = []
    if whole is not None:
        for rank in range(parallel.world):
            weights.append({n: t if n in buffers else t[piece(n, len(t), rank, parallel)] for n, t in whole[0].items()})
            moments.append({})
            for key, t in whole[1].items():
                owner = optimizer.owners.get(key.rsplit("|", 1)[0])
                if owner is None:
                    moments[-1][key] = t[piece(key, len(t), rank, parallel)] if t.ndim else t
                elif owner == rank:
                    moments[-1][key] = t
    for name, t in _deal(weights, parallel).items():
        ours[name].copy_(t)
    optimizer.refresh()
    optimizer.load_state_tensors(_deal(moments, parallel))


def _by_name(parts: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    names = {name: None for part in parts for name in part}
    return {name: [part[name] for part in parts if name in part] for name in names}


def _collect(tensors: dict[str, Tensor], parallel: Parallel) -> list[dict[str, Tensor]] | None:
    """Every process's tensors, on rank 0."""
    about = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    everyones: list[Any] = [None] * parallel.world
    dist.all_gather_object(everyones, about)
    if not parallel.is_main:
        for t in tensors.values():
            if t.numel():
                dist.send(t.detach().contiguous(), dst=0)
        return None
    parts = [{name: t.detach().clone() for name, t in tensors.items()}]
    for rank in range(1, parallel.world):
        parts.append({name: torch.empty(shape, dtype=dtype) for name, shape, dtype in everyones[rank]})
        for t in parts[-1].values():
            if t.numel():
                dist.recv(t, src=rank)
    return parts


def _deal(parts: list[dict[str, Tensor]], parallel: Parallel) -> dict[str, Tensor]:
    """The inverse of `_collect`: to each process its own of rank 0's dicts."""
    about: list[Any] = [[(name, tuple(t.shape), t.dtype) for name, t in part.items()] for part in parts]
    about = about or [None] * parallel.world
    dist.broadcast_object_list(about, src=0)
    if not parallel.is_main:
        received = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in about[parallel.rank]}
        for t in received.values():
            if t.numel():
                dist.recv(t, src=0)
        return received
    for rank in range(1, parallel.world):
        for t in parts[rank].values():
            if t.numel():
                dist.send(t.contiguous(), dst=rank)
    return {name: t.clone() for name, t in parts[0].items()}
