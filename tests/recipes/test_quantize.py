"""int4 weights calibrated on text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minga
from minga.config import ModelConfig
from minga.config.presets import tiny
from minga.data.packing import Batch
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.quant import blocks
from minga.recipes import quantize
from minga.recipes.evaluate import compare

MLA = tiny().replace(initializer_range=0.15)
QUERIES_LOW_RANK = MLA.replace(q_lora_rank=24)
GQA = ModelConfig.from_hf(
    {
        "model_type": "qwen2", "vocab_size": 256, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "tie_word_embeddings": True,
    }
)  # fmt: skip


def batches(model: Transformer, seed: int, rows: int = 4, length: int = 96) -> list[Batch]:
    """Random text of few tokens that are far from equally likely, so that what layers are given is correlated."""
    draw, extra = torch.Generator().manual_seed(seed), len(model.mtp)
    odds = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(9)) ** 8
    found = []
    for _ in range(3):
        ids_BL = torch.multinomial(odds, rows * (length + 1 + extra), True, generator=draw).view(rows, -1)
        targets_KBT = torch.stack([ids_BL[:, k + 1 : k + 1 + length] for k in range(1 + extra)])
        found.append(Batch(ids_BL[:, :length], targets_KBT, None, None, rows * length))
    return found


@pytest.fixture
def make():
    def make(config: ModelConfig) -> Transformer:
        model = Transformer(config).eval()
        return model.init_weights(torch.Generator().manual_seed(0))

    return make


@pytest.mark.parametrize("config", [MLA, QUERIES_LOW_RANK, GQA], ids=["mla", "mla-low-rank", "gqa-tied"])
def test_calibrated_is_nearer_to_the_float_model(make, config: ModelConfig, tmp_path: Path) -> None:
    whole, nearest, calibrated = make(config), make(config), make(config)
    blocks.quantize(nearest, quantize.FORMAT)
    report = quantize.calibrate_int4(calibrated, batches(whole, 0))
    assert {name: t.shape for name, t in calibrated.state_dict().items()} == {
        name: t.shape for name, t in nearest.state_dict().items()
    }
    assert report.tokens == 3 * 4 * 96
    held_out = batches(whole, 1)
    before, after = (compare(whole, model, held_out) for model in (nearest, calibrated))
    assert 0 < after.kl < 0.9 * before.kl
    minga.save(calibrated, tmp_path / "m")
    again = minga.load(tmp_path / "m", quant="int4")
    ids_BT = held_out[0].ids_BT
    torch.testing.assert_close(again(ids_BT).logits, calibrated(ids_BT).logits)


def test_the_mtp_module_is_calibrated_too(make) -> None:
    whole, nearest, calibrated = make(MLA), make(MLA), make(MLA)
    blocks.quantize(nearest, quantize.FORMAT)
    quantize.calibrate_int4(calibrated, batches(whole, 0))
    batch = batches(whole, 1)[0]
    hidden = whole.hidden(batch.ids_BT)  # the same for all three
    want, plain, ours = (each.mtp_hidden(0, batch.targets_KBT[0], hidden) for each in (whole, nearest, calibrated))
    assert (ours - want).square().mean() < 0.9 * (plain - want).square().mean()


def test_an_expert_with_too_few_tokens_is_rounded_to_nearest(make) -> None:
    nearest, calibrated = make(MLA), make(MLA)
    moe = calibrated.moe_layers()[0]
    moe.gate.e_score_correction_bias[1] = -10.0  # never chosen
    blocks.quantize(nearest, quantize.FORMAT)
    report = quantize.calibrate_int4(calibrated, batches(nearest, 0))
    assert 0 < report.calibrated < report.experts
    plain, ours = (model.moe_layers()[0].experts for model in (nearest, calibrated))
    assert torch.equal(plain.gate_up_proj[1], ours.gate_up_proj[1])
    assert torch.equal(plain.down_proj_scale[1], ours.down_proj_scale[1])
    assert not torch.equal(plain.gate_up_proj[0], ours.gate_up_proj[0])


def test_a_model_that_gives_no_numbers_is_refused(make) -> None:
    broken = make(GQA)
    broken.model.layers[0].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="infinities or NaN"):
        quantize.calibrate_int4(broken, batches(broken, 0))


def test_two_models_compared(make) -> None:
    model, other = make(GQA), make(GQA)
    other.model.norm.weight.data *= 1.5
    text = batches(model, 1)
    same, apart = compare(model, model, text), compare(model, other, text)
    assert (same.kl, same.top1, same.bits_per_byte) == (0.0, 1.0, same.bits_per_byte_reference)
    logits, scaled = (
        torch.cat([each(batch.ids_BT).logits.detach() for batch in text]).double() for each in (model, other)
    )
    p, q = logits.log_softmax(-1), scaled.log_softmax(-1)
    assert apart.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert apart.bits_per_byte_reference == same.bits_per_byte_reference != apart.bits_per_byte
