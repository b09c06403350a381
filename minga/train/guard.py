"""What watches a run's loss and gradients: skips a step that is a spike, stops a run that is lost.

A spike is a step whose loss, or the logarithm of whose gradient norm, lies more than `spike_skip` robust deviations
above its running median. Robust deviation: 1.4826 times the median absolute deviation over the last `WINDOW` accepted
steps (1.4826 makes it the standard deviation of normal numbers), and at least a small floor, for a flat curve has none.
The logarithm, because gradient norms scatter by factors. Nothing is judged before `MIN_HISTORY` steps of one regime:
the first step with MTP, or with longer rows, has another gradient norm for good reason.

It is off by default: in six healthy runs of small models (100 to 1,900 steps) the highest loss stood 8 such deviations
out and the highest log norm 28, and clipping had made each harmless. 30 and above keeps to true spikes.

A skipped step changes neither weights, moments nor biases; its data is passed over. All that decides is in
`state_dict`, so a resumed run skips what the uninterrupted one skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from minga.config import TrainConfig
from minga.data.packing import Batch
from minga.errors import UserError
from minga.train.parallel import ALONE, Parallel, local_tensor

WINDOW = 64  # accepted steps that the median is of
MIN_HISTORY = 32
MAX_SKIPS = 10  # skipped steps in a row after which the run is not spiking but lost
LOST_LEVEL = 1.5  # times ln(V), the loss of a model that knows nothing
LOST_STEPS = 50  # steps in a row above that level


class Diverged(UserError):
    """Why a run cannot go on, without the step and the checkpoint that the recipe knows."""


class Guard:
    """`judge` each step before its update. `healthy`: whether a checkpoint taken now would be a good one."""

    def __init__(self, config: TrainConfig):
        self._threshold = config.spike_skip
        self._lost_level = LOST_LEVEL * math.log(config.model.vocab_size)
        self._regime = ""
        self._losses: list[float] = []
        self._log_norms: list[float] = []
        self._num_skips = self._num_lost = 0  # in a row

    @property
    def healthy(self) -> bool:
        return self._num_lost == 0

    def judge(self, loss: float, grad_norm: float, *, regime: str) -> str | None:
        """Why this step must be skipped, or None. Both numbers are finite. Raises `Diverged` for a run that is lost.

        On several machines both must be those of the whole batch, so that all decide alike.
        """
        reason = self._judge_spike(loss, grad_norm, regime) if self._threshold else None
        if reason is None:
            self._num_lost = self._num_lost + 1 if loss > self._lost_level else 0
        if self._num_lost >= LOST_STEPS:
            raise Diverged(
                f"the loss, now {loss:.2f}, has been above {self._lost_level:.2f} for {LOST_STEPS} steps, "
                f"where knowing nothing costs {self._lost_level / LOST_LEVEL:.2f}"
            )
        return reason

    def _judge_spike(self, loss: float, grad_norm: float, regime: str) -> str | None:
        if regime != self._regime:
            self._regime, self._losses, self._log_norms = regime, [], []
        log_norm = math.log(max(grad_norm, 1e-30))
        reason = self._spike("loss", loss, self._losses, floor=0.01 * abs(loss))
        reason = reason or self._spike("log gradient norm", log_norm, self._log_norms, floor=0.05)
        if reason is None:
            self._num_skips = 0
            self._losses = [*self._losses, loss][-WINDOW:]
            self._log_norms = [*self._log_norms, log_norm][-WINDOW:]
            return None
        self._num_skips += 1
        if self._num_skips > MAX_SKIPS:
            raise Diverged(f"{reason}, and the {MAX_SKIPS} steps before it were skipped for the like")
        return reason

    def _spike(self, name: str, value: float, past: list[float], *, floor: float) -> str | None:
        if len(past) < MIN_HISTORY:
            return None
        middle = median(past)
        score = (value - middle) / max(1.4826 * median(abs(one - middle) for one in past), floor)
        if score <= self._threshold:
            return None
        return f"{name} {value:.3f} is {score:.1f} robust deviations above its median {middle:.3f}"

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON, which keeps each float exactly."""
        return {
            "regime": self._regime,
            "losses": self._losses,
            "log_norms": self._log_norms,
            "num_skips": self._num_skips,
            "num_lost": self._num_lost,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._regime, self._losses, self._log_norms = state["regime"], state["losses"], state["log_norms"]
        self._num_skips, self._num_lost = state["num_skips"], state["num_lost"]


def require_finite_weights(model: nn.Module) -> None:
    """Raises `Diverged` naming the first weight that is no number: such a model must not become a checkpoint."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(local_tensor(tensor)).all():
            raise Diverged(f"the weight {name} is not finite")


def first_not_finite(
    model: nn.Module, loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch], parallel: Parallel = ALONE
) -> str:
    """Where numbers first stop being finite when a step's micro-batches are computed and differentiated once more.

    In the order of the computation: a weight, the output of a module, the gradient at its output or of a parameter.
    All are computed, found or not: where each is a collective of several processes, all must take part in all. Of
    what they find the first process's is told. A pipeline is not run again: only its weights are looked at.
    """
    try:
        require_finite_weights(model)
        lost = None
    except Diverged as error:
        lost = str(error)
    lost = parallel.first(lost)
    if lost is not None:
        return lost
    if parallel.pp > 1:
        return "though every weight is finite"
    found: list[str] = []

    def check(tensor: Tensor, what: str) -> None:
        if not torch.isfinite(tensor).all():
            found.append(what)

    def watch_output(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                check(tensor, f"first in the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: check(grad, f"first in the gradient at the output of {name}"))

        return hook

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        return lambda grad: check(grad, f"first in the gradient of {name}")

    handles = [module.register_forward_hook(watch_output(name)) for name, module in model.named_modules() if name]
    handles += [p.register_hook(watch_gradient(name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        for batch in batches:
            loss = loss_of(batch)
            check(loss, "first in the loss itself")
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return parallel.first(found[0] if found else None) or "though every gradient is finite: their sum of squares is not"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
