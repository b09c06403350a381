"""Muon for the hidden matrices, AdamW for everything else, behind one object.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal
matrix, so that every direction of the update is equally long. A stack of experts is many matrices: each is
orthogonalised on its own, all of one shape in one batched product. Embedding, head, router, norms and biases stay with
AdamW, as in the original and in DeepSeek-V4.

  S stack of matrices of one shape, M rows, N columns
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from minga.config import TrainConfig
from minga.kernels import cpu, ops

# Quintic Newton-Schulz coefficients: steepest slope at zero for which five steps end with singular values in about
# [0.7, 1.2]; exact orthogonality buys nothing (Jordan et al., section "Deriving the coefficients").
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(update_SMN: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to each of a stack, up to singular values in about [0.7, 1.2]."""
    a, b, c = _COEFFICIENTS
    tall = update_SMN.shape[-2] > update_SMN.shape[-1]
    x = update_SMN.mT if tall else update_SMN  # the Gram matrix of the short side is the cheap one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if ops.compiled(x):
        x = cpu.orthogonalize(x.contiguous(), torch.tensor([_COEFFICIENTS] * steps), "bf16")
        return x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are matrices (M, N) or stacks of them (E, M, N).

    A group's `parts` says how many matrices lie above each other in one parameter (2 for gate and up): each is its own.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                by_shape[rows, columns].append((p, nesterov.reshape(-1, rows, columns)))
            for (rows, columns), items in by_shape.items():
                # a tall matrix moves each output by more columns' worth; sqrt keeps the step per output the same
                step_size = -group["lr"] * max(1.0, rows / columns) ** 0.5
                updates = orthogonalize(torch.cat([update for _, update in items])).split([len(u) for _, u in items])
                for (p, _), update in zip(items, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(p.shape), alpha=step_size)


def is_elementwise(name: str, p: Tensor) -> bool:
    """Whether AdamW updates a parameter, number by number; Muon does those of which a row alone is not enough."""
    return p.ndim < 2 or "embed_tokens" in name or "lm_head" in name or name.endswith("mlp.gate.weight")


class Optimizer:
    """Both optimizers of a model. `set_scale` multiplies every group's own learning rate."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        matrices, joined = [], []
        embeddings: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in model.named_parameters():
            if is_elementwise(name, p):
                (embeddings if "embed_tokens" in name or "lm_head" in name else others).append(p)
            elif name.endswith("gate_up_proj"):
                joined.append(p)
            else:
                matrices.append(p)
        hidden = [{"params": matrices}, {"params": joined, "parts": 2}]  # one of them may be empty
        muon = Muon(hidden, lr=config.lr_matrix, weight_decay=config.weight_decay)
        groups = [{"params": embeddings, "lr": config.lr_embedding}, {"params": others, "lr": config.lr_other}]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
        self._parts: list[torch.optim.Optimizer] = [muon, adam]
        self._base = [[group["lr"] for group in part.param_groups] for part in self._parts]
        self._names = {p: name for name, p in model.named_parameters()}

    def set_scale(self, scale: float) -> None:
        for part, base in zip(self._parts, self._base, strict=True):
            for group, lr in zip(part.param_groups, base, strict=True):
                group["lr"] = lr * scale

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as `name|key` -> tensor, for a safetensors file."""
        states = {}
        for part in self._parts:
            for p, state in part.state.items():
                name = self._names[cast(nn.Parameter, p)]
                states.update({f"{name}|{key}": value for key, value in state.items()})
        return states

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; the model must have the same parameters."""
        by_name = {name: p for p, name in self._names.items()}
        owner = {p: part for part in self._parts for group in part.param_groups for p in group["params"]}
        for name_key, value in tensors.items():
            name, key = name_key.rsplit("|", 1)
            p = by_name[name]
            owner[p].state[p][key] = value
