"""The architecture of a model: one frozen dataclass, read from and written to the public `config.json`.

Field names are the keys Hugging Face uses, so that a config, a paper's table and this file can be read side by side.
Five `model_type`s are known: `deepseek_v2`, `deepseek_v3` (multi-head latent attention, experts, multi-token prediction)
and `llama`, `qwen2`, `qwen3` (grouped-query attention, dense). What the names leave open is decided here, once:

- `rope_interleave`: DeepSeek rotates neighbouring pairs (x0, x1), Llama and Qwen the two halves of a head.
- `attention_bias` means q_a, kv_a and o for DeepSeek, q, k, v and o for Llama and Qwen3; Qwen2 always has q, k, v.
- `norm_topk_prob` is DeepSeek-V3's; V2's router never normalises (transformers 5.23 ignores the key there, and so do we).

Impossible numbers are refused at construction with the name of the field, so nothing downstream has to check them again.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from minga.errors import UserError

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MAX_ROPE = 1e15  # keeps products and quotients of a model's rope numbers finite, and above 0
_EXPECTED = {"use_cache": True, "attention_dropout": 0.0}  # keys that other readers want and we have no use for
MAX_SIZE = 2**31  # no dimension of a real model comes near; keeps products of two inside 64 bits
_MLA_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MLP_BIAS = ("llama", "deepseek_v2")  # families whose feed-forward may have biases
_EXPERT_KEYS = ("num_experts_per_tok", "moe_intermediate_size")
_SINGLE_FILE_KEYS = ("architectures", "auto_map", "transformers_version", "quantization_config", "torch_dtype", "dtype")


def _is_number(value: Any) -> TypeGuard[float]:
    """A finite number of float64's range; a bool is none, nor is an integer of 400 digits, which JSON may hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched beyond the trained context.

    `rope_type` is one of `ROPE_TYPES`. YaRN is Peng et al. 2023 (arXiv 2309.00071); `mscale_all_dim` is DeepSeek's
    addition, which also multiplies the softmax scale (see `ModelConfig.attention_scale`).
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope type {self.rope_type!r} is not known (rope_scaling). known: {', '.join(ROPE_TYPES)}")
        for name in _ROPE_NEEDS.get(self.rope_type, ()):
            if getattr(self, name) is None:
                raise UserError(f"rope type {self.rope_type!r} needs {name!r} (rope_scaling). add it to config.json")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            least = 0.0 if f.name.startswith("mscale") else 1 / _MAX_ROPE  # 0 turns DeepSeek's two factors off
            if (
                f.name not in ("rope_type", "truncate")
                and value is not None
                and not (_is_number(value) and least <= value <= _MAX_ROPE)
            ):
                raise UserError(
                    f"{f.name} is {value!r} (rope_scaling). it must be a positive number up to {_MAX_ROPE:g}"
                )
        if self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta} (config). it must be a number above 1")
        if not isinstance(self.truncate, bool):
            raise UserError(f"truncate is {self.truncate!r} (rope_scaling). it must be true or false")
        if self.rope_type == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise UserError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor} "
                "(rope_scaling). the band between them is blended: raise it"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> RopeConfig:
        """Reads either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        given: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            part = config.get(key)
            if part is not None and not isinstance(part, Mapping):
                raise UserError(f"{key} is {part!r} (config.json). it must be an object or null")
            given.update({k: v for k, v in (part or {}).items() if v is not None})
        if given.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
            raise UserError(
                "partial_rotary_factor is not supported (config.json). only models that rotate whole heads load"
            )
        values = {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}
        values["rope_type"] = given.get("rope_type", given.get("type", "default"))
        theta = given.get("rope_theta", config.get("rope_theta"))
        values["rope_theta"] = float(theta) if _is_number(theta) else 10000.0 if theta is None else theta
        if values["rope_type"] in ("yarn", "llama3"):
            values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
            trained, stretched = values["original_max_position_embeddings"], config.get("max_position_embeddings")
            if values["rope_type"] == "yarn" and _is_number(trained) and trained > 0 and _is_number(stretched):
                values.setdefault("factor", stretched / trained)  # as transformers does when the key is missing
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Both spellings, because vLLM reads the old one and transformers 5 the new one."""
        set_fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.truncate:
            del set_fields["truncate"]  # the default everywhere; older readers do not know the key
        scaling = {k: v for k, v in set_fields.items() if k not in ("rope_theta", "rope_type")}
        return {
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if self.rope_type == "default"
            else {"type": self.rope_type, **scaling, "rope_type": self.rope_type},
            "rope_parameters": set_fields,
        }


@dataclass(frozen=True)
class ModelConfig:
    """One Transformer. `kv_lora_rank` set: multi-head latent attention; `n_routed_experts` > 0: experts.

    Raises `UserError`, naming the field, for numbers that make no model.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64  # grouped-query attention only; latent attention has the three dimensions below
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    rope: RopeConfig = RopeConfig()
    rope_interleave: bool = True
    # multi-head latent attention (V2 paper, section 2.1)
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # experts (V2 section 2.2, V3 section 2.1.2)
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"  # greedy | group_limited_greedy (V2) | noaux_tc (V3: correction bias)
    scoring_func: str = "sigmoid"  # softmax (V2) | sigmoid (V3)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction (V3 section 2.2)
    num_nextn_predict_layers: int = 0
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys we do not use, kept so that a round trip loses nothing

    # ------------------------------------------------------------------ what follows from the fields

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def rope_style(self) -> str:
        """How dimensions are paired: `halves`, `interleaved`, or `complex` (interleaved, in float32 complex numbers)."""
        return "complex" if self.model_type == "deepseek_v2" else "interleaved" if self.rope_interleave else "halves"

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.is_mla else self.head_dim

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2" or self.attention_bias

    @property
    def o_bias(self) -> bool:
        return self.model_type != "qwen2" and self.attention_bias

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers one token leaves in the attention cache, all layers (V3: 61 x 576 = 35,136)."""
        latent = self.kv_lora_rank + self.qk_rope_head_dim if self.kv_lora_rank is not None else None
        return self.num_hidden_layers * (latent or 2 * self.num_key_value_heads * self.head_dim)

    @property
    def attention_scale(self) -> float:
        """Softmax scale: 1/sqrt(head) and, under YaRN with `mscale_all_dim`, times m^2 (V3's inference code)."""
        scale = self.qk_head_dim**-0.5
        if (
            self.is_mla
            and self.rope.rope_type != "default"
            and self.rope.mscale_all_dim
            and (self.rope.factor or 1) > 1
        ):
            scale *= (0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor or 1) + 1.0) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def is_moe_layer(self, layer: int) -> bool:
        """Layer numbers from `num_hidden_layers` on are multi-token prediction modules: experts whenever there are any."""
        if self.n_routed_experts == 0:
            return False
        return layer >= self.num_hidden_layers or (
            layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
        )

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ the public format

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the dictionary of a `config.json`. Raises `UserError` for a missing key or a family that is not known."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"model_type {model_type!r} is not one that Minga opens (config.json). it opens: {known}")
        deepseek = model_type.startswith("deepseek")
        known_fields = {f.name for f in dataclasses.fields(cls)} - {"rope", "extra"}
        values = {k: v for k, v in config.items() if k in known_fields and v is not None}
        values["rope"] = RopeConfig.from_hf(config)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        required += ["kv_lora_rank", *_MLA_KEYS, "n_routed_experts"] if deepseek else []
        for key in required:
            if key not in values:
                raise UserError(f"{key!r} is missing (config.json). a {model_type} model cannot be built without it")
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if model_type not in _MLP_BIAS:
            values.pop("mlp_bias", None)  # transformers ignores the key there, and so do we
        if deepseek:
            v3 = model_type == "deepseek_v3"
            values.pop(
                "head_dim", None
            )  # transformers writes the rope dimension here; ours is for grouped queries only
            values.setdefault("topk_method", "noaux_tc" if v3 else "greedy")
            values.setdefault("scoring_func", "sigmoid" if v3 else "softmax")
            values.setdefault("norm_topk_prob", v3)
            values["rope_interleave"] = values.get("rope_interleave", True) if v3 else True
        else:
            values = {k: v for k, v in values.items() if k not in _DEEPSEEK_ONLY}
            values["rope_interleave"] = False
            if "head_dim" not in values:
                values["head_dim"] = _whole(values["hidden_size"], "hidden_size") // _whole(
                    values["num_attention_heads"], "num_attention_heads"
                )
            _refuse_sliding_window(config)
        used = known_fields | {"rope_theta", "rope_scaling", "rope_parameters", "model_type", *_SINGLE_FILE_KEYS}
        values["extra"] = {k: v for k, v in config.items() if k not in used and (k, v) not in _EXPECTED.items()}
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The dictionary for `config.json`, with every key that transformers, vLLM and llama.cpp's converter need.

        vLLM creates the router's bias only if `topk_method` is there, so a V3 model saved without it would lose it.
        """
        hf: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]], **self.extra}
        deepseek = self.is_mla
        for f in dataclasses.fields(self):
            skip = f.name in ("rope", "extra") or (f.name in _DEEPSEEK_ONLY and not deepseek)
            skip = (
                skip
                or (f.name == "head_dim" and deepseek)
                or (f.name == "mlp_bias" and self.model_type not in _MLP_BIAS)
            )
            if not skip:
                hf[f.name] = getattr(self, f.name)
        if isinstance(self.eos_token_id, tuple):
            hf["eos_token_id"] = list(self.eos_token_id)
        hf.update(self.rope.to_hf())
        return {**_EXPECTED, **hf}

    # ------------------------------------------------------------------ what cannot be

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise UserError(f"model_type {self.model_type!r} is not known (config). known: {', '.join(ARCHITECTURES)}")
        if self.hidden_act != "silu":
            raise UserError(
                f"hidden_act {self.hidden_act!r} is not supported (config). every family Minga opens uses silu"
            )
        _check_types(self)
        if self.is_mla != self.model_type.startswith("deepseek"):
            raise UserError(
                f"kv_lora_rank is {self.kv_lora_rank} in a {self.model_type} model (config). "
                "latent attention is DeepSeek's, and DeepSeek's only attention"
            )
        positive = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        positive += ["num_key_value_heads", "max_position_embeddings", "moe_layer_freq", "n_group", "topk_group"]
        positive += ["kv_lora_rank", *_MLA_KEYS] if self.is_mla else ["head_dim"]
        positive += list(_EXPERT_KEYS) if self.n_routed_experts else []
        positive += ["q_lora_rank"] if self.q_lora_rank is not None else []
        for name in positive:
            if not 0 < getattr(self, name) < MAX_SIZE:
                raise UserError(
                    f"{name} is {getattr(self, name)} (config). it must be a whole number from 1 to {MAX_SIZE - 1}"
                )
        for name in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            if not 0 <= getattr(self, name) < MAX_SIZE:
                raise UserError(f"{name} is {getattr(self, name)} (config). it must not be negative")
        if self.rope_dim % 2:
            raise UserError(
                f"the rotated head dimension is {self.rope_dim} (config). rotation works on pairs: make it even"
            )
        if self.rope_dim == 2 and self.rope.rope_type == "dynamic":
            raise UserError(
                "a rotated head dimension of 2 has no dynamic rope (config). its only frequency is always 1"
            )
        if not self.is_mla and self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads} (config). each key head must serve the same number of query heads"
            )
        if self.rms_norm_eps <= 0:
            raise UserError(f"rms_norm_eps is {self.rms_norm_eps} (config). it must be a small positive number")
        if self.initializer_range < 0:
            raise UserError(f"initializer_range is {self.initializer_range} (config). it must not be negative")
        if self.n_routed_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        experts, k, groups = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        if k > experts:
            raise UserError(f"num_experts_per_tok {k} is above n_routed_experts {experts} (config). lower it")
        if self.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise UserError(
                f"topk_method {self.topk_method!r} is not known (config). known: greedy, group_limited_greedy, noaux_tc"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise UserError(f"scoring_func {self.scoring_func!r} is not known (config). known: softmax, sigmoid")
        if self.topk_method == "greedy":
            return
        if experts % groups:
            raise UserError(
                f"n_group {groups} does not divide n_routed_experts {experts} (config). groups must be equal"
            )
        if self.topk_group > groups:
            raise UserError(f"topk_group {self.topk_group} is above n_group {groups} (config). lower it")
        if k > self.topk_group * (experts // groups):
            raise UserError(
                f"num_experts_per_tok {k} exceeds the experts of topk_group {self.topk_group} groups (config). raise topk_group"
            )
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise UserError(
                f"n_group {groups} leaves one expert a group (config). V3 scores a group by its two best experts"
            )


_DEEPSEEK_ONLY = frozenset(
    {"q_lora_rank", "kv_lora_rank", *_MLA_KEYS, "n_routed_experts", "n_shared_experts", *_EXPERT_KEYS}
    | {
        "first_k_dense_replace",
        "moe_layer_freq",
        "n_group",
        "topk_group",
        "topk_method",
        "scoring_func",
        "norm_topk_prob",
    }
    | {"routed_scaling_factor", "num_nextn_predict_layers", "rope_interleave"}
)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UserError(f"{name} is {value!r} (config). it must be a positive whole number")
    return value


def _check_types(config: ModelConfig) -> None:
    """Refuses a string, list, bool or fraction where the annotation says a number."""
    for f in dataclasses.fields(config):
        value, annotation = getattr(config, f.name), str(f.type)
        if annotation.startswith("int") and value is not None:
            items = value if isinstance(value, tuple) else (value,)
            ok = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
        elif annotation == "float":
            ok = _is_number(value)
        elif annotation == "bool":
            ok = isinstance(value, bool)
        else:
            continue
        if not ok:
            kind = {"float": "a number", "bool": "true or false"}.get(annotation, "a whole number")
            raise UserError(f"{f.name} is {value!r} (config). it must be {kind}")


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, (list, tuple)):
        raise UserError(f"layer_types is {layer_types!r} (config.json). it must be a list")
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise UserError("sliding-window attention is not supported (config.json). only models with full attention load")
