from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minga
from minga import store
from minga.checkpoint.durable import verify_folder
from minga.checkpoint.ggml_types import TYPES, dequantise, keep
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.errors import UserError
from minga.model.transformer import Transformer
from minga.quant import blocks


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny().replace(initializer_range=0.1)).init_weights().eval()
    model.moe_layers()[0].gate.e_score_correction_bias += torch.randn(8)
    return model


def test_save_and_load_change_no_bit(model: Transformer, tmp_path: Path) -> None:
    minga.save(model, tmp_path / "m")
    again = minga.load(tmp_path / "m")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not again.training


def test_float64_models_answer_in_float64(model: Transformer, tmp_path: Path) -> None:
    minga.save(model, tmp_path / "m")
    wide = store.load(tmp_path / "m", dtype=torch.float64)
    logits = wide(torch.arange(5)[None]).logits
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), model(torch.arange(5)[None]).logits, atol=1e-4, rtol=1e-4)
    assert wide.moe_layers()[0].gate.e_score_correction_bias.dtype == torch.float32


def test_int8_folder_loads_without_quantising_again(model: Transformer, tmp_path: Path) -> None:
    minga.save(model, tmp_path / "m")
    quantized = minga.load(tmp_path / "m", quant="int8")
    minga.save(quantized, tmp_path / "q")
    again = minga.load(tmp_path / "q")
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.3.gate_proj.weight"].dtype == torch.int8
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "minga-int8"


def test_int4_folder_and_what_it_is_not(model: Transformer, tmp_path: Path) -> None:
    minga.save(minga.load(_saved(model, tmp_path / "m"), quant="int4"), tmp_path / "q")
    again = minga.load(tmp_path / "q", quant="int4")
    stored = load_file(tmp_path / "q" / "model.safetensors")["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert stored.dtype == torch.uint8 and stored.shape[-1] == model.config.hidden_size // 2
    ids_BT = torch.arange(6)[None]
    torch.testing.assert_close(again(ids_BT).logits, minga.load(tmp_path / "m", quant="int4")(ids_BT).logits)
    with pytest.raises(UserError, match="the weights are stored in int4, not int8"):
        minga.load(tmp_path / "q", quant="int8")
    with pytest.raises(UserError, match="quant 'int5' is not known"):
        minga.load(tmp_path / "q", quant="int5")


def test_half_width_floats_stay_in_memory_for_generation(model: Transformer, tmp_path: Path) -> None:
    minga.save(copy.deepcopy(model).bfloat16(), tmp_path / "m")
    kept, wide = store.load_stored(tmp_path / "m"), minga.load(tmp_path / "m")
    assert {p.dtype for p in kept.parameters()} == {torch.float32} == {p.dtype for p in wide.parameters()}
    assert {format.name for format in blocks.formats_of(kept)} == {"bfloat16"} and not blocks.formats_of(wide)
    ids_BT = torch.arange(6)[None]
    torch.testing.assert_close(kept(ids_BT).logits, wide(ids_BT).logits)
    assert blocks.formats_of(store.load_stored(tmp_path / "m", quant="int8")) == [blocks.FORMATS["int8"]]
    minga.save(kept, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(minga.load(tmp_path / "again")(ids_BT).logits, wide(ids_BT).logits)


def test_what_is_stored_in_a_type_of_gguf_is_saved_as_floats(model: Transformer, tmp_path: Path, random_blocks) -> None:
    raw, kind = random_blocks("Q4_1", 256 * 64), next(kind for kind in TYPES.values() if kind.name == "Q4_1")
    mixed = copy.deepcopy(model)
    blocks.put(mixed, {"lm_head.weight": keep(raw, kind, (256, 64))})
    assert mixed.lm_head.get_buffer("weight").dtype == torch.uint8
    for _ in range(2):
        minga.save(mixed, tmp_path / "m")
        again = minga.load(tmp_path / "m")
        assert torch.equal(again.lm_head.weight, dequantise(raw, kind).view(256, 64))
        mixed.lm_head.to_panels()


def _saved(model: Transformer, folder: Path) -> Path:
    minga.save(model, folder)
    return folder


@pytest.mark.parametrize("promise", [None, {"quant_method": "minga-int4"}])
def test_int8_folder_whose_config_says_otherwise(
    model: Transformer, tmp_path: Path, promise: dict[str, str] | None
) -> None:
    minga.save(minga.load(_saved(model, tmp_path / "m"), quant="int8"), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": promise}))
    with pytest.raises(UserError, match=r"is not stored as quantization_config says"):
        minga.load(tmp_path / "q")
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is not stored as quantization_config says"):
        minga.load(tmp_path / "m")


@pytest.mark.parametrize("value", [["fp8"], "fp8", 3])
def test_a_quantization_config_that_is_no_object(model: Transformer, tmp_path: Path, value: object) -> None:
    minga.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    with pytest.raises(UserError, match=r"quantization_config is .* must be an object or null"):
        minga.load(tmp_path / "m")


def test_a_promise_of_mtp_without_tensors_is_not_believed(model: Transformer, tmp_path: Path) -> None:
    """transformers drops the MTP tensors on save and leaves num_nextn_predict_layers in config.json."""
    minga.save(model, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.3." not in k}, tmp_path / "m" / "model.safetensors")
    assert minga.load(tmp_path / "m").config.num_nextn_predict_layers == 0


def test_mistakes_are_one_line_that_names_the_place(model: Transformer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    minga.save(model, tmp_path / "m", tokenizer=train_bpe(["ab cd " * 50], 262))
    cases = {"nothing": "nothing at this path", "empty": "neither a config.json", "text.txt": "folder or a .gguf"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            minga.load(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="262 tokens and the model 256"):
        store.load_tokenizer(tmp_path / "m")
    with pytest.raises(UserError, match="int8"):
        minga.load(tmp_path / "m", quant="int3")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match="awq"):
        minga.load(tmp_path / "m")


def test_loading_leaves_the_random_state_alone(model: Transformer, tmp_path: Path) -> None:
    minga.save(model, tmp_path / "m")
    before = torch.get_rng_state()
    minga.load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_during_a_save_at_50_random_moments_leaves_a_whole_model(model: Transformer, tmp_path: Path) -> None:
    """A child saves over and over, with weights that say which save they are of; it is killed at random."""
    folder = tmp_path / "m"
    minga.save(model, folder)
    rng = random.Random(0)
    for _ in range(50):
        child = os.fork()
        if child == 0:
            mine = Transformer(model.config)
            for number in count():
                with torch.no_grad():
                    for p in mine.parameters():
                        p.fill_(number)
                minga.save(mine, folder)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = [p.detach() for p in minga.load(folder).parameters()]
        verify_folder(folder)
        first = values[0].flatten()[0]
        assert all((v == first).all() for v in values) or torch.equal(values[0], next(model.parameters()))


def test_a_checkpoint_between_two_renames_is_found(model: Transformer, tmp_path: Path) -> None:
    """Killed after the old folder was moved aside and before the new one had its name: the newer of the two is used."""
    minga.save(model, tmp_path / "checkpoint-000001")
    minga.save(model, tmp_path / "checkpoint-000002")
    (tmp_path / "checkpoint-000002").rename(tmp_path / ".checkpoint-000002.old-99999999")
    assert store.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000002"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]
