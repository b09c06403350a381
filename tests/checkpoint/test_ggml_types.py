"""Every number format of GGUF against values that the `gguf` package gave, and against the package itself."""

from __future__ import annotations

import pytest
import torch

from minga.checkpoint.ggml_types import OTHER_NAMES, TYPES, dequantise

BY_NAME = {kind.name: kind for kind in TYPES.values()}

# type: where the float16 scales stand and what they are; numbers 0, 1, N/2 - 1, N/2 and the last; their sum; and their
# sum weighted by position. All of it from gguf 0.19.0.
GOLDEN = {
    "Q4_0": ({0: 0.25}, [0.0, 0.25, -1.5, -0.25, 0.75], -15.25, -241.0),
    "Q4_1": ({0: 0.25, 2: -3.0}, [-2.75, -2.25, -1.25, -0.75, -1.0], -49.25, -738.25),
    "Q5_0": ({0: 0.125}, [-1.25, -2.0, -1.875, 0.0, -0.375], -13.625, -260.5),
    "Q5_1": ({0: 0.5, 2: 1.75}, [12.25, 7.25, 8.75, 5.75, 3.25], 236.0, 3447.5),
    "Q8_0": ({0: -0.0625}, [-7.5, -5.5625, 4.875, -6.0, -7.0], -24.25, -504.75),
    "Q4_K": ({0: 0.03125, 2: 0.015625}, [6.828125, 0.984375, 14.875, 16.078125, 4.90625], 922.0625, 125769.3125),
    "Q5_K": (
        {0: 0.0078125, 2: 0.25},
        [2.6015625, 0.609375, -1.25, 0.0390625, 2.8515625],
        -1236.8359375,
        -121226.5078125,
    ),
    "Q6_K": (
        {208: -0.001953125},
        [0.451171875, 4.2109375, -3.9375, -0.345703125, 0.099609375],
        27.9921875,
        2213.01953125,
    ),
}


def block(kind: str, halves: dict[int, float]) -> torch.Tensor:
    raw = torch.tensor(
        [(i * 167 + (i**3 >> 3) * 29 + 13) % 256 for i in range(BY_NAME[kind].num_bytes)], dtype=torch.uint8
    )
    for at, value in halves.items():
        raw[at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    return raw


@pytest.mark.parametrize("kind", GOLDEN)
def test_one_block(kind):
    halves, picked, total, weighted = GOLDEN[kind]
    out = dequantise(block(kind, halves), BY_NAME[kind])
    N = BY_NAME[kind].numbers
    assert out.dtype == torch.float32 and out.shape == (N,)
    assert out[[0, 1, N // 2 - 1, N // 2, N - 1]].tolist() == picked
    assert out.double().sum().item() == total
    assert (out.double() * torch.arange(N)).sum().item() == weighted


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_numbers(kind, dtype):
    numbers = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(dequantise(numbers.view(torch.uint8), BY_NAME[kind]), numbers.float())


@pytest.mark.parametrize("kind", BY_NAME)
def test_many_blocks_are_the_blocks_one_by_one(kind):
    """Work goes in chunks; no chunk's end may show."""
    halves = GOLDEN[kind][0] if kind in GOLDEN else {}
    one = block(kind, halves)
    count = (1 << 17) // BY_NAME[kind].numbers + 3
    many = dequantise(one.repeat(count), BY_NAME[kind]).view(count, -1)
    assert torch.equal(many, dequantise(one, BY_NAME[kind]).expand_as(many))


def test_no_blocks():
    assert dequantise(torch.empty(0, dtype=torch.uint8), BY_NAME["Q4_K"]).shape == (0,)


@pytest.mark.peer
@pytest.mark.parametrize("kind", BY_NAME)
def test_equal_to_the_gguf_package(kind):
    gguf = pytest.importorskip("gguf")
    ours = BY_NAME[kind]
    raw = torch.randint(0, 256, (200, ours.num_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for at in GOLDEN[kind][0] if kind in GOLDEN else ():
        raw[:, at + 1] &= 0x3F  # finite scales
    theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    actual = dequantise(raw.flatten(), ours).view(200, -1)
    torch.testing.assert_close(actual, torch.from_numpy(theirs).view(200, -1), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_the_table_is_ggml_s():
    gguf = pytest.importorskip("gguf", reason="the peer that knows the numbers")
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType[kind.name]
        assert number == theirs
        assert (kind.numbers, kind.num_bytes) == gguf.GGML_QUANT_SIZES[theirs]
    assert all(gguf.GGMLQuantizationType(number).name == name for number, name in OTHER_NAMES.items())
