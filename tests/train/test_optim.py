from __future__ import annotations

import pytest
import torch
from torch import nn

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.model.transformer import Transformer
from minga.train.optim import Muon, Optimizer, orthogonalize


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (3, 40, 8)])
def test_orthogonalize_makes_singular_values_about_one(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(stack, full_matrices=False)
    result = orthogonalize(stack)
    before, after = torch.linalg.svdvals(stack), torch.linalg.svdvals(result)
    large = before > 0.02 * before.pow(4).sum(-1, keepdim=True) ** 0.25
    assert large.float().mean() > 0.9
    assert after[large.sort(descending=True).values].min() > 0.9
    assert after.max() < 1.1
    cosine = torch.nn.functional.cosine_similarity(result.flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95  # the direction is that of the nearest orthogonal matrix


def test_each_expert_and_each_half_is_its_own_matrix() -> None:
    """A stack with two matrices above each other moves exactly as the four matrices would alone."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(2, 8, 6, generator=generator))
    gradient = torch.randn(2, 8, 6, generator=generator)
    alone = [nn.Parameter(part.clone()) for part in stack.detach().reshape(4, 4, 6)]
    together = Muon([stack], lr=0.1)
    together.param_groups[0]["parts"] = 2
    apart = Muon(alone, lr=0.1)
    for _ in range(3):
        stack.grad = gradient.clone()
        for p, part in zip(alone, gradient.reshape(4, 4, 6), strict=True):
            p.grad = part.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach().reshape(4, 4, 6), torch.stack([p.detach() for p in alone]))


def test_muon_descends() -> None:
    target = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(6, 6))
    optimizer = Muon([p], lr=0.05)
    for _ in range(100):
        p.grad = p.detach() - target
        optimizer.step()
    assert (p - target).norm() < 0.3 * target.norm()


@pytest.mark.parametrize("bits", [32, 8])
def test_state_goes_out_and_in_exactly(bits: int) -> None:
    def step(model: Transformer, optimizer: Optimizer, seed: int) -> None:
        ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(ids).logits.square().mean().backward()
        optimizer.step()

    config = TrainConfig(steps=1, model=tiny(), seq_len=8, optimizer_bits=bits)
    torch.manual_seed(0)
    model = Transformer(config.model).init_weights()
    optimizer = Optimizer(model, config)
    step(model, optimizer, 1)
    twin = Transformer(config.model)
    twin.load_state_dict(model.state_dict())
    other = Optimizer(twin, config)
    other.load_state_tensors({name: value.clone() for name, value in optimizer.state_tensors().items()})
    step(model, optimizer, 2)
    step(twin, other, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_every_parameter_has_exactly_one_optimizer() -> None:
    model = Transformer(tiny()).init_weights()
    optimizer = Optimizer(model, TrainConfig(steps=1, model=tiny()))
    owned = [p for part in optimizer._parts for group in part.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
