"""pytest tests/kernels/test_cpu.py"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minga.kernels import cpu, ops, reference
from minga.kernels.cross_entropy import linear_cross_entropy
from minga.model.rope import rotate
from minga.train import lowbit
from minga.train.optim import COEFFICIENTS, orthogonalize

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler on this machine")

# Relative error of a product of random matrices: float32 sums, 8 bits of mantissa, 1/127 of a run's largest value.
ERROR = {"float32": 1e-6, "bf16": 6e-3, "int8": 3e-2}
PRECISIONS = list(ERROR)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of each floating input, for one fixed output gradient."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (13, 37, 129), (200, 96, 128), (97, 33, 300), (5, 700, 40)])
def test_linear(precision, sizes):
    torch.manual_seed(0)
    N, O, I = sizes  # noqa: E741
    inputs = torch.randn(N, I), torch.randn(O, I)
    ours = gradients(lambda x, w: cpu.Linear.apply(x, w, cpu.PRECISIONS[precision]), *inputs)
    for mine, exact in zip(ours, gradients(lambda x, w: x @ w.T, *doubles(*inputs)), strict=True):
        assert error(mine, exact) < ERROR[precision]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_forward_rounds_as_the_reference_does(precision):
    """The same rounded operands, so all that is left between the two is the order of float32 sums."""
    x, w = torch.randn(150, 300), torch.randn(70, 300)
    ours = cpu.Linear.apply(x, w, cpu.PRECISIONS[precision])
    assert error(ours, reference.linear_rounded(x, w, precision=precision)) < 2e-6


def test_gradients_are_rounded_without_bias():
    """int8 gradients are rounded up or down by chance: the mean of many roundings is far nearer than one is."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    exact = gradients(lambda x, w: x @ w.T, *doubles(x, w))[1]
    draws = [gradients(lambda x, w: cpu.Linear.apply(x, w, 2), x, w)[1] for _ in range(200)]
    nearest = torch.randn(64, 96, generator=torch.Generator().manual_seed(7)) @ reference.round_to(w, "int8", 0)
    one, mean = error(draws[0], nearest), error(torch.stack(draws).mean(0), nearest)
    assert mean < one / 8 and one > 1e-3
    assert error(draws[0], exact) < ERROR["int8"]


def test_same_seed_same_bits_whatever_the_threads():
    x, w = torch.randn(300, 200), torch.randn(150, 200)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        results.append(gradients(lambda x, w: cpu.Linear.apply(x, w, 2), x, w))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_number_is_not_hidden(precision, bad):
    x, w = torch.randn(40, 256), torch.randn(30, 256)
    x[3, 200] = bad
    y = cpu.Linear.apply(x, w, cpu.PRECISIONS[precision])
    assert not torch.isfinite(y[3]).any() and torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()


def test_zeros_and_tiny_values_in_int8():
    x, w = torch.zeros(20, 130), torch.randn(9, 130)
    assert torch.equal(cpu.Linear.apply(x, w, 2), torch.zeros(20, 9))
    x[:] = 1e-20
    assert error(cpu.Linear.apply(x, w, 2), x.double() @ w.double().T) < ERROR["int8"]


def expert_inputs(N: int, D: int, E: int, A: int, F: int) -> tuple[Tensor, ...]:
    """One expert stays without a token."""
    index = torch.stack([torch.randperm(max(E - 1, A))[:A] for _ in range(N)])
    gate_up, down = torch.randn(E, 2 * F, D) * D**-0.5, torch.randn(E, D, F) * F**-0.5
    return torch.randn(N, D), index, torch.rand(N, A), gate_up, down


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(1, 8, 2, 1, 5), (130, 48, 9, 3, 40), (77, 33, 4, 4, 17)])
def test_experts(precision, sizes):
    torch.manual_seed(1)
    inputs = expert_inputs(*sizes)
    ours = gradients(lambda *t: cpu.Experts.apply(*t, cpu.PRECISIONS[precision]), *inputs)
    for mine, exact in zip(ours, gradients(reference.experts, *doubles(*inputs)), strict=True):
        assert error(mine, exact) < 2 * ERROR[precision]


def test_mlp_is_three_products():
    inputs = torch.randn(3, 70, 96), torch.randn(50, 96), torch.randn(50, 96), torch.randn(96, 50)

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    for mine, exact in zip(gradients(ops.mlp, *inputs), gradients(plain, *doubles(*inputs)), strict=True):
        assert error(mine, exact) < 1e-6


@pytest.mark.parametrize("style", ["interleaved", "halves"])
@pytest.mark.parametrize("sizes", [(2, 130, 3, 32, 16, 24), (1, 97, 2, 16, 8, 16), (3, 5, 2, 7, 2, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(style, sizes, packed):
    torch.manual_seed(2)
    B, T, H, K, R, V = sizes
    inputs = torch.randn(B, T, H, K + R), torch.randn(B, T, H, K + V), torch.randn(B, T, R)
    angle = torch.rand(B if packed else 1, T, R // 2) * 6
    segments = (torch.rand(B, T) < 0.1).long().cumsum(1) if packed else None

    def plain(q: Tensor, kv: Tensor, rope: Tensor) -> Tensor:
        cos, sin = angle.cos().to(q), angle.sin().to(q)
        q_nope, q_rope = q.split([K, R], -1)
        k_nope, v = kv.split([K, V], -1)
        k_rope = rotate(rope[:, :, None], cos, sin, style=style).expand(-1, -1, H, -1)
        mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None])
        q = torch.cat([q_nope, rotate(q_rope, cos, sin, style=style)], -1)
        return reference.attend(q, torch.cat([k_nope, k_rope], -1), v, mask, scale=0.2)

    def fused(precision: int) -> Callable[..., Tensor]:
        rest = (angle.cos(), angle.sin(), segments, style == "halves", 0.2, precision)
        return lambda q, kv, rope: cpu.LatentAttention.apply(q, kv, rope, *rest)

    exact = gradients(plain, *doubles(*inputs))
    for precision, bound in ((0, 1e-6), (1, 1e-2)):
        for mine, theirs in zip(gradients(fused(precision), *inputs), exact, strict=True):
            assert error(mine, theirs) < bound


def test_rms_norm():
    inputs = torch.randn(5, 30, 70), torch.rand(70)
    ours = gradients(lambda x, w: cpu.RMSNorm.apply(x, w, 1e-6), *inputs)
    exact = gradients(lambda x, w: w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(), *doubles(*inputs))
    assert all(error(mine, theirs) < 1e-6 for mine, theirs in zip(ours, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_cross_entropy(dtype, monkeypatch):
    """Compiled (float32) and plain (float64), in several chunks and with targets that are left out."""
    monkeypatch.setattr("minga.kernels.cross_entropy._CHUNK", 400)
    hidden, weight = torch.randn(37, 24, dtype=dtype), torch.randn(90, 24, dtype=dtype)
    targets = torch.randint(0, 90, (37,))
    targets[::5] = -100

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")

    ours = gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    for mine, exact in zip(ours, gradients(plain, *doubles(hidden, weight)), strict=True):
        assert error(mine, exact) < (1e-6 if dtype == torch.float32 else 1e-13)
    rounded = gradients(lambda h, w: linear_cross_entropy(h, w, targets, precision="int8"), hidden, weight)
    for mine, exact in zip(rounded, gradients(plain, *doubles(hidden, weight)), strict=True):
        assert error(mine, exact) < ERROR["bf16"]


@pytest.mark.parametrize("shape", [(1, 40, 70), (3, 70, 40), (5, 128, 128), (2, 350, 500)])
def test_muon_step_is_its_definition(shape):
    torch.manual_seed(3)
    weight, grad, momentum = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    grad[1:2], momentum[1:2] = 0.0, 0.0  # an expert that no token chose
    after = momentum.lerp(grad, 0.05)
    update = orthogonalize(grad.lerp(after, 0.95).double())
    expected = weight.double() * 0.99 - 0.02 * update
    step = {"beta": 0.95, "weight_decay": 0.01, "step_size": 0.02}
    cpu.muon_step(weight, grad, momentum, COEFFICIENTS, **step, precision="float32")
    assert error(momentum, after) < 1e-6 and error(weight, expected) < 1e-5


def test_muon_step_with_its_momentum_in_8_bits():
    """What comes out is what decoding, the step above and encoding give, bit for bit where nothing is rounded twice."""
    torch.manual_seed(4)
    weight, grad = torch.randn(3, 40, 300), torch.randn(3, 40, 300)
    codes, absmax = lowbit.encode(torch.randn(3, 40, 300), "linear")
    other, momentum = weight.clone(), lowbit.decode(codes, absmax, "linear")
    step = {"beta": 0.9, "weight_decay": 0.0, "step_size": 0.02, "precision": "float32"}
    cpu.muon_step(other, grad, momentum, COEFFICIENTS, **step)
    cpu.muon_step(weight, grad, (codes, absmax), COEFFICIENTS, **step, block=lowbit.BLOCK)
    expected, expected_absmax = lowbit.encode(momentum, "linear")
    assert torch.equal(weight, other) and torch.equal(absmax, expected_absmax)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("shape", [(4, 100, 200), (4, 200, 100), (2, 300, 300)])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e12])
def test_muon_update_in_bf16_is_nearly_orthogonal(shape, size):
    """Every singular value of a random matrix ends in about [0.9, 1.1], which is all that Muon wants."""
    update = torch.zeros(shape)
    rates = {"beta": 0.0, "weight_decay": 0.0, "step_size": -1.0}
    cpu.muon_step(update, size * torch.randn(shape), torch.zeros(shape), COEFFICIENTS, **rates, precision="bf16")
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.15 and values.quantile(0.05) > 0.7


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )


REPORT = "from minga.kernels import cpu; print(cpu.load(print), cpu.available())"


def test_without_a_compiler(tmp_path):
    """Said in one line; nothing is raised."""
    lines = run_python(REPORT, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path)).stdout.splitlines()
    assert lines[-1] == "False False"
    assert len(lines) == 2 and "no compiled kernels" in lines[0]


def test_compiles_once_and_mends_a_damaged_file(tmp_path):
    first = run_python(REPORT, XDG_CACHE_HOME=str(tmp_path)).stdout
    assert "compiling" in first and first.endswith("True True\n")
    assert run_python(REPORT, XDG_CACHE_HOME=str(tmp_path)).stdout == "True True\n"
    (library,) = (tmp_path / "minga").iterdir()
    library.write_bytes(b"not a library")
    assert run_python(REPORT, XDG_CACHE_HOME=str(tmp_path)).stdout == first


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    lines = run_python(REPORT, XDG_CACHE_HOME=str(tmp_path / "file")).stdout.splitlines()
    assert lines[-1] == "False False"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("flags", ["-march=haswell", pytest.param("-march=x86-64", marks=pytest.mark.slow)])
def test_what_lesser_processors_run(flags, tmp_path):
    """AVX2, and vectors of four for all others: other code than this machine's, the same results."""
    environment = {**os.environ, "CXXFLAGS": flags, "XDG_CACHE_HOME": str(tmp_path)}
    names = "test_linear or rounds or experts or attention or muon or norm or broken or threads"
    names += " or product or neighbours or computes or same_bits or half_width"
    files = [
        __file__,
        *(str(Path(__file__).parents[1] / file) for file in ("kernels/test_net.py", "engine/test_compiled.py")),
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
