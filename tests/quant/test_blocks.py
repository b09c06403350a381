from __future__ import annotations

import pytest
import torch
from torch import nn

from minga.config.presets import tiny
from minga.model.cache import Cache
from minga.model.transformer import Transformer
from minga.quant import blocks

INT8 = blocks.FORMATS["int8"]


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    torch.manual_seed(0)
    config = tiny().replace(initializer_range=0.1)
    plain = Transformer(config).init_weights().eval()
    quantized = Transformer(config).eval()
    quantized.load_state_dict(plain.state_dict())
    blocks.quantize(quantized, INT8)
    return plain, quantized


def test_nothing_large_stays_in_float(models: tuple[Transformer, Transformer]) -> None:
    _, quantized = models
    floats = [name for name, t in quantized.state_dict().items() if t.is_floating_point() and t.ndim >= 2]
    assert all(name.endswith(("_scale", "gate.weight")) for name in floats)
    kinds = {type(m) for m in quantized.modules()}
    assert {blocks.QuantLinear, blocks.QuantEmbedding, blocks.QuantExperts} <= kinds
    assert not {nn.Linear, nn.Embedding} & kinds


def test_logits_equal_those_of_the_rounded_weights(models: tuple[Transformer, Transformer]) -> None:
    """Computing from 8-bit storage is computing with weights rounded to 8 bits, no more and no less."""
    plain, quantized = models
    rounded = Transformer(plain.config).eval()
    state = {}
    for name, value in plain.state_dict().items():
        stored = quantized.state_dict()[name]
        if stored.dtype == torch.int8:
            scale = quantized.state_dict()[name + "_scale"]
            columns = value.shape[-1]
            wide = scale.float().repeat_interleave(INT8.block, -1)[..., :columns]
            value = stored.float() * wide
        state[name] = value
    rounded.load_state_dict(state)
    ids = torch.randint(0, 256, (2, 20))
    torch.testing.assert_close(quantized(ids).logits, rounded(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(quantized(ids).logits, plain(ids).logits)


def test_cached_decode_in_int8_equals_the_full_forward(models: tuple[Transformer, Transformer]) -> None:
    """Runs the absorbed form, which reads the up-projection from its 8-bit storage."""
    _, quantized = models
    ids = torch.randint(0, 256, (1, 12))
    cache = Cache.of(quantized.config, 1, 12, dtype=torch.float32)
    steps = [quantized(ids[:, t : t + 1], cache=cache, positions_BT=torch.tensor([[t]])).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), quantized(ids).logits, atol=1e-4, rtol=1e-4)


def test_memory_is_about_a_quarter(models: tuple[Transformer, Transformer]) -> None:
    big = nn.Sequential(nn.Embedding(512, 256), nn.Linear(256, 512))
    before = sum(t.numel() * 4 for t in big.state_dict().values())
    blocks.quantize(big, INT8)
    after = sum(t.nbytes for t in big.state_dict().values())
    assert after / before < 0.27
