"""GGUF files: every family back to our tensors, rope scalings recovered, and hostile files refused in one line."""

from __future__ import annotations

import contextlib
import math
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minga.checkpoint import gguf, names
from minga.config.model import ModelConfig, RopeConfig
from minga.errors import UserError
from tests.checkpoint.models import to_gguf

GGUF_FAMILIES = [
    "v3",
    "v3-no-query-latent",
    "v3-two-mtp",
    "v3-no-shared",
    "v3-tied",
    "v3-dense",
    "v2",
    "llama",
    "llama-biases",
    "qwen2",
    "qwen3",
]


@pytest.fixture
def llama_file(tmp_path, configs, random_tensors, write_gguf):
    """A small llama model with a few tokens in its metadata, and its config and tensors."""
    config = configs["llama"]
    internal = random_tensors(config)
    metadata, tensors = to_gguf(config, internal)
    metadata |= {"tokenizer.ggml.tokens": ["a", "ñ", "€"], "tokenizer.ggml.scores": [0.5, -1.0], "general.flag": True}
    return write_gguf(tmp_path / "m.gguf", metadata, tensors), config, internal


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_family(tmp_path, configs, random_tensors, write_gguf, same, family, split):
    config = configs[family]
    if family == "v2":
        config = config.replace(n_group=1, topk_group=1)
    internal = random_tensors(config)
    file = gguf.open_gguf(write_gguf(tmp_path / "m.gguf", *to_gguf(config, internal, split=split)))
    read = ModelConfig.from_hf(gguf.config_from_gguf(file))
    assert read.replace(extra={}) == config.replace(extra={}, first_k_dense_replace=read.first_k_dense_replace)
    same(gguf.read_tensors(file, read), internal)


def test_group_limited_v2(tmp_path, configs, random_tensors, write_gguf):
    config = configs["v2"].replace(topk_method="group_limited_greedy", n_group=4, topk_group=2)
    file = gguf.open_gguf(write_gguf(tmp_path / "m.gguf", *to_gguf(config, random_tensors(config))))
    read = gguf.config_from_gguf(file)
    assert (read["topk_method"], read["n_group"], read["topk_group"]) == ("group_limited_greedy", 4, 2)


def test_both_forms_of_kv_b(tmp_path, configs, random_tensors, write_gguf, same):
    """Some early absorbed files kept the whole one too; it is the one to trust."""
    config = configs["v3"]
    internal = random_tensors(config)
    metadata, split = to_gguf(config, internal)
    _, whole = to_gguf(config, internal, split=False)
    file = gguf.open_gguf(write_gguf(tmp_path / "m.gguf", metadata, {**split, **whole}))
    same(gguf.read_tensors(file, config), internal)


def test_mtp_that_is_promised_but_absent(tmp_path, configs, random_tensors, write_gguf):
    config = configs["v3"]
    metadata, tensors = to_gguf(config, random_tensors(config))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blk.3.")}
    read = gguf.config_from_gguf(gguf.open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors)))
    assert (read["num_hidden_layers"], read["num_nextn_predict_layers"]) == (3, 0)


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 2e-2)])
def test_quantised_tensors(tmp_path, configs, random_tensors, write_gguf, kind, tolerance):
    config = configs["llama"]
    internal = random_tensors(config)
    metadata, tensors = to_gguf(config, internal)
    kinds = {name: kind for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[1] % 32 == 0}
    file = gguf.open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors, kinds))
    assert {info.kind.name for info in file.tensors.values()} == {"F32", kind}
    for name, tensor in gguf.read_tensors(file, config).items():
        torch.testing.assert_close(tensor, internal[name], rtol=tolerance, atol=tolerance)
    half = gguf.read_tensors(file, config, dtype=torch.float16)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_matrices_stay_as_they_are(tmp_path, configs, random_tensors, write_gguf, same, family):
    """Rows in the public order, experts in their stacks, and the very numbers that widening gives; in the file's bytes."""
    config = configs[family]
    metadata, tensors = to_gguf(config, random_tensors(config))
    fits = {name: tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 for name, tensor in tensors.items()}
    kinds = {name: "Q8_0" if fits[name] else "BF16" for name, tensor in tensors.items() if tensor.ndim > 1}
    kinds |= {name: "BF16" for name in tensors if name.startswith("blk.2.ffn_up_exps")}  # beside gates in Q8_0
    opened = gguf.open_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors, kinds))
    expected = gguf.read_tensors(opened, config)
    rest, stored = gguf.read_stored(opened, config)
    same({**rest, **{name: matrix.dense() for name, matrix in stored.items()}}, expected)
    assert stored.keys() <= names.matrices(config)
    left = names.matrices(config) - stored.keys()  # put together from two tensors
    assert all("kv_b" in name or name == "model.layers.2.mlp.experts.gate_up_proj" for name in left)
    kept = sum(opened.tensors[name].num_bytes for name in kinds if name.startswith("token_embd"))
    embedding = stored["model.embed_tokens.weight"]
    assert embedding.data.nbytes + embedding.factors.nbytes == kept


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 8), (3, 256)])
def test_versions_and_alignments(tmp_path, llama_file, write_gguf, same, version, alignment):
    _, config, internal = llama_file
    path = write_gguf(tmp_path / "n.gguf", *to_gguf(config, internal), version=version, alignment=alignment)
    same(gguf.read_tensors(gguf.open_gguf(path), config), internal)


def test_metadata_are_plain_values(llama_file):
    metadata = gguf.open_gguf(llama_file[0]).metadata
    assert metadata["tokenizer.ggml.tokens"] == ["a", "ñ", "€"]
    assert list(metadata["tokenizer.ggml.scores"]) == [0.5, -1.0]
    assert metadata["general.flag"] is True
    assert metadata["llama.block_count"] == 2


def test_a_vocabulary_is_read_at_once(tmp_path, write_gguf):
    """SmolLM2's 49,152 tokens and 48,900 merges take 0.04 s here; item by item they would take half a second."""
    words = [f"token-{i}" for i in range(100_000)]
    path = write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.tokens": words}, {"t": torch.zeros(1)})
    begin = time.process_time()
    metadata = gguf.open_gguf(path).metadata
    assert time.process_time() - begin < 0.5
    assert metadata["tokenizer.ggml.tokens"] == words


def test_writing_to_what_was_read_changes_no_file(llama_file):
    path, config, _ = llama_file
    before = path.read_bytes()
    for tensor in gguf.read_tensors(gguf.open_gguf(path), config).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_ends_of_text_turn_and_message(tmp_path, llama_file, write_gguf):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 2}
    metadata |= {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    read = gguf.config_from_gguf(gguf.open_gguf(write_gguf(tmp_path / "n.gguf", metadata, tensors)))
    assert (read["bos_token_id"], read["eos_token_id"]) == (1, [2, 5])


# ---------------------------------------------------------------------------------------------------- rope scaling


def rope_of(path: Path) -> RopeConfig:
    return ModelConfig.from_hf(gguf.config_from_gguf(gguf.open_gguf(path))).rope


def test_yarn(tmp_path, configs, random_tensors, write_gguf):
    config = configs["v3"]
    metadata, tensors = to_gguf(config, random_tensors(config))
    yarn = {"type": "yarn", "factor": 40.0, "original_context_length": 4096, "yarn_log_multiplier": 0.0707}
    yarn |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
    metadata |= {f"deepseek2.rope.scaling.{key}": value for key, value in yarn.items()}
    expected = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}
    rope = rope_of(write_gguf(tmp_path / "m.gguf", metadata, tensors))
    assert rope == RopeConfig("yarn", beta_fast=32, beta_slow=1, **expected)


def test_linear(tmp_path, llama_file, write_gguf):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope_of(write_gguf(tmp_path / "n.gguf", metadata, tensors)) == RopeConfig("linear", factor=4)
    metadata["llama.rope.scaling.type"] = "longrope"
    with pytest.raises(UserError, match="'longrope' is not supported"):
        rope_of(write_gguf(tmp_path / "n.gguf", metadata, tensors))


def llama3_divisors(rope: RopeConfig, dim: int) -> Tensor:
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py, with its original context length."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    divisors = []
    for i in range(dim // 2):
        wavelength = 2 * math.pi * rope.rope_theta ** (2 * i / dim)
        smooth = (original / wavelength - low) / (high - low)
        kept = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / rope.factor + kept))
    return torch.tensor(divisors)


@pytest.mark.parametrize("head_dim", [4, 8, 16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 3, 1000)])
def test_llama3(tmp_path, configs, random_tensors, write_gguf, head_dim, theta, factor, low, high, original):
    given = RopeConfig("llama3", theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    config = configs["llama"].replace(head_dim=head_dim, rope=given)
    metadata, tensors = to_gguf(config, random_tensors(config))
    divisors = llama3_divisors(given, head_dim)
    path = write_gguf(tmp_path / "m.gguf", metadata, {**tensors, "rope_freqs.weight": divisors})
    rope = rope_of(path)
    if rope.rope_type == "llama3":
        torch.testing.assert_close(llama3_divisors(rope, head_dim), divisors, rtol=1e-5, atol=0)
        if head_dim >= 64 and original == 8192:
            assert rope == given
    else:  # heads so small that no frequency is scaled, or that all are
        expected = rope.factor or 1.0
        assert divisors.tolist() == [expected] * (head_dim // 2)
    gguf.read_tensors(gguf.open_gguf(path), config)


@pytest.mark.parametrize(
    "divisors", [[1.0, 7.0, 2.0, 8.0], [math.nan] * 4, [0.0, 1.0, 1.0, 8.0], [1.0, -3.0, 2.0, 8.0]]
)
def test_other_divisors(tmp_path, llama_file, write_gguf, divisors):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    tensors["rope_freqs.weight"] = torch.tensor(divisors)
    with pytest.raises(UserError, match=r"rope_freqs.weight"):
        rope_of(write_gguf(tmp_path / "n.gguf", metadata, tensors))


@pytest.mark.parametrize(
    ("theta", "divisors", "message"),
    [
        (-10000.0, [1.0, 2.0, 8.0, 8.0], "base frequency of -10000"),
        (1e-30, [1.0, 2.0, 8.0, 8.0], "base frequency of 1e-30"),
        (1.0, [1.0, 2.0, 3.0, 8.0], "base frequency of 1.0"),
        (1e4, [1.0] * 5000, "5000 numbers"),
        (1e4, [8.0, 2.0, 2.0, 8.0], "no Llama-3 scaling"),  # a ramp without a slope
    ],
)
def test_divisors_that_no_arithmetic_can_be_done_with(tmp_path, llama_file, write_gguf, theta, divisors, message):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    metadata["llama.rope.freq_base"] = theta
    tensors["rope_freqs.weight"] = torch.tensor(divisors)
    with pytest.raises(UserError, match=message):
        rope_of(write_gguf(tmp_path / "n.gguf", metadata, tensors))


# ---------------------------------------------------------------------------------------------------- what is refused


def test_paths(tmp_path):
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        gguf.open_gguf(tmp_path / "none.gguf")
    with pytest.raises(UserError, match="cannot be opened: Is a directory"):
        gguf.open_gguf(tmp_path)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty"):
        gguf.open_gguf(tmp_path / "empty.gguf")


def header(num_tensors: int, num_entries: int, rest: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("raw", "message", "at"),
    [
        (b"GG", "the magic number ends beyond", 0),
        (b"PK\3\4" + bytes(100), "does not begin with GGUF", 0),
        (header(0, 0, version=1), "of version 1", None),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", None),
        (header(2**62, 0), "4611686018427387904 tensors do not fit", 8),
        (header(0, 2**62), "metadata entries do not fit", 16),
        (header(0, 1, struct.pack("<Q", 2**63) + bytes(20)), "bytes of a metadata key do not fit", 24),
        (header(0, 1, text(b"k") + struct.pack("<I", 99) + bytes(20)), "unknown type 99", 33),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(9)), "items of 'k' do not fit", 41),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(9)), "items of 'k' do not fit", 41),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)), "unknown type 9", 37),
        (header(0, 1, text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 50) + b"x"), "an item of 'k' ends beyond", 49),
        (header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff\xff")), "not UTF-8", 49),
        (header(0, 1, text(b"\xff") + struct.pack("<II", 4, 1)), "is not UTF-8", 24),
        (header(0, 2, (text(b"k") + struct.pack("<II", 4, 1)) * 2), "'k' comes twice", 41),
        (header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 12)), "general.alignment is 12", 57),
        (header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0", 57),
        (header(0, 1, text(b"split.count") + struct.pack("<II", 4, 3)), "one part of several", None),
        (header(1, 0, info(b"t", [], 0, 0) + bytes(64)), "'t' has 0 dimensions", 24),
        (header(1, 0, text(b"t") + struct.pack("<I", 4_000_000_000) + bytes(64)), "has 4000000000 dimensions", 24),
        (header(1, 0, info(b"t", [2**63, 0], 0, 0) + bytes(64)), "'t' is empty", 24),
        (header(1, 0, info(b"t", [2**40, 2**40], 0, 0) + bytes(64)), "'t' ends at byte", 24),
        (header(1, 0, info(b"t", [8], 0, 2**63) + bytes(64)), "'t' ends at byte", 24),
        (header(1, 0, info(b"t", [8], 0, 4) + bytes(99)), "offset of 't' is no multiple of 32", 24),
        (header(1, 0, info(b"t", [33], 8, 0) + bytes(99)), "rows of 33 numbers in 't' are not whole Q8_0", 24),
        (header(1, 0, info(b"t", [8], 77, 0) + bytes(99)), "'t' has the unknown type 77", 45),
        (header(1, 0, info(b"t", [256], 10, 0) + bytes(99)), "'t' is in Q2_K, which Minga does not read", 45),
        (header(2, 0, info(b"t", [8], 0, 0) * 2 + bytes(99)), "'t' comes twice", 57),
        (header(2, 0, info(b"t", [9], 0, 0) + info(b"u", [8], 0, 32) + bytes(99)), "'u' overlaps another", 57),
    ],
)
def test_hostile_headers(tmp_path, raw, message, at):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        gguf.open_gguf(path)
    said = str(caught.value)
    assert message in said and str(path) in said and "\n" not in said
    assert at is None or f"byte {at})" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "mamba"}, "the architecture is 'mamba'"),
        ({"general.architecture": 7}, "the architecture is 7"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two' and not a whole number from 0 on"),
        (
            {"llama.block_count": [2, 3]},
            r"block_count is \[2, 3\] and not a whole number from 0 on, the same for all layers",
        ),
        ({"llama.attention.head_count": None}, "the metadata lacks llama.attention.head_count"),
        ({"llama.attention.head_count": 0}, "head_count is 0 and not a whole number from 1 on"),
        ({"llama.rope.freq_base": "x"}, "rope.freq_base is 'x' and not a number"),
        ({"llama.rope.freq_base": math.nan}, "rope.freq_base is nan and not a number"),
        ({"llama.rope.dimension_count": 4}, "keys, values and rotation differ"),
        ({"llama.expert_count": 8}, "experts in a llama model"),
        ({"llama.rope.scaling.type": 3}, "rope.scaling.type is 3 and not a text"),
        ({"llama.block_count": 2**31 - 1}, "num_hidden_layers is 2147483647, but there are only"),
        ({"llama.block_count": 3}, r"tensors are missing: blk\.2\.attn_norm\.weight.*'num_hidden_layers'"),
        ({"llama.block_count": 1}, r"unknown tensors: blk\.1\..*'num_hidden_layers'"),
        (
            {"llama.embedding_length": 64, "llama.attention.key_length": 8},
            r"token_embd\.weight is 96 x 32, but .* 96 x 64",
        ),
        (
            {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 3, "llama.attention.key_length": 8},
            r"blk\.0\.attn_q\.weight is 32 x 32, but the config asks for 24 x 32",
        ),
    ],
)
def test_impossible_metadata(tmp_path, llama_file, write_gguf, change, message):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    metadata = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        file = gguf.open_gguf(write_gguf(tmp_path / "n.gguf", metadata, tensors))
        gguf.read_tensors(file, ModelConfig.from_hf(gguf.config_from_gguf(file)))


def test_per_layer_numbers_that_agree(tmp_path, llama_file, write_gguf):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    metadata["llama.attention.head_count_kv"] = [2, 2]
    read = gguf.config_from_gguf(gguf.open_gguf(write_gguf(tmp_path / "n.gguf", metadata, tensors)))
    assert read["num_key_value_heads"] == 2


def test_no_language_model(tmp_path, llama_file, write_gguf):
    _, config, internal = llama_file
    metadata, tensors = to_gguf(config, internal)
    del tensors["token_embd.weight"]
    with pytest.raises(UserError, match=r"no token_embd.weight"):
        gguf.config_from_gguf(gguf.open_gguf(write_gguf(tmp_path / "n.gguf", metadata, tensors)))


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_damaged_files_never_surprise(tmp_path, configs, random_tensors, write_gguf, family):
    """300 cuts and flips, most of them in the header: a model or one line, nothing else."""
    config, dice = configs[family], random.Random(0)
    metadata, tensors = to_gguf(config, random_tensors(config))
    metadata |= {"tokenizer.ggml.tokens": [f"token{i}" for i in range(30)], "tokenizer.ggml.scores": [0.5] * 30}
    kinds = {name: "Q8_0" for name in tensors if "attn_q" in name and name.endswith(".weight")}
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors, kinds)
    raw = path.read_bytes()
    size_of_header = min(info.offset for info in gguf.open_gguf(path).tensors.values())
    refused = 0
    for i in range(300):
        damaged = bytearray(raw[: dice.randrange(len(raw))] if i % 5 == 0 else raw)
        for _ in range(dice.randrange(1, 4) if i % 5 else 0):
            damaged[dice.randrange(size_of_header if i % 10 else len(raw))] = dice.randrange(256)
        path.write_bytes(damaged)
        refused += 1
        with contextlib.suppress(UserError):
            file = gguf.open_gguf(path)
            read = gguf.read_stored if i % 2 else gguf.read_tensors
            read(file, ModelConfig.from_hf(gguf.config_from_gguf(file)))
            refused -= 1
    assert 100 < refused < 300


# ---------------------------------------------------------------------------------------------------- llama.cpp


YARN = RopeConfig(
    "yarn", factor=4, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707
)
LLAMA3 = RopeConfig("llama3", factor=8, original_max_position_embeddings=8192, low_freq_factor=1, high_freq_factor=4)


@pytest.mark.peer
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 64, "rope": LLAMA3}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("v2", {"n_group": 1, "topk_group": 1}),
        ("v3", {"num_nextn_predict_layers": 0}),
        ("v3", {"num_nextn_predict_layers": 0, "rope": YARN, "routed_scaling_factor": 2.5}),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, configs, random_tensors, write_gguf, family, change, split):
    """Rope layouts, the split kv_b, YaRN's factors, the routers: the logits of the file in llama.cpp and here."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from minga.model.transformer import Transformer

    config = configs[family].replace(**change)
    internal = random_tensors(config)
    for name, tensor in internal.items():
        if name.endswith("norm.weight"):
            tensor.mul_(0.1).add_(1)
        elif tensor.ndim > 1:
            tensor.mul_(tensor.shape[-1] ** -0.5)
    metadata, tensors = to_gguf(config, internal, split=split)
    arch = metadata["general.architecture"]
    metadata |= {"tokenizer.ggml.model": "none", f"{arch}.vocab_size": config.vocab_size}
    if config.rope is YARN:
        scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_log_multiplier": 0.0707}
        metadata |= {f"{arch}.rope.scaling.{key}": value for key, value in scaling.items()}
    if config.rope is LLAMA3:
        tensors["rope_freqs.weight"] = llama3_divisors(LLAMA3, config.head_dim)
    path = write_gguf(tmp_path / "m.gguf", metadata, tensors)

    file = gguf.open_gguf(path)
    model = Transformer(ModelConfig.from_hf(gguf.config_from_gguf(file)))
    model.load_state_dict(gguf.read_tensors(file, model.config))
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    peer = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    peer.eval(ids.tolist())
    theirs = torch.from_numpy(peer.scores[:40])
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()  # llama.cpp keeps its cache in float16
