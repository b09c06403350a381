"""pytest tests/kernels/test_gpu.py -- the Triton kernels against their definitions, on a GPU (-m gpu) or interpreted.

Triton's interpreter runs each program in numpy: it proves the arithmetic, the masks and the addresses, not what a compiler
makes of them. That they compile, for which chips and to which instructions, is the last test. Nothing here tests speed.
"""

# ruff: noqa: E402 -- what is imported needs Triton

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is missing: pip install 'minga[gpu]'")

from minga.config.presets import tiny
from minga.kernels import fp8, gpu, ops, reference
from minga.kernels.gpu import latent_attention, quantize, router, tiles
from minga.kernels.gpu.block_gemm import block_gemm
from minga.kernels.gpu.grouped_gemm import experts
from minga.model.cache import Cache
from minga.model.experts import Router
from minga.model.transformer import Transformer
from minga.quant import blocks

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
runs_here = pytest.mark.skipif(
    not ON_GPU and not tiles.INTERPRETED, reason="there is no GPU, and TRITON_INTERPRET is not 1"
)
SEEDS = range(5)


def draw(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def spread(*shape: int) -> Tensor:
    """Numbers over a dozen powers of two, a few zeros among them."""
    x = randn(*shape) * 2.0 ** torch.randint(-9, 4, shape, device=DEVICE)
    return x.masked_fill(torch.rand(shape, device=DEVICE) < 0.02, 0.0)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To within `tolerance` of the largest number."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    atol = tolerance * float(expected.float().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def same_bytes(ours: Tensor, expected: Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.fixture
def as_on_gpu(monkeypatch) -> None:
    """`ops` and the model take the kernels as they would on a GPU, interpreted."""

    def usable(*tensors: Tensor) -> bool:
        grads = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return not grads and all(t.dtype != torch.float64 for t in tensors)

    if not ON_GPU:
        monkeypatch.setattr(gpu, "usable", usable)


@pytest.fixture(params=[True, False], ids=["e4m3", "bytes"])
def multiplies_e4m3(request, monkeypatch) -> None:
    """With and without tensor cores that take E4M3, which GPUs have from 8.9 on."""
    if request.param and ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    monkeypatch.setattr(tiles, "multiplies_e4m3", lambda device: request.param)


# ---------------------------------------------------------------------- quantisers


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (17, 129), (3, 5, 300), (33, 64), (0, 40), (2, 0)])
def test_quantize_fp8_is_the_definition_bit_for_bit(shape, dtype):
    draw(sum(shape))
    x = spread(*shape).to(dtype)
    values, scale = quantize.quantize_fp8(x)
    if x.numel():
        expected, expected_scale = fp8.quantize(x.cpu(), fp8.ALONG_CHANNELS)
        same_bytes(values, expected.to(DEVICE)), same_bytes(scale, expected_scale.to(DEVICE))
    assert values.shape == x.shape and scale.shape == (*shape[:-1], -(-shape[-1] // 128))


@runs_here
def test_quantize_fp8_of_every_bfloat16():
    """Each beside a number that fixes the block's scale: all roundings, subnormal results and saturated scales are there."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    finite = every[every.isfinite()]
    for top in (1.0, 448.0, 1e-38, 3e38):
        inside = finite[finite.abs() <= top]
        x = torch.nn.functional.pad(inside, (0, -len(inside) % 127)).view(-1, 127)
        x = torch.cat([x, torch.full((len(x), 1), top)], 1)
        expected, expected_scale = fp8.quantize(x, fp8.ALONG_CHANNELS)
        values, scale = quantize.quantize_fp8(x.to(DEVICE))
        same_bytes(values, expected.to(DEVICE)), same_bytes(scale, expected_scale.to(DEVICE))


@runs_here
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (17, 129), (3, 5, 70), (0, 40)])
def test_quantize_int8_is_the_definition_bit_for_bit(shape, block):
    draw(sum(shape))
    x = spread(*shape)
    values, scale = quantize.quantize_int8(x, block)
    expected, expected_scale = reference.round_activations(x, block)
    assert values.dtype == torch.int8 and torch.equal(values, expected) and torch.equal(scale, expected_scale)


@runs_here
def test_quantize_int8_rounds_once():
    """Numbers halfway between two steps, up to the last bit: any other way to divide or multiply gives others."""
    draw(0)
    top = torch.rand(500, 1, device=DEVICE) + 0.5
    x = torch.cat([(torch.randint(-126, 126, (500, 63), device=DEVICE) + 0.5) * (top / 127), top], 1)
    values, scale = quantize.quantize_int8(x, 64)
    expected, expected_scale = reference.round_activations(x, 64)
    assert torch.equal(values, expected) and torch.equal(scale, expected_scale)


@runs_here
@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
def test_a_lost_number_spoils_its_block_and_no_other(lost):
    x = randn(3, 300)
    x[1, 130] = lost
    eight, scale = quantize.quantize_fp8(x)
    spoiled = fp8.dequantize(eight, scale, fp8.ALONG_CHANNELS).isnan()
    assert spoiled[1, 128:256].all() and spoiled.sum() == 128
    whole, whole_scale = quantize.quantize_int8(x, 64)
    assert whole_scale.isnan().nonzero().tolist() == [[1, 2]] and (whole[1, 128:192] == 0).all()


# ---------------------------------------------------------------------- products


@runs_here
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows", [128, 1])
def test_block_gemm_of_e4m3(multiplies_e4m3, rows, seed):
    rng = draw(seed)
    M, N, K = rng.choice((1, 7, 70)), rng.randint(1, 200), rng.randint(1, 300)
    x, x_scale = fp8.quantize(spread(M, K), fp8.ALONG_CHANNELS)
    weight, scale = fp8.quantize(spread(N, K), fp8.WEIGHT if rows == 128 else fp8.ALONG_CHANNELS)
    ours = block_gemm(x, x_scale, weight, scale, block=128, rows=rows)
    close(ours, reference.block_gemm(x, x_scale, weight, scale, block=128, rows=rows), 1e-5 if not ON_GPU else 1e-3)


@runs_here
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", [32, 64])
def test_linear_int8(as_on_gpu, block, seed):
    rng = draw(seed)
    lead, N, K = rng.choice(((1,), (3, 5), (70,), (0,))), rng.randint(1, 200), rng.randint(1, 200)
    x, weight = spread(*lead, K), reference.quantize_int8(spread(N, K), block)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        expected = reference.linear_int8(x.to(dtype), *weight, block)
        close(ops.linear_int8(x.to(dtype), *weight, block), expected, tolerance)


@runs_here
def test_fp8_linear_and_its_gradients(as_on_gpu, monkeypatch):
    """All three products of a training step. The kernels add in another order; what they add is the same, bit for bit."""
    draw(0)
    x_NI, weight_EOI, grad_NO = spread(45, 200), spread(3, 150, 200), spread(45, 150)
    counts = [17, 0, 28]

    def run() -> list[Tensor]:
        x, weight = x_NI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
        y = fp8.grouped_linear(x, weight, counts)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad_NO)]

    ours = run()
    monkeypatch.setattr(gpu, "usable", lambda *tensors: False)
    for kernel, emulated in zip(ours, run(), strict=True):
        close(kernel, emulated, 1e-5 if not ON_GPU else 1e-3)


# ---------------------------------------------------------------------- experts


def routed(rng: random.Random, N: int, E: int, A: int) -> tuple[Tensor, Tensor]:
    """Different experts for each token, of half of them, so that many have no token."""
    busy = max(A, E // 2)
    index_NA = torch.stack([torch.randperm(busy)[:A] for _ in range(N)]) + rng.randint(0, E - busy)
    return index_NA.to(DEVICE), torch.rand(N, A, device=DEVICE)


SIZES = [(1, 2, 1), (1, 60, 6), (2, 2, 2), (11, 60, 3), (150, 2, 1), (40, 5, 2)]  # tokens, experts, active


@runs_here
@pytest.mark.parametrize("N, E, A", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(N, E, A, dtype):
    rng = draw(N + E)
    D, F = rng.randint(1, 90), rng.randint(1, 90)
    x, gate_up, down = randn(N, D, dtype=dtype), randn(E, 2 * F, D, dtype=dtype), randn(E, D, F, dtype=dtype)
    index, weight = routed(rng, N, E, A)
    ours = experts(x, index, weight, gate_up, down)
    assert ours.dtype == dtype
    exact = reference.experts(x.double(), index, weight.double(), gate_up.double(), down.double())
    close(ours.float(), exact.float(), 1e-5 if dtype == torch.float32 else 2e-2)


@runs_here
def test_experts_of_no_tokens():
    index = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    assert experts(randn(0, 8), index, randn(0, 2), randn(3, 10, 8), randn(3, 8, 5)).shape == (0, 8)


@runs_here
@pytest.mark.parametrize("N, E, A", SIZES)
def test_experts_fp8(as_on_gpu, multiplies_e4m3, monkeypatch, N, E, A):
    rng = draw(N + E)
    D, F = rng.randint(1, 200), rng.randint(1, 100)
    x, gate_up, down = randn(N, D), randn(E, 2 * F, D), randn(E, D, F)
    index, weight = routed(rng, N, E, A)
    ours = ops.experts(x, index, weight, gate_up, down, precision="fp8")
    monkeypatch.setattr(gpu, "usable", lambda *tensors: False)
    # a hidden number at the border of two E4M3 values may fall to either side
    close(ours, ops.experts(x, index, weight, gate_up, down, precision="fp8"), 5e-3)


@runs_here
@pytest.mark.parametrize("N, E, A", SIZES)
@pytest.mark.parametrize("block", [32, 64])
def test_experts_int8(as_on_gpu, N, E, A, block):
    rng = draw(N + E)
    D, F = rng.randint(1, 120), rng.randint(1, 60)
    gate_up, down = (reference.quantize_int8(randn(*shape), block) for shape in ((E, 2 * F, D), (E, D, F)))
    index, weight = routed(rng, N, E, A)
    x = randn(N, D)
    ours = ops.experts_int8(x, index, weight, gate_up, down, block=block)
    # as above: one step of int8 is at most 1/127 of a block's largest number
    close(ours, reference.experts_int8(x, index, weight, gate_up, down, block=block), 5e-3)


# ---------------------------------------------------------------------- router

ROUTERS: dict[str, dict[str, Any]] = {
    "v3": {"n_routed_experts": 64, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
    "v3, one group": {"n_routed_experts": 60, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 5},
    "v3, odd groups": {"n_routed_experts": 60, "n_group": 5, "topk_group": 2, "num_experts_per_tok": 3},
    "v2": {"n_routed_experts": 60, "n_group": 6, "topk_group": 2, "num_experts_per_tok": 6},
    "v2, greedy": {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
    "softmax, normalised": {"n_routed_experts": 12, "n_group": 3, "topk_group": 3, "num_experts_per_tok": 2},
}
V2 = {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "scoring_func": "softmax"}


@runs_here
@pytest.mark.parametrize("N", [1, 13, 0])
@pytest.mark.parametrize("name", ROUTERS)
def test_router(as_on_gpu, monkeypatch, name, N):
    draw(N)
    method = V2 | ({"topk_method": "greedy"} if "greedy" in name else {}) if "v2" in name else {}
    if "softmax" in name:
        method = {"scoring_func": "softmax"}
    module = Router(tiny().replace(routed_scaling_factor=2.5, **ROUTERS[name], **method)).to(DEVICE).eval()
    module.weight.data.normal_()
    if module.e_score_correction_bias is not None:
        module.e_score_correction_bias.normal_(0.0, 0.3)  # choices that the scores alone would not make, some negative
    x = randn(N, tiny().hidden_size) / 4
    calls = []
    monkeypatch.setattr(router, "route", lambda *a, route=router.route, **k: calls.append(1) or route(*a, **k))
    with torch.no_grad():
        index, weight, score = module(x)
    monkeypatch.setattr(gpu, "usable", lambda *tensors: False)
    expected, expected_weight, expected_score = module(x)
    assert calls == [1]
    close(score, expected_score.detach())
    order, expected_order = index.argsort(-1), expected.argsort(-1)
    assert index.dtype == torch.int64 and torch.equal(index.gather(1, order), expected.gather(1, expected_order))
    close(weight.gather(1, order), expected_weight.detach().gather(1, expected_order))


@runs_here
def test_route_takes_the_first_of_equals_and_passes_nan_on():
    logits = torch.zeros(2, 8, device=DEVICE)
    logits[1, 5] = float("nan")
    kind = {"num_groups": 1, "groups_kept": 1, "group_top": 1, "normalize": False, "scale": 1.0}
    index, weight, score = router.route(logits, None, num_active=3, sigmoid=True, **kind)
    assert index[0].tolist() == [0, 1, 2] and (weight[0] == 0.5).all()
    assert index[1].tolist() == [5, 0, 1] and weight[1, 0].isnan() and score[1, 5].isnan()


# ---------------------------------------------------------------------- attention


@runs_here
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_parts", [None, 1, 3, 8])
def test_attend_latent_paged(seed, num_parts):
    """Sequences of different lengths over shuffled pages, which hold NaN wherever no query may look."""
    rng = draw(seed)
    B, T, H, C, R = (rng.randint(1, n) for n in (4, 4, 9, 70, 20))
    P, L = rng.choice((1, 7, 64)), rng.randint(1, 3)
    L = max(L, -(-T // P))
    table = torch.randperm(2 * B * L)[: B * L].view(B, L).to(DEVICE)
    last = torch.tensor([rng.randint(T - 1, L * P - 1) for _ in range(B)])
    last[0] = T - 1 if seed else L * P - 1
    positions = (last[:, None] + torch.arange(1 - T, 1)).to(DEVICE)
    pages = torch.full((2 * B * L, P, C + R), float("nan"), device=DEVICE)
    for sequence in range(B):
        row = torch.arange(int(last[sequence]) + 1, device=DEVICE)
        pages[table[sequence, row // P], row % P] = randn(len(row), C + R)
    q_latent, q_rope = randn(B, T, H, C), randn(B, T, H, R)
    ours = latent_attention.attend_latent_paged(
        q_latent, q_rope, pages, table, positions, scale=0.2, num_parts=num_parts
    )
    expected = reference.attend_latent_paged(q_latent, q_rope, pages.nan_to_num(), table, positions, scale=0.2)
    close(ours, expected)


@runs_here
def test_attend_latent_paged_in_bfloat16_with_large_scores():
    draw(3)
    B, T, H, C, R, P, L = 2, 2, 3, 64, 16, 64, 2
    pages, table = randn(B * L, P, C + R, dtype=torch.bfloat16), torch.randperm(B * L).view(B, L).to(DEVICE)
    q_latent, q_rope = 5 * randn(B, T, H, C, dtype=torch.bfloat16), 5 * randn(B, T, H, R, dtype=torch.bfloat16)
    positions = torch.tensor([[126, 127], [69, 70]], device=DEVICE)
    ours = latent_attention.attend_latent_paged(q_latent, q_rope, pages, table, positions, scale=1.0, num_parts=3)
    wide = (t.double() for t in (q_latent, q_rope, pages))
    close(ours.float(), reference.attend_latent_paged(*wide, table, positions, scale=1.0).float(), 2e-2)


# ---------------------------------------------------------------------- in the model


@runs_here
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_model_decodes_with_the_kernels(as_on_gpu, monkeypatch, format):
    """Two sequences, the second one after 60 rows of zeros, some tokens and then one: its pages change in between."""
    config = tiny().replace(initializer_range=0.2, num_hidden_layers=2, num_nextn_predict_layers=0)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(1)).to(DEVICE).eval().requires_grad_(False)
    if format:
        blocks.quantize(model, blocks.FORMATS[format])
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    called: set[str] = set()
    for name in ("attend_latent_paged", "route", "experts", "experts_int8", "linear_int8"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **k: called.add(name) or op(*a, **k))

    def decode() -> Tensor:
        cache = Cache.of(config, 2, 100, dtype=torch.float32, device=DEVICE)
        cache.table_BP = cache.table_BP.flip(0, 1)
        start, outputs = torch.tensor([[0], [60]], device=DEVICE), []
        for part in ids.split([6, 1], 1):
            positions = start + torch.arange(part.shape[1], device=DEVICE)
            outputs.append(model(part, cache=cache, positions_BT=positions).logits)
            start = start + part.shape[1]
        return torch.cat(outputs, 1)

    ours = decode()
    assert called == {"attend_latent_paged", "route"} | ({"experts_int8", "linear_int8"} if format else {"experts"})
    if format:  # the plain path does not round activations: the definition does
        monkeypatch.setattr(ops, "linear_int8", reference.linear_int8)
        monkeypatch.setattr(ops, "experts_int8", reference.experts_int8)
        monkeypatch.setattr(ops, "route", reference.route)
        monkeypatch.setattr(ops, "attend_latent_paged", reference.attend_latent_paged)
    else:
        monkeypatch.setattr(gpu, "usable", lambda *tensors: False)
    close(ours, decode(), 2e-2 if format else 1e-4)


@pytest.mark.parametrize("double, grad, expected", [(False, False, True), (True, False, False), (False, True, False)])
def test_only_a_gpu_without_gradients_takes_the_kernels(monkeypatch, double, grad, expected):
    class OnGpu(Tensor):
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "_fits", lambda device: True)
    x = torch.zeros(2, dtype=torch.float64 if double else torch.float32).requires_grad_(grad)
    assert gpu.usable(x.as_subclass(OnGpu)) == expected
    assert not gpu.usable(x)
    with torch.no_grad():
        assert gpu.usable(x.as_subclass(OnGpu)) != double


def test_a_cpu_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # not to be imported
import torch
from minga.config.presets import tiny
from minga.model.transformer import Transformer
model = Transformer(tiny()).init_weights(torch.Generator()).eval()
assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---------------------------------------------------------------------- compiled


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.slow
def test_every_kernel_compiles_without_a_gpu(capability, tmp_path):
    """As the wrappers launch them, to machine code; E4M3 goes to the tensor cores where they take it, from 8.9 on."""
    try:
        triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell, triton.knobs.nvidia.cuobjdump  # noqa: B018
    except RuntimeError as missing:
        pytest.skip(f"this Triton comes without NVIDIA's tools: {missing}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("compile_gpu.py")), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert {kernel["name"] for kernel in kernels} == {
        *("_quantize", "_block_gemm", "_gate_up", "_down", "_route", "_partial", "_combine")
    }
    kinds = {"fp8": {80: "f16", 90: "e4m3", 100: "f8f6f4"}[capability], "int8": "s8", "bfloat16": "f16"}
    for kernel in kernels:
        assert kernel["machine_code"] > 0 and kernel["stack"] <= 128, kernel  # bytes: more is spilled registers
        if kernel["name"] in ("_block_gemm", "_gate_up", "_down", "_partial"):
            kind = kinds.get(kernel["label"])
            assert kind is None or any(kind in instruction for instruction in kernel["tensor_cores"]), kernel
