from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.loader import Loader
from minga.data.shards import open_shards
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter
from minga.train.guard import LOST_STEPS, MAX_SKIPS, MIN_HISTORY, Diverged, Guard, require_finite_weights
from minga.train.optim import Optimizer
from minga.train.step import train_step


def make_guard(spike_skip: float = 10.0) -> Guard:
    return Guard(TrainConfig(steps=1, model=tiny(), spike_skip=spike_skip))


def calm(guard: Guard, steps: int, seed: int = 0, regime: str = "") -> list[str | None]:
    """Steps as a healthy run has them: a falling loss with noise, gradient norms that scatter by a third."""
    dice = random.Random(seed)
    return [
        guard.judge(4 - step / 1000 + dice.gauss(0, 0.05), math.exp(dice.gauss(0, 0.3)), regime=regime)
        for step in range(steps)
    ]


def test_noise_is_no_spike() -> None:
    assert calm(make_guard(), 2000) == [None] * 2000


def test_a_loss_or_a_gradient_far_above_its_median_is_a_spike() -> None:
    guard = make_guard()
    calm(guard, 100)
    reason = guard.judge(6.0, 1.0, regime="")
    assert reason is not None and reason.startswith("loss 6.000 is ") and "above its median 3.9" in reason
    reason = guard.judge(3.9, 1000.0, regime="")
    assert reason is not None and reason.startswith("log gradient norm 6.908 is ")
    assert guard.judge(1.0, 1e-9, regime="") is None  # far below is no harm
    assert guard.judge(3.9, 1.0, regime="") is None


def test_a_spike_does_not_move_the_median() -> None:
    guard = make_guard()
    calm(guard, 100)
    before = guard.state_dict()
    guard.judge(50.0, 1.0, regime="")
    after = guard.state_dict()
    assert after["num_skips"] == 1
    assert {**after, "num_skips": 0} == before


def test_off_or_without_history_nothing_is_skipped() -> None:
    off = make_guard(0.0)
    calm(off, 100)
    assert off.judge(8.0, 1e6, regime="") is None
    young = make_guard()
    calm(young, MIN_HISTORY - 1)
    assert young.judge(8.0, 1.0, regime="") is None


def test_another_regime_begins_anew() -> None:
    """MTP's first step has another gradient norm: it is no spike, and later ones are measured among their own."""
    guard = make_guard()
    calm(guard, 100, regime="plain")
    assert guard.judge(3.9, 1000.0, regime="mtp") is None
    calm(guard, 100, regime="mtp")
    assert guard.judge(3.9, 1000.0, regime="mtp") is not None


def test_too_many_skips_in_a_row_end_the_run() -> None:
    guard = make_guard()
    calm(guard, 100)
    for _ in range(MAX_SKIPS):
        assert guard.judge(6.0, 1.0, regime="") is not None
    with pytest.raises(Diverged, match=rf"loss 6\.000 is .* and the {MAX_SKIPS} steps before it were skipped"):
        guard.judge(6.0, 1.0, regime="")


def test_a_loss_above_knowing_nothing_for_long_ends_the_run() -> None:
    """1.5 ln(256) = 8.32; one step below begins the count anew."""
    guard = make_guard(0.0)
    for loss in [9.0] * (LOST_STEPS - 1) + [8.0] + [9.0] * (LOST_STEPS - 1):
        guard.judge(loss, 1.0, regime="")
        assert guard.healthy == (loss == 8.0)
    with pytest.raises(Diverged, match=rf"now 9\.00, has been above 8\.32 for {LOST_STEPS} steps.* costs 5\.55"):
        guard.judge(9.0, 1.0, regime="")


def test_the_state_is_exact_in_json() -> None:
    guard, twin = make_guard(), make_guard()
    calm(guard, 77)
    twin.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert twin.state_dict() == guard.state_dict()
    assert calm(guard, 300, seed=1) == calm(twin, 300, seed=1)
    assert twin.state_dict() == guard.state_dict()


# ---------------------------------------------------------------------------------------------------- one step


class Parts:
    """A toy model with all that a step needs."""

    def __init__(self, config: TrainConfig):
        torch.manual_seed(0)
        self.config = config
        self.model = Transformer(config.model.replace(vocab_size=384)).init_weights().train()
        self.optimizer, self.counter = Optimizer(self.model, config), LoadCounter(self.model.moe_layers())
        self.loader = Loader(open_shards(config.data), batch_size=2, seq_len=32, num_extra=2)

    def step(self, guard: Guard | None = None) -> str | None:
        batches = [next(self.loader), next(self.loader)]
        rates = [0.01] * len(self.counter.layers)
        parts = (self.model, batches, self.optimizer, self.config, self.counter)
        return train_step(*parts, with_mtp=True, balance_rates=rates, guard=guard).skipped


@pytest.fixture
def parts(make_config: Callable[..., TrainConfig]) -> Parts:
    return Parts(make_config())


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is no number."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("inf")


def test_the_layer_whose_output_is_not_finite_is_named(parts: Parts) -> None:
    parts.step()
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    layer = parts.model.model.layers[1].self_attn.o_proj
    calls = []

    def poison(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) % 2 == 0 else output  # in the second micro-batch only

    layer.register_forward_hook(poison)
    with pytest.raises(Diverged, match=r"loss nan, gradient norm nan, first in the output of model\.layers\.1\."):
        parts.step()
    for name, value in parts.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_layer_whose_gradient_is_not_finite_is_named(parts: Parts) -> None:
    norm = parts.model.model.layers[2].post_attention_layernorm
    norm.register_forward_hook(lambda module, inputs, output: Poison.apply(output))
    with pytest.raises(Diverged, match=r"the gradient of model\.layers\.2\.post_attention_layernorm\.weight"):
        parts.step()


def test_a_weight_that_is_not_finite_is_named(parts: Parts) -> None:
    with torch.no_grad():
        parts.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(Diverged, match=r"the weight model\.layers\.0\.mlp\.up_proj\.weight is not finite"):
        parts.step()
    with pytest.raises(Diverged, match="up_proj"):
        require_finite_weights(parts.model)


def test_a_skipped_step_changes_nothing(parts: Parts) -> None:
    for _ in range(2):
        parts.step()
    guard = Guard(TrainConfig(steps=1, model=tiny(), spike_skip=5.0))
    guard.load_state_dict(
        {"regime": "mtp True, 32 tokens a row", "losses": [1.0] * 40, "log_norms": [0.0] * 40}
        | {"num_skips": 0, "num_lost": 0}
    )
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    moments = {name: value.clone() for name, value in parts.optimizer.state_tensors().items()}
    reason = parts.step(guard)
    assert reason is not None and "loss" in reason
    for name, value in parts.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in parts.optimizer.state_tensors().items():
        assert torch.equal(value, moments[name]), name
    assert all(not counts.any() for counts in parts.counter.counts_LE)
    assert parts.step() is None
    assert any(not torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
