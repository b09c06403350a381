"""The table of names: both directions, every family, and what is said when tensors do not fit."""

from __future__ import annotations

import pytest
import torch

from minga.checkpoint import names
from minga.config.model import ModelConfig
from minga.errors import UserError


def test_both_directions_are_exact(config, random_tensors, same):
    internal = random_tensors(config)
    public = names.to_public(internal, config)
    same(names.to_internal(public, config), internal)
    same(names.to_public(names.to_internal(public, config), config), public)


def test_saving_copies_nothing(configs, random_tensors):
    internal = random_tensors(configs["v3"])
    public = names.to_public(internal, configs["v3"])
    up = public["model.layers.1.mlp.experts.3.up_proj.weight"]
    stack = internal["model.layers.1.mlp.experts.gate_up_proj"]
    assert up.data_ptr() == stack[3, configs["v3"].moe_intermediate_size :].data_ptr()
    assert public["model.layers.3.embed_tokens.weight"] is public["model.embed_tokens.weight"]


def test_internal_names_are_the_model_s(config):
    """The state dict of the module itself, on the meta device."""
    from minga.model.transformer import Transformer

    with torch.device("meta"):
        state = Transformer(config).state_dict()
    table = names.hf_table(config).values()
    ours = {entry.internal: entry.whole or entry.shape for entry in table if entry.role is names.Role.PART}
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_mtp_takes_the_public_layer_after_the_last(configs, random_tensors):
    public = names.to_public(random_tensors(configs["v3-two-mtp"]), configs["v3-two-mtp"])
    for layer in (3, 4):
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
            assert f"model.layers.{layer}.{name}.weight" in public
        assert f"model.layers.{layer}.mlp.experts.7.down_proj.weight" in public  # a layer of experts like the others
    assert names.count_mtp(public, 3) == 2
    assert names.count_mtp(public, 2) == 0
    assert names.count_mtp(public, 4) == 1


def test_repeated_tensors_may_be_absent(configs, random_tensors, same):
    config = configs["v3"]
    internal = random_tensors(config)
    public = names.to_public(internal, config)
    del public["model.layers.3.embed_tokens.weight"], public["model.layers.3.shared_head.head.weight"]
    same(names.to_internal(public, config), internal)


def test_tied_embeddings(configs, random_tensors, same):
    config = configs["v3-tied"]
    internal = random_tensors(config)
    public = names.to_public(internal, config)
    assert "lm_head.weight" not in public
    assert public["model.layers.3.shared_head.head.weight"] is public["model.embed_tokens.weight"]
    same(names.to_internal({**public, "lm_head.weight": torch.ones(3)}, config), internal)


def test_no_shared_expert(configs, random_tensors, same):
    """transformers builds a shared expert of width 0 all the same, and wants its tensors."""
    config = configs["v2-biases-no-shared"]
    internal = random_tensors(config)
    assert not any("shared_experts" in name for name in internal)
    public = names.to_public(internal, config)
    prefix = "model.layers.1.mlp.shared_experts."
    assert public[f"{prefix}up_proj.weight"].shape == (0, config.hidden_size)
    assert public[f"{prefix}down_proj.weight"].shape == (config.hidden_size, 0)
    absent = {name: tensor for name, tensor in public.items() if "shared_experts" not in name}
    same(names.to_internal(absent, config), internal)
    public[f"{prefix}down_proj.bias"] = torch.ones(config.hidden_size)
    with pytest.raises(UserError, match=r"down_proj\.bias is not zero.*n_shared_experts"):
        names.to_internal(public, config)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_router_bias_stays_float32(configs, random_tensors, stored):
    config = configs["v3"]
    public = names.to_public(random_tensors(config, torch.bfloat16), config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    public[name] = torch.linspace(-5, 5, 8).to(stored)
    internal = names.to_internal(public, config)
    assert internal[name].dtype == torch.float32
    assert torch.equal(internal[name], public[name].float())


def test_computed_frequencies_are_ignored(configs, random_tensors, same):
    internal = random_tensors(configs["llama"])
    public = names.to_public(internal, configs["llama"])
    public["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    public["model.rotary_emb.inv_freq"] = torch.ones(4)
    same(names.to_internal(public, configs["llama"]), internal)


@pytest.mark.parametrize("family", ["v3", "qwen2"])
def test_eight_bit_weights_pass_untouched(configs, random_tensors, same, family):
    config = configs[family]
    internal = random_tensors(config, torch.bfloat16)
    for name in [name for name in internal if internal[name].ndim > 1]:
        shape = internal[name].shape
        internal[name] = torch.randint(-127, 128, shape, dtype=torch.int8)
        internal[name + "_scale"] = torch.rand(*shape[:-1], 2).half()
    public = names.to_public(internal, config)
    if family == "v3":
        scale = public["model.layers.2.mlp.experts.5.up_proj.weight_scale"]
        F = config.moe_intermediate_size
        assert torch.equal(scale, internal["model.layers.2.mlp.experts.gate_up_proj_scale"][5, F:])
        assert public["model.layers.3.shared_head.head.weight_scale"] is public["lm_head.weight_scale"]
    same(names.to_internal(public, config), internal)

    name = "model.layers.1.self_attn.o_proj.weight"
    scale = public.pop(f"{name}_scale")
    with pytest.raises(UserError, match=f"{name}: a weight in few bits without its scale"):
        names.to_internal(public, config)
    public |= {name: torch.zeros(public[name].shape), f"{name}_scale": scale}
    with pytest.raises(UserError, match="a scale without such a weight"):
        names.to_internal(public, config)


# ---------------------------------------------------------------------------------------------------- what does not fit


def _without(public, *parts):
    return {name: tensor for name, tensor in public.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("family", "parts", "message"),
    [
        ("v3", ["layers.2."], r"layers\.2\.input_layernorm\.weight, .*, .* and \d+ more .*'num_hidden_layers'"),
        ("v3", ["q_a_proj"], "'q_lora_rank'"),
        ("v3", ["experts.7."], "'n_routed_experts'"),
        ("v3", ["shared_experts"], "'n_shared_experts'"),
        ("v3", ["e_score"], "'topk_method'"),
        ("v3", ["layers.0.mlp"], "'first_k_dense_replace'"),
        ("v3", ["layers.3."], "'num_nextn_predict_layers'"),
        ("v3", ["lm_head"], "'tie_word_embeddings'"),
        ("qwen2", ["k_proj.bias"], "'attention_bias'"),
        ("qwen3", ["q_norm"], "'model_type'"),
    ],
)
def test_missing_tensors_are_named_with_the_key_that_wants_them(configs, random_tensors, family, parts, message):
    public = names.to_public(random_tensors(configs[family]), configs[family])
    with pytest.raises(UserError, match=f"tensors are missing: .*{message}"):
        names.to_internal(_without(public, *parts), configs[family], where="somewhere")


@pytest.mark.parametrize(
    ("saved", "read_as", "key"),
    [
        ("v3", {"num_nextn_predict_layers": 0}, "num_nextn_predict_layers"),
        ("v3-no-query-latent", {"num_hidden_layers": 2}, "num_hidden_layers"),
        ("v3", {"n_routed_experts": 4}, "n_routed_experts"),
        ("v3-biases", {"attention_bias": False}, "attention_bias"),
        ("qwen3", {"model_type": "llama"}, "model_type"),
    ],
)
def test_unknown_tensors_are_named(configs, random_tensors, saved, read_as, key):
    public = names.to_public(random_tensors(configs[saved]), configs[saved])
    with pytest.raises(UserError, match=f"unknown tensors: .*check '{key}'"):
        names.to_internal(public, configs[saved].replace(**read_as))


def test_wrong_shapes_and_types(configs, random_tensors):
    config = configs["v3"]
    public = names.to_public(random_tensors(config), config)
    with pytest.raises(UserError, match=r"q_a_proj.weight is 31 x 64, but the config asks for 32 x 64"):
        names.to_internal({**public, "model.layers.0.self_attn.q_a_proj.weight": torch.zeros(31, 64)}, config)
    with pytest.raises(UserError, match=r"norm.weight holds int64 numbers"):
        names.to_internal({**public, "model.norm.weight": torch.zeros(64, dtype=torch.int64)}, config)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(UserError, match=r"the experts of .*gate_up_proj differ in type"):
        names.to_internal({**public, name: public[name].bfloat16()}, config)


def test_saving_the_wrong_model(configs, random_tensors):
    internal = random_tensors(configs["llama"])
    with pytest.raises(UserError, match=r"tensors are missing: .*q_norm"):
        names.to_public(internal, configs["qwen3"])
    with pytest.raises(UserError, match="unknown tensors: extra"):
        names.to_public({**internal, "extra": torch.zeros(1)}, configs["llama"])
    internal["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(UserError, match=r"norm.weight is 5, but"):
        names.to_public(internal, configs["llama"])


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts"])
def test_a_config_of_absurd_size_is_refused_at_once(configs, field):
    config: ModelConfig = configs["v3"].replace(n_group=1, topk_group=1, **{field: 2**30})
    with pytest.raises(UserError, match=f"{field} is {2**30}"):
        names.to_internal({str(i): torch.zeros(1) for i in range(100)}, config)


def test_experts_of_mtp_modules_count_as_well(configs):
    config: ModelConfig = configs["v3"].replace(
        first_k_dense_replace=99, n_routed_experts=2**30, n_group=1, topk_group=1
    )
    with pytest.raises(UserError, match=f"n_routed_experts is {2**30}"):
        names.to_internal({str(i): torch.zeros(1) for i in range(100)}, config)


def test_a_layer_number_of_5000_digits(configs, random_tensors):
    public = names.to_public(random_tensors(configs["llama"]), configs["llama"])
    with pytest.raises(UserError, match="unknown tensors"):
        names.to_internal({**public, f"model.layers.{'9' * 5000}.x": torch.zeros(1)}, configs["llama"])


def test_the_published_models_have_the_known_number_of_parameters():
    from minga.config.presets import v2_lite, v3

    for config, billions in ((v3(), 671.026), (v2_lite(), 15.706)):
        main = config.replace(num_nextn_predict_layers=0)
        total = sum(torch.Size(e.shape).numel() for e in names.hf_table(main).values())
        bias = sum(e.shape[0] for name, e in names.hf_table(main).items() if name.endswith("e_score_correction_bias"))
        assert round((total - bias) / 1e9, 3) == billions


def test_gguf_names_cover_the_same_tensors(config):
    table = names.gguf_table(config)
    wanted = {e.internal for e in names.hf_table(config).values() if e.role is names.Role.PART}
    assert {entry.internal for entry in table.values()} == wanted
    assert "token_embd.weight" in table
    assert all(name.startswith(("blk.", "token_embd", "output")) for name in table)
