"""Folders in the public format: both directions, shards, block FP8, and everything that may be wrong with a file."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minga.checkpoint import hf, names
from minga.checkpoint.durable import durable_folder, verify_folder
from minga.config.model import ModelConfig
from minga.errors import UserError


@pytest.fixture
def saved(tmp_path, configs, random_tensors):
    """A folder with a small V3 model, and its tensors."""
    internal = random_tensors(configs["v3"])
    hf.write_folder(tmp_path / "model", configs["v3"].to_hf(), internal)
    return tmp_path / "model", internal


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(tmp_path, config, random_tensors, same, dtype):
    internal = random_tensors(config, dtype)
    hf.write_folder(tmp_path / "model", config.to_hf(), internal, files={"note.txt": "¡hola!", "sub/b.bin": b"\0"})
    read = hf.read_config(tmp_path / "model")
    assert ModelConfig.from_hf(read).replace(extra={}) == config.replace(extra={})
    assert read["dtype"] == read["torch_dtype"] == str(dtype).removeprefix("torch.")
    same(hf.read_tensors(tmp_path / "model", config), internal)
    assert (tmp_path / "model" / "note.txt").read_text(encoding="utf-8") == "¡hola!"
    verify_folder(tmp_path / "model")


def test_types_change_on_the_way(tmp_path, configs, random_tensors):
    config = configs["v3"]
    internal = random_tensors(config)
    hf.write_folder(tmp_path / "model", config.to_hf(), internal, dtype=torch.bfloat16)
    read = hf.read_tensors(tmp_path / "model", config, dtype=torch.float16)
    for name, tensor in internal.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert torch.equal(read[name], tensor if is_bias else tensor.bfloat16().half()), name


def test_shards(tmp_path, configs, random_tensors, same):
    config = configs["v3"]
    internal = random_tensors(config)
    hf.write_folder(tmp_path / "model", config.to_hf(), internal, max_shard_bytes=200_000)
    index = json.loads((tmp_path / "model" / hf.INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    public = names.to_public(internal, config)
    assert (
        list(index["weight_map"]) == list(public) == sorted(hf.tensor_names(tmp_path / "model"), key=list(public).index)
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in public.values())
    assert all(file.stat().st_size < 250_000 for file in (tmp_path / "model").glob("*.safetensors"))
    same(hf.read_tensors(tmp_path / "model", config), internal)


def test_the_library_reads_our_file(tmp_path):
    """Mixed types, views, repeated and empty tensors."""
    stack = torch.arange(24.0).view(2, 3, 4)
    tensors = {
        "half": torch.ones(3, dtype=torch.float16),
        "byte": torch.tensor([1, 2, 3], dtype=torch.int8),
        "view": stack[1, 1:],
        "turned": stack[0].T,
        "again": stack[1, 1:],
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    hf.write_tensors(tmp_path / "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left"):
        hf.write_tensors(Path("/dev/full"), {"a": torch.zeros(10_000)})


def test_writing_to_what_was_read_changes_no_file(saved, configs, same):
    folder, internal = saved
    for tensor in hf.read_tensors(folder, configs["v3"]).values():
        tensor.zero_()
    verify_folder(folder)
    same(hf.read_tensors(folder, configs["v3"]), internal)


def test_replacing_a_model_that_is_in_use(saved, configs, random_tensors, same):
    folder, internal = saved
    mapped = hf.read_tensors(folder, configs["v3"])
    hf.write_folder(folder, configs["v3"].to_hf(), random_tensors(configs["v3"], seed=1))
    same(mapped, internal)


def test_eight_bit_folder(tmp_path, configs, random_tensors, same):
    config = configs["v3"]
    internal = random_tensors(config)
    for name in [name for name in internal if internal[name].ndim > 1]:
        internal[name] = internal[name].to(torch.int8)
        internal[name + "_scale"] = torch.rand(*internal[name].shape[:-1], 2).half()
    hf.write_folder(tmp_path / "model", config.to_hf(), internal, dtype=torch.bfloat16)
    read = hf.read_tensors(tmp_path / "model", config, dtype=torch.float32)
    norm = "model.norm.weight"
    assert torch.equal(read[norm], internal[norm].bfloat16().float())
    eight_bit = {name: tensor for name, tensor in internal.items() if tensor.dtype in (torch.int8, torch.float16)}
    same({name: read[name] for name in eight_bit}, eight_bit)


def test_experts_are_read_without_a_second_copy(saved, configs):
    """Each goes straight from the mapped file to its place in the stack."""
    folder, internal = saved
    read = hf.read_tensors(folder, configs["v3"])
    stack = read["model.layers.1.mlp.experts.gate_up_proj"]
    assert stack.is_contiguous() and stack.untyped_storage().nbytes() == stack.nbytes
    assert stack.shape == internal["model.layers.1.mlp.experts.gate_up_proj"].shape


# ---------------------------------------------------------------------------------------------------- block FP8


def quantise_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One block at a time, as plainly as can be."""
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    stored, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = 2.0 ** torch.ceil(torch.log2(weight[at].abs().max() / 448))
            stored[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return stored, scale


@pytest.mark.parametrize("scale_type", [torch.float32, torch.float8_e8m0fnu])
def test_block_fp8(tmp_path, configs, random_tensors, scale_type):
    """Blocks of 24 x 40 divide none of the sides; DeepSeek's own trap are the 576 = 4.5 x 128 rows of kv_a."""
    config, block = configs["v3"], (24, 40)
    public = names.to_public(random_tensors(config), config)
    expected, stored = {}, {}
    for name, tensor in public.items():
        linear = "_proj" in name and "eh_proj" not in name and tensor.ndim == 2
        if linear:
            stored[name], scale = quantise_fp8(tensor, block)
            stored[name + "_scale_inv"] = scale.to(scale_type)
            spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            expected[name] = stored[name].float() * spread[: tensor.shape[0], : tensor.shape[1]]
        else:
            stored[name] = expected[name] = tensor.clone()
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(stored, folder / hf.SINGLE)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "quantization_config": quantization}))
    read = names.to_public(hf.read_tensors(folder, config, dtype=torch.float32), config)
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    default = hf.read_tensors(folder, config)
    assert default["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert default["model.norm.weight"].dtype == torch.float32


def test_fp8_without_usable_scales(tmp_path, configs, random_tensors):
    config, folder = configs["llama"], tmp_path / "model"
    public = {name: tensor.clone() for name, tensor in names.to_public(random_tensors(config), config).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    public[name] = public[name].to(torch.float8_e4m3fn)
    folder.mkdir()

    def read(quantization, **more):
        save_file({**public, **more}, folder / hf.SINGLE)
        (folder / "config.json").write_text(json.dumps({**config.to_hf(), "quantization_config": quantization}))
        hf.read_tensors(folder, config)

    blocks = {"weight_block_size": [16, 16]}
    with pytest.raises(UserError, match=rf"{name} is FP8 without a scale"):
        read(blocks)
    with pytest.raises(UserError, match=r"weight_scale_inv is \(3, 3\) instead of \(3, 2\)"):
        read(blocks, **{f"{name}_scale_inv": torch.ones(3, 3)})
    with pytest.raises(UserError, match="FP8 without a scale"):
        read({"quant_method": "fp8"}, **{f"{name}_scale_inv": torch.ones(3, 2)})
    for size in ([16], [16, 0], "16", [1.5, 2]):
        with pytest.raises(UserError, match=r"weight_block_size is .* two positive numbers"):
            read({"weight_block_size": size}, **{f"{name}_scale_inv": torch.ones(3, 2)})


# ---------------------------------------------------------------------------------------------------- what is no model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no config\.json, so this is no model folder"),
        ("", "not valid JSON"),
        ('{"model_type": ', "not valid JSON: .*line 1"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
    ],
)
def test_config_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        hf.read_config(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        hf.read_config(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file, not a model folder"):
        hf.read_config(tmp_path / "file")


def test_pickles_are_never_opened(saved, configs):
    folder, _ = saved
    (folder / hf.SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"the weights are pickled .*pytorch_model\.bin.*can run any code.*safetensors only"
    ):
        hf.read_tensors(folder, configs["v3"])
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        hf.read_tensors(folder, configs["v3"])


@pytest.mark.parametrize("cut", [0, 7, 8, 50, 3000, -1])
def test_truncated_files(saved, configs, cut):
    folder, _ = saved
    raw = (folder / hf.SINGLE).read_bytes()
    (folder / hf.SINGLE).write_bytes(raw[:cut])
    with pytest.raises(UserError, match=r"cut short or damaged: .*model\.safetensors\)\. download the file again"):
        hf.read_tensors(folder, configs["v3"])


def test_numbers_that_are_not_aligned(saved, configs, same):
    """The format allows a header of any length; ours, and that of every writer we know, are multiples of eight."""
    folder, internal = saved
    raw = (folder / hf.SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].rstrip()
    text += b" " * (5 - len(text) % 8 if len(text) % 8 < 5 else 13 - len(text) % 8)
    (folder / hf.SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    assert len(text) % 8
    same(hf.read_tensors(folder, configs["v3"]), internal)


def test_unreadable_types(saved, configs):
    folder, internal = saved
    public = {name: tensor.clone() for name, tensor in names.to_public(internal, configs["v3"]).items()}
    name = "model.norm.weight"
    for dtype in (torch.complex64, torch.float8_e5m2):
        save_file({**public, name: public[name].to(dtype)}, folder / hf.SINGLE)
        with pytest.raises(UserError, match=f"{name} is in .*, which Minga does not read"):
            hf.read_tensors(folder, configs["v3"])
    save_file({**public, name: public[name].to(torch.int32)}, folder / hf.SINGLE)
    with pytest.raises(UserError, match=f"{name} holds int32 numbers"):
        hf.read_tensors(folder, configs["v3"])


class TestIndex:
    @pytest.fixture
    def sharded(self, tmp_path, configs, random_tensors):
        config = configs["llama"]
        hf.write_folder(tmp_path / "model", config.to_hf(), random_tensors(config), max_shard_bytes=20_000)
        return tmp_path / "model", config

    def change(self, folder, function):
        index = json.loads((folder / hf.INDEX).read_text())
        function(index)
        (folder / hf.INDEX).write_text(json.dumps(index))

    def test_a_missing_shard(self, sharded):
        folder, config = sharded
        sorted(folder.glob("*.safetensors"))[1].unlink()
        with pytest.raises(UserError, match=r"a file of the model is missing .*00002-of-"):
            hf.read_tensors(folder, config)

    @pytest.mark.parametrize(
        "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x.bin", 3, None]
    )
    def test_paths_out_of_the_folder(self, sharded, file):
        folder, config = sharded
        self.change(folder, lambda index: index["weight_map"].update({"model.norm.weight": file}))
        with pytest.raises(UserError, match=r"is no safetensors file of this folder .*do not trust"):
            hf.read_tensors(folder, config)

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
    def test_no_weight_map(self, sharded, content):
        folder, config = sharded
        (folder / hf.INDEX).write_text(content)
        with pytest.raises(UserError, match=r"index\.json"):
            hf.read_tensors(folder, config)

    def test_a_tensor_in_the_wrong_file(self, sharded):
        folder, config = sharded
        first = min(folder.glob("*.safetensors")).name
        self.change(folder, lambda index: index["weight_map"].update({"model.norm.weight": first}))
        with pytest.raises(UserError, match=rf"model\.norm\.weight should be in {first} and is not"):
            hf.read_tensors(folder, config)

    def test_a_tensor_in_two_files(self, sharded):
        folder, config = sharded
        save_file({"model.norm.weight": torch.ones(32)}, folder / "model-00009-of-00009.safetensors")
        extra = "model-00009-of-00009.safetensors"
        self.change(folder, lambda index: index["weight_map"].update({"model.norm.weight": extra}))
        with pytest.raises(UserError, match=r"model\.norm\.weight is in two files, .* and model-00009"):
            hf.read_tensors(folder, config)


def test_a_model_beside_other_files(tmp_path, configs, random_tensors, same):
    """A training checkpoint: the model's files and the trainer's, all or nothing together."""
    config = configs["v3"]
    internal = random_tensors(config)
    with durable_folder(tmp_path / "checkpoint") as folder:
        hf.write_model(folder, config.to_hf(), internal, files={"tokenizer.json": "{}"})
        (folder / "training_state").mkdir()
        hf.write_tensors(folder / "training_state" / "moments.safetensors", internal)
    verify_folder(tmp_path / "checkpoint")
    same(hf.read_tensors(tmp_path / "checkpoint", config), internal)
    (tmp_path / "checkpoint" / "training_state" / "moments.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"training_state/moments\.safetensors has 0 bytes instead of"):
        verify_folder(tmp_path / "checkpoint")


def test_nothing_is_written_for_a_wrong_model(tmp_path, configs, random_tensors):
    with pytest.raises(UserError, match="tensors are missing"):
        hf.write_folder(tmp_path / "model", configs["qwen3"].to_hf(), random_tensors(configs["llama"]))
    assert not list(tmp_path.iterdir())


def test_damaged_files_never_surprise(tmp_path, configs, random_tensors):
    """300 cuts and flips, most of them in the header: a model or one line, nothing else."""
    config, dice = configs["llama"], random.Random(0)
    folder = tmp_path / "model"
    hf.write_folder(folder, config.to_hf(), random_tensors(config))
    raw = (folder / hf.SINGLE).read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    refused = 0
    for i in range(300):
        damaged = bytearray(raw[: dice.randrange(len(raw))] if i % 5 == 0 else raw)
        for _ in range(dice.randrange(1, 4) if i % 5 else 0):
            damaged[dice.randrange(header if i % 10 else len(raw))] = dice.randrange(256)
        (folder / hf.SINGLE).write_bytes(damaged)
        with contextlib.suppress(UserError):
            refused -= 1
            for tensor in hf.read_tensors(folder, config).values():
                tensor.sum()
            refused += 1
    assert -300 <= refused < -150


# ---------------------------------------------------------------------------------------------------- transformers


TRANSFORMERS_CONFIGS = [
    "v3-no-query-latent",
    "v3",
    "v3-no-shared",
    "v3-tied",
    "v3-biases",
    "v3-dense",
    "v2",
    "v2-biases-no-shared",
    "llama",
    "llama-biases",
    "qwen2",
    "qwen3",
]


@pytest.mark.parametrize("family", TRANSFORMERS_CONFIGS)
def test_transformers_opens_ours_and_we_open_theirs(tmp_path, configs, random_tensors, same, family):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    config = configs[family]
    internal = random_tensors(config)
    hf.write_folder(tmp_path / "ours", config.to_hf(), internal)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # transformers knows MTP layers, but expects them at V3's own number, 61
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    assert bool(info["unexpected_keys"]) == bool(config.num_nextn_predict_layers)

    model.save_pretrained(tmp_path / "theirs")
    theirs = hf.read_config(tmp_path / "theirs")
    count = names.count_mtp(hf.tensor_names(tmp_path / "theirs"), config.num_hidden_layers)
    assert count == 0  # dropped, whatever their config says
    read_as = ModelConfig.from_hf(theirs).replace(num_nextn_predict_layers=0)
    main = {name: tensor for name, tensor in internal.items() if not name.startswith("mtp.")}
    same(hf.read_tensors(tmp_path / "theirs", read_as), main)
