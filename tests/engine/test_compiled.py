"""The compiled forward pass against the model's own, and against itself: pytest tests/engine/test_compiled.py"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor

from minga.checkpoint import ggml_types, names
from minga.config import ModelConfig, RopeConfig
from minga.config.presets import tiny
from minga.engine.compiled import CompiledModel, compile_model
from minga.engine.plain import PlainModel, Tokens
from minga.errors import UserError
from minga.kernels import cpu, ops
from minga.model.cache import BLOCK, Cache
from minga.model.transformer import Transformer
from minga.quant import blocks

SMALL = tiny().replace(initializer_range=0.15, max_position_embeddings=1024)
GROUPED = {"hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 2, "vocab_size": 250}
GROUPED |= {"max_position_embeddings": 1024, "rope_interleave": False, "initializer_range": 0.15}
CONFIGS = {
    "tiny": SMALL,
    "no query latent": SMALL.replace(q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=2.5),
    "two experts": SMALL.replace(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=0),
    "sixty experts": SMALL.replace(n_routed_experts=60, num_experts_per_tok=6, n_group=3, topk_group=2),
    "odd": SMALL.replace(
        hidden_size=60, q_lora_rank=None, kv_lora_rank=44, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=10,
        moe_intermediate_size=20, intermediate_size=50, n_routed_experts=6, n_group=1, topk_group=1,
        num_attention_heads=3, num_key_value_heads=3,
    ),
    "dense": SMALL.replace(n_routed_experts=0, n_shared_experts=0, attention_bias=True, mlp_bias=True),
    "v2": SMALL.replace(
        model_type="deepseek_v2", topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False,
        num_nextn_predict_layers=0,
    ),
    "v2 lite": SMALL.replace(
        model_type="deepseek_v2", topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, n_group=1,
        q_lora_rank=None, num_nextn_predict_layers=0,
        rope=RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=256, mscale=0.7, mscale_all_dim=0.7),
    ),
    "qwen3": ModelConfig(
        model_type="qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, **GROUPED
    ),
    "qwen2": ModelConfig(model_type="qwen2", num_attention_heads=6, num_key_value_heads=2, head_dim=12, **GROUPED),
    "llama": ModelConfig(model_type="llama", num_attention_heads=10, num_key_value_heads=2, head_dim=8, **GROUPED),
}  # fmt: skip


@pytest.fixture(autouse=True)
def forward_pass() -> Iterator[None]:
    """In place of the other tests' choice: here it is the subject."""
    if not cpu.load():
        pytest.skip("there is no C++ compiler")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(config: ModelConfig, quant: str | None) -> Transformer:
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name:
            value.data.uniform_(-0.1, 0.1, generator=generator)
    if quant is not None:
        blocks.quantize(model, blocks.FORMATS[quant])
    return model


def put_mixed(model: Transformer, random_blocks) -> Transformer:
    """Every matrix whose width allows it in one of GGUF's types, in turn, the others in half-width floats."""
    torch.manual_seed(5)
    kinds, stored = cycle(blocks.GGUF), {}
    by_name = {kind.name: kind for kind in ggml_types.TYPES.values()}
    for name in sorted(names.matrices(model.config)):
        weight = model.get_parameter(name)
        fitting = next(
            kind for kind in [*islice(kinds, 9), None] if kind is None or weight.shape[-1] % by_name[kind].numbers == 0
        )
        if fitting is None:
            stored[name] = blocks.Stored.keep(weight.detach().to(torch.bfloat16 if len(stored) % 2 else torch.float16))
        else:
            stored[name] = ggml_types.keep(
                random_blocks(fitting, weight.numel()), by_name[fitting], tuple(weight.shape)
            )
    blocks.put(model, stored)
    return model


def fast(model: Transformer) -> CompiledModel:
    compiled = compile_model(model)
    assert isinstance(compiled, CompiledModel)
    return compiled


def read(
    model: CompiledModel, ids_BT: Tensor, *, step: int, threads: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) and the cache's rows after reading `step` tokens at a time."""
    torch.set_num_threads(threads)
    cache = Cache.of(model.config, *ids_BT.shape, dtype=dtype or model.cache_dtype)
    parts = [model.hidden(tokens(ids, at * step), cache) for at, ids in enumerate(ids_BT.split(step, 1))]
    rows = torch.stack([cache.read(layer, ids_BT.shape[1]) for layer in range(model.config.num_hidden_layers)])
    return torch.cat([part.unflatten(0, (len(ids_BT), -1)) for part in parts], 1), rows


def tokens(ids_BT: Tensor, first: int) -> Tokens:
    return Tokens.of([(ids, first, row) for row, ids in enumerate(ids_BT.tolist())])


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_it_computes_what_the_model_computes(name: str, quant: str | None) -> None:
    """Floats up to rounding. In few bits activations are rounded too, which turns some routers' choices."""
    model = make(CONFIGS[name], quant)
    ids_BT = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    hidden = model.hidden(ids_BT)
    expected = model.head(hidden)
    compiled = fast(model)
    ours, _ = read(compiled, ids_BT, step=40, threads=1)
    bound = 1e-5 if quant is None else 0.2
    assert error(compiled.head(ours.flatten(0, 1)).view_as(expected), expected) < bound
    if len(model.mtp):
        cache = Cache.of(model.config, 2, 40, dtype=compiled.cache_dtype)
        state = compiled.mtp_hidden(tokens(ids_BT, 0), hidden.flatten(0, 1), cache)
        assert error(state.view_as(hidden), model.mtp_hidden(0, ids_BT, hidden)) < bound
    assert error(model.head(model.hidden(ids_BT)), expected) < 1e-5  # the model itself works on as before


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["tiny", "odd", "v2", "qwen3", "llama"])
@torch.inference_mode()
def test_every_way_to_read_a_text_gives_the_same_bits(name: str, quant: str | None) -> None:
    """Whole or token by token, one thread or two, beside another sequence or alone; 600 tokens are three stretches."""
    model = make(CONFIGS[name], quant)
    ids_BT = torch.randint(model.config.vocab_size, (2, 600), generator=torch.Generator().manual_seed(2))
    compiled = fast(model)
    for dtype in (None, torch.int8):
        expected, rows = read(compiled, ids_BT, step=600, threads=1, dtype=dtype)
        for step, threads in ((600, 2), (7, 2), (100, 1)):
            hidden, other = read(compiled, ids_BT, step=step, threads=threads, dtype=dtype)
            assert torch.equal(hidden, expected) and torch.equal(other, rows)
        for threads in (1, 2):
            hidden, other = read(compiled, ids_BT[1:], step=1, threads=threads, dtype=dtype)
            assert torch.equal(hidden, expected[1:]) and torch.equal(other, rows[:, 1:])


@pytest.mark.parametrize("name", ["tiny", "odd", "qwen3", "llama"])
@torch.inference_mode()
def test_a_cache_in_int8_is_the_reference_rounded(name: str) -> None:
    """The first layer's rows do not depend on the cache: there they are those of `Pages.write`, to the bit. Further on
    only the rounding of the rows separates it from a cache of floats.
    """
    model = make(CONFIGS[name], None)
    compiled = fast(model)
    ids_BT = torch.randint(model.config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(2))
    exact, rows = read(compiled, ids_BT, step=150, threads=1)
    rounded, few = read(compiled, ids_BT, step=150, threads=1, dtype=torch.int8)
    codes, scale = ops.quantize_int8(rows[0], BLOCK)
    assert torch.equal(few[0], ops.dequantize_int8(codes, scale, BLOCK, torch.float32))
    plain = PlainModel(model)
    cache = Cache.of(model.config, 2, 150, dtype=torch.int8)
    expected = plain.hidden(tokens(ids_BT, 0), cache).view_as(exact)
    assert 0 < error(rounded, exact) < 0.05 and error(rounded, expected) < error(rounded, exact)


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_model_in_panels_is_saved_in_rows(quant: str) -> None:
    model = make(SMALL, quant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


MIXED = {
    "latent": SMALL.replace(
        hidden_size=256, intermediate_size=512, moe_intermediate_size=264, kv_lora_rank=64, q_lora_rank=100
    ),
    "grouped": CONFIGS["qwen3"].replace(hidden_size=256, intermediate_size=288),
}


@pytest.mark.parametrize("name", MIXED)
@torch.inference_mode()
def test_it_computes_with_many_formats_in_one_model(name: str, random_blocks) -> None:
    """GGUF's types and half-width floats side by side; and every way to read a text gives the same bits."""
    model = put_mixed(make(MIXED[name], None), random_blocks)
    assert {*blocks.GGUF, *(("bfloat16", "float16") if name == "latent" else ())} == {
        f.name for f in blocks.formats_of(model)
    }
    ids_BT = torch.randint(model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(2))
    expected = model.head(model.hidden(ids_BT))
    compiled = fast(model)
    ours, slots = read(compiled, ids_BT, step=70, threads=1)
    assert error(compiled.head(ours.flatten(0, 1)).view_as(expected), expected) < 0.1
    torch.testing.assert_close(model.head(model.hidden(ids_BT)), expected)
    for step, threads in ((70, 2), (7, 2), (1, 2), (1, 1)):
        hidden, other = read(compiled, ids_BT, step=step, threads=threads)
        assert torch.equal(hidden, ours) and torch.equal(other, slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny", "odd", "dense", "llama"])
@torch.inference_mode()
def test_half_width_floats_compute_what_they_widen_to(name: str, dtype: torch.dtype) -> None:
    """To the bit, in half the memory."""
    model = make(CONFIGS[name], None)
    matrices = names.matrices(model.config)
    for key in matrices:
        model.get_parameter(key).data = model.get_parameter(key).to(dtype).float()
    ids_BT = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    wide = fast(model)
    expected, slots = read(wide, ids_BT, step=40, threads=1)
    logits = wide.head(expected)
    blocks.put(model, {key: blocks.Stored.keep(model.get_parameter(key).to(dtype)) for key in matrices})
    narrow = fast(model)
    hidden, other = read(narrow, ids_BT, step=11, threads=2)
    assert torch.equal(hidden, expected) and torch.equal(other, slots)
    assert torch.equal(narrow.head(hidden), logits)
    assert sum(buffer.nbytes for buffer in model.buffers()) < 1.2 * 2 * sum(
        p.numel() for p in make(CONFIGS[name], None).parameters()
    )


def test_training_is_seen() -> None:
    """Float weights are read where they lie."""
    model = make(CONFIGS["qwen3"], None)
    ids_BT = torch.randint(250, (1, 10))
    first, _ = read(fast(model), ids_BT, step=10, threads=1)
    with torch.no_grad():
        model.model.norm.weight *= 2
    second, _ = read(fast(model), ids_BT, step=10, threads=1)
    torch.testing.assert_close(second, 2 * first)


def test_what_it_leaves_to_torch() -> None:
    assert compile_model(Transformer(SMALL).double()).dtype == torch.float64
    assert isinstance(compile_model(Transformer(SMALL).bfloat16()), PlainModel)
    dynamic = SMALL.replace(rope=RopeConfig(rope_type="dynamic", factor=2.0))
    assert isinstance(compile_model(Transformer(dynamic)), PlainModel)


def test_a_position_beyond_the_cache() -> None:
    compiled = fast(make(SMALL, None))
    cache = Cache.of(SMALL, 1, 64, dtype=torch.float32)
    with pytest.raises(UserError, match="position 64 is beyond the cache's 64 rows"):
        compiled.hidden(tokens(torch.zeros(1, 1, dtype=torch.long), 64), cache)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())
