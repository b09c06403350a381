"""pytest tests/train/test_lowbit.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.train.lowbit import ABSMAX, BLOCK, add_dither, decode, dynamic_codes, encode, stochastic_round
from minga.train.optim import AdamW, Muon, Optimizer

EVERY_DITHER = torch.arange(2**16, dtype=torch.int32)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_seven_decades_each_with_half_the_steps_of_the_one_above(signed: bool) -> None:
    codes = dynamic_codes(signed).double()
    assert len(codes.unique()) == 256
    assert {0.0, 1.0} <= set(codes.tolist())
    assert (codes < 0).sum() == (127 if signed else 0)
    if signed:
        assert torch.equal(codes[codes < 0], -codes[(codes > 0) & (codes < 1)].flip(0))
    for decade in range(7):
        inside = codes[(codes > 10.0 ** (-decade - 1)) & (codes < 10.0**-decade)]
        steps = 2 ** (6 - decade) if signed else 2 ** (7 - decade)
        assert len(inside) == steps
        torch.testing.assert_close(inside.mean(), torch.tensor(0.55 * 10.0**-decade).double(), rtol=1e-6, atol=0)
        if steps > 1:
            torch.testing.assert_close(
                inside.diff(), torch.full((steps - 1,), 0.9 * 10.0**-decade / steps).double(), rtol=1e-3, atol=0
            )


@given(st.integers(1, 5), st.integers(1, 600), st.booleans(), st.integers(0, 99), st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_each_number_becomes_the_nearest_code_of_its_block(
    rows: int, columns: int, signed: bool, seed: int, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(
        -6, 1, (rows, columns), generator=generator
    )
    x = (x if signed else x.square()) * 10.0**exponent
    codes, absmax = encode(x, signed=signed)
    size = min(BLOCK, columns)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and absmax.shape == (rows, -(-columns // size))
    back = decode(codes, absmax, signed=signed)
    for block, largest in zip(x.split(size, 1), absmax.unbind(1), strict=True):
        assert torch.equal(block.abs().amax(1), largest)
    share = x.double() / absmax.double().repeat_interleave(size, 1)[:, :columns]
    distance = (share[..., None] - dynamic_codes(signed).double()).abs()
    ours = (back.double() / absmax.double().repeat_interleave(size, 1)[:, :columns] - share).abs()
    nearest = distance.min(-1).values if signed else distance[..., 1:].min(-1).values  # zero is for zero alone
    # the upper 20 bits decide: they stand for 2**-12 to both sides, and so may the boundary between two codes
    assert (ours <= nearest + 2**-11 * share.abs() + 1e-9).all()


def test_zeros_stay_zeros_and_a_second_moment_above_zero_stays_above() -> None:
    x = torch.zeros(3, 300)
    x[1, 0], x[1, 1] = 1.0, 1e-12
    back = decode(*encode(x, signed=False), signed=False)
    assert torch.equal(back == 0, x == 0)
    assert back[1, 0] == 1.0
    assert decode(*encode(x, signed=True), signed=True)[1, 1] == 0


def test_a_rare_row_does_not_feel_its_frequent_neighbour() -> None:
    x = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) + 0.5
    x[0] *= 1e9
    back = decode(*encode(x, signed=True), signed=True)
    assert ((back - x).abs() / x).max() < 0.05


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
@settings(max_examples=100, deadline=None)
def test_the_mean_over_every_dither_is_the_number_itself(number: float) -> None:
    if abs(number) > 3.38e38:  # the next bfloat16 is infinity
        return
    x = torch.tensor(number)
    rounded = add_dither(x.expand(2**16), EVERY_DITHER).double()
    assert float(rounded.mean()) == float(x)
    assert len(rounded.unique()) == (1 if x == x.bfloat16() else 2)


def test_stochastic_rounding_keeps_what_is_no_number_and_is_a_function_of_the_generator() -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    odd = torch.cat([odd, torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)])  # NaN, all bits set
    for dither in (0, 1, 2**16 - 1):
        rounded = add_dither(odd, torch.full(odd.shape, dither, dtype=torch.int32))
        torch.testing.assert_close(rounded.float(), odd, equal_nan=True, rtol=0, atol=0)
    x = torch.randn(1000)
    first, second, third = (stochastic_round(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_updates_below_half_a_step_of_bfloat16_add_up() -> None:
    """400 steps of 2**-12 from one, where bfloat16's step is 2**-7: to the nearest nothing moves, by chance the mean does."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.ones(64, 64).bfloat16())
    optimizer = AdamW([{"params": [p], "lr": 2**-12}], eps=0.0, weight_decay=0.0)
    for _ in range(400):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    assert torch.equal(torch.ones(1).bfloat16() + 2**-12, torch.ones(1).bfloat16())
    assert abs(float(p.detach().float().mean()) - (1 + 400 * 2**-12)) < 0.002
    assert p.dtype == torch.bfloat16


def test_adamw_in_32_bits_is_torchs_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(70, 80, generator=generator), torch.randn(5, generator=generator)]
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    optimizers = AdamW([{"params": ours}], **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def _steps(bits: int, count: int = 100) -> tuple[Tensor, Tensor]:
    """A matrix under Muon and an embedding under AdamW on one noisy quadratic."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 96, generator=generator)
    p, q = nn.Parameter(torch.zeros(64, 96)), nn.Parameter(torch.zeros(64, 96))
    optimizers = Muon([p], lr=0.1, bits=bits), AdamW([{"params": [q]}], lr=0.03, betas=(0.9, 0.95), bits=bits)
    for _ in range(count):
        noise = torch.randn(64, 96, generator=generator)
        for tensor in (p, q):
            tensor.grad = tensor.detach() - target + noise
        for optimizer in optimizers:
            optimizer.step()
    return (p.detach() - target).norm() / target.norm(), (q.detach() - target).norm() / target.norm()


def test_eight_bit_states_descend_as_far() -> None:
    for exact, eight in zip(_steps(32), _steps(8), strict=True):
        assert exact < 0.5
        assert abs(eight - exact) < 0.02 * exact
        assert eight != exact


def test_states_take_a_quarter_and_small_tensors_stay_float32() -> None:
    model = Transformer(tiny())
    optimizer = Optimizer(model, TrainConfig(steps=1, model=tiny(), optimizer_bits=8))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    states = optimizer.state_tensors()
    for name, p in model.named_parameters():
        keys = [key for key in states if key.split("|")[0] == name and not key.endswith(("|step", ABSMAX))]
        assert keys
        small = p.ndim == 1 or p.numel() < 4096
        assert all(states[key].dtype == (torch.float32 if small else torch.uint8) for key in keys)
    embedding = model.model.embed_tokens.weight
    ours = sum(t.nbytes for key, t in states.items() if key.startswith("model.embed_tokens.weight|exp"))
    assert ours == 2 * (embedding.numel() + 4 * len(embedding))  # rows of 64: one absmax each


@pytest.mark.parametrize(("name", "value"), [("weight_dtype", "fp8"), ("optimizer_bits", 16), ("precision", "int4")])
def test_unknown_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name} {value!r} is not known .* known: "):
        TrainConfig(steps=1, **{name: value})
