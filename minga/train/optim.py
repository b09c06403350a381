"""Muon for the hidden matrices, AdamW for everything else, behind one object.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest orthogonal
matrix, so that every direction of the update is equally long. A stack of experts is many matrices: each is
orthogonalised on its own, all of one shape in one batched product. Embedding, head, router, norms and biases stay with
AdamW, as in the original and in DeepSeek-V4.

  S stack of matrices of one shape, M rows, N columns
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minga.config import TrainConfig
from minga.kernels import cpu, ops
from minga.train.lowbit import ABSMAX, Codes, StateStore, block_size, wide, write_weight

# Quintic Newton-Schulz steps x <- (a + b G + c G G) x, G = x x^T, one after the other: each is the polynomial that brings
# all singular values nearest to 1 from where the step before may have left them, [0.02, 1] at the start (the greedy
# minimax of Polar Express, arXiv 2505.16932). Three of them end in [0.91, 1.09]. Five of the one fixed polynomial of
# Jordan et al., which must begin at 0.003 since they divide by the Frobenius norm, end in [0.68, 1.13].
_STEPS = ((7.7109, -22.1132, 16.2481), (3.2154, -2.4113, 0.5013), (2.2184, -1.5941, 0.4108))
# Rounding may lift a value above the interval that a step was made for, where its polynomial grows fast: all but the last
# see values 1 % smaller.
_SAFETY = 1.01
COEFFICIENTS = torch.tensor([[a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5] for a, b, c in _STEPS[:-1]] + [_STEPS[-1]])


def orthogonalize(update_SMN: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix to each of a stack, up to singular values in about [0.9, 1.1].

    Before the first step a matrix is divided by the fourth root of the sum of its singular values' fourth powers: a bound
    of the largest that the Gram matrix has ready, and in trained models half the Frobenius norm. Values below a fiftieth
    of it stay below 0.9: they are noise more than signal.
    """
    x = update_SMN / (update_SMN.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # far from what float32 cannot square
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the short side is the cheap one
    gram = x @ x.mT
    size = gram.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12).sqrt()  # an expert without tokens is all zeros
    x, gram = x / size, gram / size.square()
    for step, (a, b, c) in enumerate(COEFFICIENTS.tolist()):
        gram = x @ x.mT if step else gram
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# States and the codes that fit them in 8 bits.
MOMENTUM: dict[str, Codes] = {"momentum": "linear"}
MOMENTS: dict[str, Codes] = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are matrices (M, N) or stacks of them (E, M, N).

    A group's `parts` says how many matrices lie above each other in one parameter (2 for gate and up): each is its own.
    bits: what a number of the momentum is kept in, 32 or 8 (`lowbit`). precision: of the compiled products, "float32" or
    "bf16".
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        bits: int = 32,
        precision: str = "bf16",
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self._store, self._precision = StateStore(bits), precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                # a tall matrix moves each output by more columns' worth; sqrt keeps the step per output the same
                rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                rates = {
                    "beta": group["momentum"],
                    "weight_decay": group["lr"] * group["weight_decay"],
                    "step_size": group["lr"] * max(1.0, rows / columns) ** 0.5,
                }
                value, grad, stack = wide(p), wide(p.grad).contiguous(), (-1, rows, columns)
                if ops.compiled(value, grad):
                    self._compiled_step(p, value.view(stack), grad.view(stack), rates)
                else:
                    for _, (momentum,) in self._store.open(self.state[p], p, MOMENTUM, whole=True):
                        momentum.lerp_(grad, 1 - rates["beta"])
                        update = orthogonalize(grad.lerp(momentum, rates["beta"]).view(stack)).reshape(p.shape)
                        value.mul_(1 - rates["weight_decay"]).add_(update, alpha=-rates["step_size"])
                write_weight(p, value)

    def _compiled_step(self, p: nn.Parameter, value_SMN: Tensor, grad_SMN: Tensor, rates: dict[str, float]) -> None:
        """The same in one call; an 8-bit momentum is read and written a row at a time."""
        state = self.state[p]
        self._store.begin(state, p, MOMENTUM)
        momentum = state["momentum"].view(value_SMN.shape)
        rest: dict[str, Any] = {"precision": self._precision, **rates}
        if self._store.is_8_bit(p):
            kept = (momentum, state["momentum" + ABSMAX])
            cpu.muon_step(value_SMN, grad_SMN, kept, COEFFICIENTS, **rest, block=block_size(value_SMN))
        else:
            cpu.muon_step(value_SMN, grad_SMN, momentum, COEFFICIENTS, **rest)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW. `bits` as in `Muon`; of moments in 8 bits only some rows at a time are in float32."""

    def __init__(self, params: Iterable[dict[str, Any]], *, bits: int = 32, **settings: Any):
        super().__init__(params, fused=True, **settings)
        self._store = StateStore(bits)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            settings = {name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
            settings |= {"beta1": beta1, "beta2": beta2, "fused": True}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                count = state.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
                for rows, (mean, square) in self._store.open(state, p, MOMENTS):
                    part, so_far = p[rows], count.clone()  # adamw counts a step by itself
                    value = wide(part)
                    adamw([value], [wide(p.grad[rows])], [mean], [square], [], [so_far], **settings)
                    write_weight(part, value)
                count += 1


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
        hidden: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": joined, "parts": 2},
        ]  # one of them may be empty
        # a run in float32 is one to compare with: it rounds nowhere
        precision = "float32" if config.precision == "float32" else "bf16"
        settings: dict[str, Any] = {"bits": config.optimizer_bits, "precision": precision}
        muon = Muon(hidden, lr=config.lr_matrix, weight_decay=config.weight_decay, **settings)
        groups = [{"params": embeddings, "lr": config.lr_embedding}, {"params": others, "lr": config.lr_other}]
        adam = AdamW(groups, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, bits=config.optimizer_bits)
        self._parts: list[torch.optim.Optimizer] = [muon, adam]
        self._base = [[group["lr"] for group in part.param_groups] for part in self._parts]
        self._names = {p: name for name, p in model.named_parameters()}

    def set_scale(self, scale: float) -> None:
        for part, base in zip(self._parts, self._base, strict=True):
            for group, lr in zip(part.param_groups, base, strict=True):
                group["lr"] = lr * scale

    def set_momentum(self, momentum: float) -> None:
        for group in self._parts[0].param_groups:  # Muon
            group["momentum"] = momentum

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
