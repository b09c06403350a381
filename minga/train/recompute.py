"""Selective recomputation (V3 section 3.2.3): what is cheap to make again is not kept for the backward pass.

Outputs of norms and of the latent's up-projection are dropped once the forward pass has used them, and made again from
their inputs when a gradient asks. All numbers stay the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from minga.model.attention import LatentAttention, RMSNorm
from minga.model.transformer import Transformer


class _Output:
    """A module's output that can be made again. It is held while some of its readers have asked and others have not."""

    def __init__(self, module: nn.Module, source: Tensor | _Output, out: Tensor):
        self.readers = 0
        self._module, self._source = module, source
        self._value: Tensor | None = None
        self._alive = StorageWeakRef(out.untyped_storage())  # while this exists no other storage has its address

    def holds(self, t: Tensor) -> bool:
        return not self._alive.expired() and self._alive.cdata == t.untyped_storage()._cdata

    def pack(self, t: Tensor) -> Callable[[], Tensor]:
        """What autograd keeps in place of `t`, which is this output or a view of it."""
        self.readers += 1
        size, stride, offset = t.shape, t.stride(), t.storage_offset()
        return lambda: self.take().as_strided(size, stride, offset)

    @torch.no_grad()
    def take(self) -> Tensor:
        if self._value is None:
            source = self._source.take() if isinstance(self._source, _Output) else self._source
            self._value = self._module.forward(source)
        value, self.readers = self._value, self.readers - 1
        if self.readers <= 0:
            self._value = None
        return value


class _Block:
    """A block that runs like the one it stands for, and keeps less."""

    def __init__(self, block: nn.Module):
        self._forward = block.forward
        self._outputs: list[_Output] = []  # of the forward pass under way
        for module in block.modules():
            if isinstance(module, RMSNorm):
                module.register_forward_hook(self._remember)
            elif isinstance(module, LatentAttention):
                module.kv_b_proj.register_forward_hook(self._remember)

    def __call__(self, *args: Any) -> Any:
        try:
            with saved_tensors_hooks(self._pack, lambda kept: kept if isinstance(kept, Tensor) else kept()):
                return self._forward(*args)
        finally:
            self._outputs.clear()

    def _remember(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if torch.is_grad_enabled():
            source = self._find(args[0])
            if source is not None:
                source.readers += 1
            self._outputs.append(_Output(module, source or args[0].detach(), out))

    def _pack(self, t: Tensor) -> Tensor | Callable[[], Tensor]:
        output = self._find(t)
        return t if output is None else output.pack(t)

    def _find(self, t: Tensor) -> _Output | None:
        return next((output for output in self._outputs if output.holds(t)), None)


def recompute(model: Transformer) -> None:
    """Makes the blocks and MTP modules of `model` drop those outputs whenever they are run for training."""
    for block in (*model.model.layers, *model.mtp):
        block.forward = _Block(block)
