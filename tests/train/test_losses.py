from __future__ import annotations

import math

import pytest
import torch

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.packing import Batch
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter
from minga.train.losses import cross_entropy, router_z, sequence_balance
from minga.train.schedule import lr_scale
from minga.train.step import batch_loss


def test_cross_entropy_counts_unmasked_targets_only() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 4], [-100, -100, 0]])
    expected = -sum(logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in [(0, 0), (0, 2), (1, 2)])
    torch.testing.assert_close(cross_entropy(logits, targets, reduction="sum"), expected)
    torch.testing.assert_close(cross_entropy(logits, targets), expected / 3)


def test_fully_masked_batch_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_sequence_balance_is_one_when_even_and_experts_over_active_when_all_choose_alike() -> None:
    score = torch.full((8, 4), 0.5)
    even = torch.tensor([[0, 1], [2, 3]] * 4)
    assert sequence_balance(even, score, 2).item() == pytest.approx(1.0)
    skewed = torch.zeros(8, 4) + torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert sequence_balance(torch.tensor([[0, 1]] * 8), skewed, 2).item() == pytest.approx(2.0)


def test_sequence_balance_matches_the_papers_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    B, T, E, A = 3, 5, 6, 2
    score = torch.rand(B * T, E, generator=generator)
    index = score.topk(A).indices
    total = 0.0
    for b in range(B):
        for i in range(E):
            rows = range(b * T, (b + 1) * T)
            f = E / (A * T) * sum(int(i in index[t].tolist()) for t in rows)
            p = sum(float(score[t, i] / score[t].sum()) for t in rows) / T
            total += f * p / B
    assert sequence_balance(index, score, B).item() == pytest.approx(total, rel=1e-5)


def test_schedule_rises_holds_and_falls() -> None:
    config = TrainConfig(steps=1, warmup=0.1, decay=0.5, final_lr=0.1)
    values = [lr_scale(progress / 100, config) for progress in range(101)]
    assert 0 < values[0] < 0.05
    assert values[10:50] == [1.0] * 40
    assert values[5] < values[9] < 1.0
    assert values[51:] == sorted(values[51:], reverse=True)
    assert math.isclose(values[100], 0.1)


def test_router_z_is_the_papers_mean_and_differentiates() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist()) / 7
    assert router_z(logits).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(router_z, (logits,))
    assert torch.autograd.gradgradcheck(router_z, (logits,))


def test_router_z_of_every_layer_is_in_the_loss_and_draws_the_logits_in() -> None:
    torch.manual_seed(0)
    model = Transformer(tiny()).init_weights().train()
    ids = torch.randint(0, 256, (2, 16))
    batch = Batch(ids, torch.stack([ids, ids]), None, None)

    def loss(weight: float) -> torch.Tensor:
        config = TrainConfig(steps=1, model=tiny(), router_z_loss=weight)
        return batch_loss(model, batch, config, LoadCounter(model.moe_layers()), with_mtp=True)[0]

    model.hidden(ids)
    hidden = model.hidden(ids)
    model.mtp_hidden(0, ids, hidden)
    expected = sum(router_z(layer.gate.logits_NE).item() for layer in model.moe_layers())
    assert expected > 1
    assert (loss(0.5) - loss(0.0)).item() == pytest.approx(0.5 * expected, rel=1e-4)
    assert all(layer.gate.logits_NE is None for layer in model.moe_layers())  # the graph is not kept beyond the step
    optimizer = torch.optim.SGD([layer.gate.weight for layer in model.moe_layers()], lr=0.1)
    before = loss(1.0).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(1.0).backward()
        optimizer.step()
    assert loss(1.0).item() < before
    model.eval()
    model.hidden(ids)
    assert model.moe_layers()[0].gate.logits_NE is None
