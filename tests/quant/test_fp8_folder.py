"""Folders in DeepSeek-V3's block FP8: written, read as they are, and widened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minga
from minga import store
from minga.config.presets import tiny
from minga.kernels import fp8 as kernels
from minga.model.transformer import Transformer
from minga.quant import blocks, fp8

IDS_BT = torch.arange(12)[None]


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny().replace(initializer_range=0.1)).init_weights().eval()


def test_written_as_it_computes(model: Transformer, tmp_path: Path) -> None:
    whole = {name: weight.clone() for name, weight in model.state_dict().items()}
    fp8.quantize(model)
    minga.save(model, tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored[f"{name}_scale_inv"].dtype == torch.float32
    hidden = model.config.moe_intermediate_size
    up = whole["model.layers.1.mlp.experts.gate_up_proj"][3, hidden:]
    wide = kernels.dequantize(stored[name], stored[f"{name}_scale_inv"], (128, 128))
    assert (wide - up).abs().max() <= up.abs().max() / 16
    assert stored["lm_head.weight"].dtype == stored["model.norm.weight"].dtype == torch.bfloat16
    described = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["weight_block_size"]) == ("fp8", [128, 128])
    kept, widened = minga.load(tmp_path / "m", quant="fp8"), minga.load(tmp_path / "m")
    assert torch.equal(kept(IDS_BT).logits, model(IDS_BT).logits)
    torch.testing.assert_close(widened(IDS_BT).logits, model(IDS_BT).logits, atol=1e-5, rtol=1e-5)
    assert not blocks.formats_of(widened)
    minga.save(kept, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[n].view(torch.uint8), t.view(torch.uint8)) for n, t in stored.items() if t.numel())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_that_cut_a_matrix_anywhere(model: Transformer, tmp_path: Path, power_of_two: bool) -> None:
    """Rows of an expert's gate that its blocks do not divide: the up projection's begin anew."""
    fp8.quantize(model, fp8.BlockFP8(rows=24, block=40, power_of_two=power_of_two))
    minga.save(model, tmp_path / "m")
    kept = store.load_stored(tmp_path / "m", quant="fp8")
    assert {format.describe().get("scale_fmt") for format in blocks.formats_of(kept)} == {
        "ue8m0" if power_of_two else None
    }
    assert torch.equal(kept(IDS_BT).logits, model(IDS_BT).logits)
    torch.testing.assert_close(minga.load(tmp_path / "m")(IDS_BT).logits, model(IDS_BT).logits, atol=1e-5, rtol=1e-5)


def test_a_float_model_is_held_in_fp8(model: Transformer, tmp_path: Path) -> None:
    minga.save(model, tmp_path / "m")
    held = store.load_stored(tmp_path / "m", quant="fp8")
    assert torch.equal(held(IDS_BT).logits, fp8.quantize(model)(IDS_BT).logits)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_transformers_expects_the_same_tensors(tmp_path: Path, power_of_two: bool) -> None:
    """Names, shapes and types of its FP8 linear layers are those of our file, cut blocks included."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    model = Transformer(tiny().replace(hidden_size=160, intermediate_size=300, kv_lora_rank=136)).init_weights()
    minga.save(fp8.quantize(model, fp8.BlockFP8(power_of_two=power_of_two)), tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    described = FineGrainedFP8Config.from_dict(config.quantization_config)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        replace_with_fp8_linear(theirs, ["lm_head"], described, pre_quantized=True)
    expected = {
        f"{name}.{part}": (tensor.shape, tensor.dtype)
        for name, module in theirs.named_modules()
        if isinstance(module, FP8Linear)
        for part, tensor in module.named_parameters()
    }
    stored = load_file(tmp_path / "m" / "model.safetensors")
    ours = {
        name: (tensor.shape, tensor.dtype)
        for name, tensor in stored.items()
        if name.removesuffix(fp8.SCALE) + fp8.SCALE in stored and ".experts." not in name
        if not name.startswith(f"model.layers.{model.config.num_hidden_layers}.")  # MTP, which it does not have
    }
    assert ours == expected


@pytest.mark.peer
@pytest.mark.parametrize("power_of_two", [False, True])
def test_transformers_computes_the_same(tmp_path: Path, power_of_two: bool) -> None:
    """On a CPU it widens to bfloat16, of matrices that whole blocks make up."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sides = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 128}
    heads = {"q_lora_rank": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 128, "v_head_dim": 128}
    torch.manual_seed(0)
    config = tiny().replace(initializer_range=0.1, num_nextn_predict_layers=0, **sides, **heads)
    minga.save(fp8.quantize(Transformer(config).init_weights(), fp8.BlockFP8(power_of_two=power_of_two)), tmp_path)
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    widened = store.load(tmp_path, dtype=torch.bfloat16).float()
    torch.testing.assert_close(theirs.float()(IDS_BT).logits, widened(IDS_BT).logits, atol=1e-4, rtol=1e-4)
