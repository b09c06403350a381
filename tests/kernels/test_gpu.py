"""pytest tests/kernels/test_gpu.py

Without a GPU the kernels run on the CPU under Triton's interpreter (tests/conftest.py); `-m gpu` runs them on one.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'minga[gpu]'")

from minga.config.presets import tiny
from minga.kernels import fp8, gpu, ops, reference
from minga.kernels.gpu import block_gemm, grouped_gemm, latent_attention, quantize, router, tiles
from minga.model.cache import Cache
from minga.model.transformer import Transformer
from minga.quant import blocks

# The interpreter is numpy, which warns of what the formats mean to happen; its arrays of one number are its own affair.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request):
    """Every test makes its tensors there."""
    if (request.param == "cpu") != tiles.INTERPRETED:
        pytest.skip("one process either interprets Triton's kernels or compiles them, as TRITON_INTERPRET says")
    with torch.device(request.param):
        yield torch.device(request.param)


@pytest.fixture(params=range(4))
def sizes(request, device) -> random.Random:
    """Odd sizes, different in each run of a test."""
    torch.manual_seed(request.param)
    return random.Random(request.param)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def spread(*shape: int) -> Tensor:
    """Numbers over many powers of two, zeros and subnormal ones among them."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-14, 4, shape)
    return torch.where(torch.rand(shape) < 0.02, torch.tensor([0.0, 1e-40])[torch.randint(2, shape)], x)


def as_bytes(values: Tensor) -> Tensor:
    """E4M3 byte by byte, but a NaN's sign means nothing."""
    codes = values.view(torch.uint8)
    return codes.masked_fill((codes & 0x7F) == 0x7F, 0x7F)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_fp8(sizes, dtype):
    """Bit for bit; a tile of zeros, of numbers near float32's ends, and one lost to infinity or NaN among them."""
    x = spread(sizes.randint(6, 40), sizes.randint(130, 400))
    x[0], x[1, :128], x[2, 5], x[3, 129], x[4] = 0, 1e-38, float("inf"), float("nan"), 3e38
    if dtype == torch.bfloat16:  # the interpreter widens subnormal bf16 wrongly
        x = torch.where(x.abs() < 2.0**-126, 0.0, x)
    x = x.to(dtype).view(2, -1, x.shape[1]) if len(x) % 2 == 0 else x.to(dtype)
    (stored, scale), (values, exact) = quantize.quantize_fp8(x), fp8.quantize(x, fp8.ALONG_CHANNELS)
    assert (stored.dtype, scale.dtype) == (values.dtype, exact.dtype)
    assert torch.equal(as_bytes(stored), as_bytes(values))
    assert torch.equal(scale.view(torch.uint8), exact.view(torch.uint8))


def test_every_middle_rounds_to_even():
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), values[-1:]])
    x = torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * len(x) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], 1)  # one tile a row, of scale 1
    stored, scale = quantize.quantize_fp8(x)
    assert scale.float().unique().tolist() == [1.0]
    assert torch.equal(stored.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_quantize_int8(sizes):
    x = spread(sizes.randint(5, 40), sizes.randint(65, 300))
    x[0], x[1, 3], x[2, 64] = 0, float("inf"), float("nan")
    (stored, scale), (values, exact) = quantize.quantize_int8(x, 64), reference.round_activations(x, 64)
    assert stored.dtype == values.dtype == torch.int8
    torch.testing.assert_close(scale, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(stored, values)


def test_quantize_int8_divides_and_multiplies_once(device):
    """Numbers halfway between two steps up to the last bit: an inverse of the scale, or one rounding less, gives others."""
    torch.manual_seed(0)
    top = torch.rand(500, 1) + 0.5
    x = torch.cat([(torch.randint(-126, 126, (500, 63)) + 0.5) * (top / 127), top], 1)
    (stored, scale), (values, exact) = quantize.quantize_int8(x, 64), reference.round_activations(x, 64)
    assert torch.equal(stored, values) and torch.equal(scale, exact)


@pytest.mark.parametrize("native", [True, False], ids=["e4m3", "as_float16"])
@pytest.mark.parametrize("rows", [128, 1])
def test_block_gemm_fp8(sizes, native, rows, monkeypatch):
    """Every byte that is a number, scales of any size; before 8.9 tiles are widened as they are read."""
    if not native:
        monkeypatch.setattr(tiles, "multiplies_e4m3", lambda device: False)
    elif not tiles.multiplies_e4m3(torch.empty(0).device):
        pytest.skip("this GPU does not multiply E4M3")
    M, N, K = sizes.randint(1, 90), sizes.randint(1, 300), sizes.randint(1, 400)
    codes = [torch.randint(0, 127, shape) + 128 * torch.randint(2, shape) for shape in ((M, K), (N, K))]
    x, weight = (c.to(torch.uint8).view(torch.float8_e4m3fn) for c in codes)
    x_scale, weight_scale = torch.rand(M, -(-K // 128)) * 100, torch.rand(-(-N // rows), -(-K // 128))
    ours = block_gemm.block_gemm(x, x_scale, weight, weight_scale, block=128, rows=rows)
    exact = reference.block_gemm(x, x_scale, weight, weight_scale, block=128, rows=rows)
    assert ours.shape == (M, N)
    assert error(ours, exact) < (2e-6 if tiles.INTERPRETED else 1e-3)  # Hopper sums 14 bits inside a block


def test_nan_bytes_stay_nan(monkeypatch):
    monkeypatch.setattr(tiles, "multiplies_e4m3", lambda device: False)
    x, weight = torch.ones(3, 130), torch.ones(5, 130)
    x[1, 129] = float("nan")
    pairs = (*fp8.quantize(x, fp8.ALONG_CHANNELS), *fp8.quantize(weight, fp8.WEIGHT))
    out = block_gemm.block_gemm(*pairs, block=128, rows=128)
    assert out.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_gemm_int8(sizes, dtype):
    M, N, K = sizes.randint(1, 90), sizes.randint(1, 300), sizes.randint(1, 300)
    x, weight = torch.randn(M, K), reference.quantize_int8(torch.randn(N, K), 64)
    ours = block_gemm.block_gemm(*quantize.quantize_int8(x, 64), *weight, block=64, rows=1, dtype=dtype)
    assert ours.dtype == dtype
    assert error(ours, reference.linear_int8(x, *weight, 64)) < TOLERANCE[dtype]


def layer(sizes: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs of an expert layer; some experts are never chosen."""
    E, D, F = sizes.randint(3, 9), sizes.randint(5, 200), sizes.randint(3, 150)
    N, A = sizes.choice((1, 7, 150)), sizes.randint(1, 3)
    index = torch.rand(N, E - 1).argsort(1)[:, :A] if E > A + 1 else torch.rand(N, E).argsort(1)[:, :A]
    return torch.randn(N, D), index, torch.rand(N, A), torch.randn(E, 2 * F, D) * 0.2, torch.randn(E, D, F) * 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts(sizes, dtype):
    x, index, *floats = layer(sizes)
    x, *floats = (t.to(dtype) for t in (x, *floats))
    ours = grouped_gemm.experts(x, index, *floats)
    assert ours.dtype == dtype
    assert error(ours, reference.experts(x.float(), index, *(t.float() for t in floats))) < TOLERANCE[dtype]


def test_experts_fp8(sizes):
    """As the emulation of training computes them."""
    x, index, weight, *stacks = layer(sizes)
    values, scales = zip(*(fp8.quantize(w, fp8.WEIGHT) for w in stacks), strict=True)
    ours = grouped_gemm.experts(x, index, weight, *values, weight_scales=scales)
    # a number between is now and then rounded to the other neighbour, since sums differ in their last bit
    assert error(ours, ops.experts(x, index, weight, *stacks, precision="fp8")) < 2e-3


def test_experts_int8(sizes):
    x, index, weight, *stacks = layer(sizes)
    gate_up, down = (reference.quantize_int8(w, 64) for w in stacks)
    ours = grouped_gemm.experts(x, index, weight, gate_up[0], down[0], weight_scales=(gate_up[1], down[1]), block=64)
    assert error(ours, reference.experts_int8(x, index, weight, gate_up, down, block=64)) < 1e-3


def test_experts_of_no_token():
    out = grouped_gemm.experts(
        torch.empty(0, 8), torch.empty(0, 2).long(), *map(torch.empty, [(0, 2), (3, 8, 8), (3, 8, 4)])
    )
    assert out.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_parts", [1, 3, None])
def test_attend_latent_paged(sizes, dtype, num_parts):
    """Pages in any order, sequences of different lengths, several queries each, some that see one token only."""
    B, T, H, C, R = (
        sizes.randint(1, 3),
        sizes.randint(1, 3),
        sizes.randint(1, 11),
        sizes.randint(3, 70),
        sizes.randint(2, 20),
    )
    page, pages_each = sizes.choice((1, 5, 16, 64)), sizes.randint(1, 9)
    pages = torch.randn(B * pages_each + 2, page, C + R).to(dtype)
    table = torch.randperm(len(pages))[: B * pages_each].view(B, pages_each)
    positions = torch.randint(0, page * pages_each, (B, T))
    positions[0, 0] = 0
    q_latent, q_rope = torch.randn(B, T, H, C).to(dtype), torch.randn(B, T, H, R).to(dtype)
    ours = latent_attention.attend_latent_paged(
        q_latent, q_rope, pages, table, positions, scale=0.2, num_parts=num_parts
    )
    wide = (q_latent.float(), q_rope.float(), pages.float())
    assert ours.dtype == dtype
    assert error(ours, reference.attend_latent_paged(*wide, table, positions, scale=0.2)) < TOLERANCE[dtype]


def test_pages_are_the_absorbed_form(sizes):
    """The definition itself, against that of attention over a plain cache."""
    B, S, H, K, C, R, V = 2, sizes.randint(2, 20), 3, 5, 7, 4, 6
    q_nope, q_rope, rows = torch.randn(B, 1, H, K), torch.randn(B, 1, H, R), torch.randn(B, S, C + R)
    w_uk, w_uv = torch.randn(H, K, C), torch.randn(H, V, C)
    latent, rope = rows.split([C, R], -1)
    whole = reference.attend_latent_absorbed(
        q_nope, q_rope, latent, rope, None, w_uk_HKC=w_uk, w_uv_HVC=w_uv, scale=0.3
    )
    q_latent = torch.einsum("bthk,hkc->bthc", q_nope, w_uk)
    positions, table = torch.full((B, 1), S - 1), torch.arange(B)[:, None]
    out = reference.attend_latent_paged(q_latent, q_rope, rows, table, positions, scale=0.3)
    torch.testing.assert_close(torch.einsum("bthc,hvc->bthv", out, w_uv), whole)


@pytest.mark.parametrize("rule", ["v2", "v3", "greedy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(sizes, rule, normalize):
    groups = 1 if rule == "greedy" else sizes.randint(2, 9)
    size = sizes.randint(2, 40)
    kept = sizes.randint(1, groups)
    active = sizes.randint(1, min(8, kept * size))
    logits = torch.randn(sizes.randint(1, 9), groups * size)
    # most sums are below 0: those of a group that was left out must not win
    bias = torch.randn(groups * size) - 3 if rule == "v3" else None
    rules = {"num_active": active, "sigmoid": rule == "v3", "num_groups": groups, "groups_kept": kept}
    rules |= {"group_top": 2 if rule == "v3" else 1, "normalize": normalize, "scale": 2.5}
    index, weight, score = router.route(logits, bias, **rules)
    exact_index, exact_weight, exact_score = reference.route(logits, bias, **rules)
    (index, order), (exact_index, exact_order) = index.sort(), exact_index.sort()
    assert torch.equal(index, exact_index)
    torch.testing.assert_close(weight.gather(1, order), exact_weight.gather(1, exact_order))
    torch.testing.assert_close(score, exact_score)


def test_a_lost_token_is_routed_to_experts_that_exist():
    """A number outside 0..E-1 would be read as an address."""
    logits = torch.full((3, 10), float("nan"))
    logits[1], logits[2] = 0.0, float("-inf")
    rules = {"num_active": 3, "num_groups": 5, "groups_kept": 2, "group_top": 2, "normalize": True, "scale": 1.0}
    for sigmoid in (True, False):
        index, weight, _ = router.route(logits, None, sigmoid=sigmoid, **rules)
        assert ((index >= 0) & (index < 10)).all()
        assert all(len(set(row)) == 3 for row in index.tolist())
        assert weight[0].isnan().all() and index[1].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ in the model


@pytest.fixture
def taken(device, monkeypatch) -> None:
    """`ops` takes the kernels also where Triton interprets them."""

    def usable(*tensors: Tensor) -> bool:
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    if tiles.INTERPRETED:
        monkeypatch.setattr(gpu, "usable", usable)


def decode(model: Transformer, ids_BT: Tensor) -> Tensor:
    """Logits of a prompt and of the two tokens after it, through the cache."""
    cache = Cache.of(model.config, len(ids_BT), 9, dtype=torch.float32, device=ids_BT.device)
    positions = torch.arange(ids_BT.shape[1])
    parts = [positions[:-3], positions[-3:-1], positions[-1:]]
    with torch.inference_mode():
        hidden = [
            model.hidden(ids_BT[:, part], cache=cache, positions_BT=part.expand(len(ids_BT), -1)) for part in parts
        ]
        return model.head(torch.cat(hidden, 1))


@pytest.mark.parametrize("quant", [None, "int8"])
def test_a_model_generates_through_the_kernels(quant, request, monkeypatch):
    torch.manual_seed(0)
    model = Transformer(tiny()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if quant is not None:
        blocks.quantize(model, blocks.FORMATS[quant])
    ids = torch.randint(256, (2, 8))
    with monkeypatch.context() as without:
        without.setattr(gpu, "usable", lambda *tensors: False)
        plain = decode(model, ids)
    request.getfixturevalue("taken")
    called = set()
    for module, name in [(router, "route"), (grouped_gemm, "experts"), (latent_attention, "attend_latent_paged")]:
        monkeypatch.setattr(module, name, _counted(called, name, getattr(module, name)))
    ours = decode(model, ids)
    assert called == {"route", "experts", "attend_latent_paged"}
    assert error(ours, plain) < (1e-5 if quant is None else 3e-2)


def _counted(called, name, function):
    def call(*args, **kwargs):
        called.add(name)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("grouped", [False, True])
def test_fp8_trains_as_its_emulation(grouped, request, monkeypatch):
    """Output and both gradients; a group without rows among them."""
    torch.manual_seed(1)
    counts = [70, 0, 131] if grouped else [201]
    x, weight, grad = torch.randn(201, 150), torch.randn(len(counts), 140, 150), torch.randn(201, 140)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = fp8.grouped_linear(*leaves, counts)
        out.backward(grad)
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    with monkeypatch.context() as without:
        without.setattr(gpu, "usable", lambda *tensors: False)
        emulated = run()
    request.getfixturevalue("taken")
    for ours, theirs in zip(run(), emulated, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) < (2e-6 if tiles.INTERPRETED else 1e-3)


def test_experts_keep_their_gradient(taken):
    """With a gradient to come torch's own operations are taken: the kernels have no backward."""
    x, index, weight, gate_up, down = layer(random.Random(0))
    x.requires_grad_()
    ops.experts(x, index, weight, gate_up, down).sum().backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------------- without Triton, without a GPU


def test_a_missing_triton_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu._has_triton.cache_clear()
    try:
        assert [gpu._has_triton() for _ in range(3)] == [False] * 3
    finally:
        gpu._has_triton.cache_clear()
    assert [record.message for record in caplog.records if "pip install 'minga[gpu]'" in record.message] == [
        "Triton is missing: torch's own operations are used, which are slower. pip install 'minga[gpu]'"
    ]


@pytest.mark.parametrize("double, grad, expected", [(False, False, True), (True, False, False), (False, True, False)])
def test_only_a_gpu_takes_the_kernels_and_only_without_a_gradient(monkeypatch, double, grad, expected):
    class OnGpu(Tensor):
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "_fits", lambda device: True)
    x = torch.zeros(2, dtype=torch.float64 if double else torch.float32, device="cpu").requires_grad_(grad)
    assert not gpu.usable(x)
    assert gpu.usable(x.as_subclass(OnGpu)) == expected
    with torch.no_grad():
        assert gpu.usable(x.as_subclass(OnGpu)) != double


def test_a_cpu_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from minga.config.presets import tiny
from minga.model.transformer import Transformer
model = Transformer(tiny()).init_weights(torch.Generator()).eval()
assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile(capability, tmp_path):
    """To machine code, with Triton's own assembler, for chips that are not here; within the shared memory each has."""
    script = Path(__file__).with_name("compile_gpu.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(script.parents[2])
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    if "no assembler" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 15
