"""How many bytes a process sends: counts what it asks of `torch.distributed`, on any backend, a pretended one as well.

    with WireCounter() as wire:
        train_step(...)
    wire.sent["all_to_all", 2]          bytes that left for other processes, by collective and size of the group

What is counted is what an algorithm of the least traffic sends for the tensors at hand (a ring, say); a backend may do
worse. What a process hands to itself is not counted. Receiving is the mirror image.

W processes in a group
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WireCounter(TorchDispatchMode):
    """While entered, in the thread that entered it (on a CPU, backward runs there too)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: dict[tuple[str, int], float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "send":
            self.sent["send", 2] += sum(map(_bytes, args[0]))
            return
        if name not in _LEAVING:
            return
        group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
        collective, count = _LEAVING[name]
        self.sent[collective, group.size()] += count(args, group)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_to_all(args: Any, group: dist.ProcessGroup) -> float:
    """Arguments are (output, input, group, output splits, input splits); no splits means equal ones."""
    rows, splits = args[1], args[4]
    own = splits[group.rank()] / max(1, len(rows)) if splits else 1 / group.size()
    return _bytes(rows) * (1 - own)


_LEAVING: dict[str, tuple[str, Any]] = {
    "_allgather_base_": ("all_gather", lambda args, group: _bytes(args[1]) * (group.size() - 1)),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args, group: _bytes(args[0]) * (group.size() - 1)),
    "allreduce_": ("all_reduce", lambda args, group: sum(map(_bytes, args[0])) * 2 * (group.size() - 1) / group.size()),
    "alltoall_base_": ("all_to_all", _all_to_all),
}
