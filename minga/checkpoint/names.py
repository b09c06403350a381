"""The one table of tensor names: what Hugging Face, GGUF and this code call each tensor of a model, and its shape.

Our names are Hugging Face's with two exceptions. The routed experts of a layer are stacked, so that one matrix product
can use them, and a multi-token prediction (MTP) module stands beside the layers instead of after them:

  public   model.layers.3.mlp.experts.7.gate_proj.weight  (F, D)      model.layers.61.eh_proj.weight
  GGUF     blk.3.ffn_gate_exps.weight                     (E, F, D)   blk.61.nextn.eh_proj.weight
  ours     model.layers.3.mlp.experts.gate_up_proj        (E, 2F, D)  mtp.0.eh_proj.weight

Public files also carry tensors that the model has no use for. Each MTP module repeats the embedding and the head; these
are dropped on load and written again on save. Where a model has no shared expert, transformers still builds one of
width 0 and wants its (empty) tensors; and DeepSeek-V3's router bias exists there even if the routing ignores it. Such
fillers are dropped when they are zero, and written as zeros.

A weight in few bits is an int8 `X.weight`, or a uint8 one of four bytes for eight 4-bit numbers of a row, with a floating
`X.weight_scale` beside it, whose first dimension is the weight's; or block FP8: an E4M3 `X.weight` and
`X.weight_scale_inv`, one number a block, so that a row of the scale stands for many rows of the weight.
The table lists weights only: a scale follows its weight through every renaming and stacking.

  B batch, D model, H heads, G key heads, K head dim, C latent, R rope dim, E experts, F expert hidden, V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from minga.config.model import ModelConfig
from minga.errors import UserError
from minga.kernels.panels import Empty
from minga.quant.blocks import Format, Stored

SCALE, SCALE_INV = "_scale", "_scale_inv"  # what the name of a weight's scale adds to the weight's; of one in block FP8
_FEW_BITS = (torch.int8, torch.uint8, torch.float8_e4m3fn)
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SCALES = _FLOATS | {torch.float8_e8m0fnu}
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # computed from the config; old files stored it
_ROUTER_BIAS = "e_score_correction_bias"
# ends of names whose type no load or save changes
KEEP_TYPE = (_ROUTER_BIAS, "exp_probs_b.bias", f".weight{SCALE}", f".weight{SCALE_INV}")


class Role(Enum):
    PART = auto()  # a tensor of the model
    COPY = auto()  # repeats another tensor: dropped on load, written on save
    FILLER = auto()  # zeros (or nothing) that transformers asks for and we have no use for


class Row(NamedTuple):
    """One line of the table: the names and the shape of one tensor, and the config.json key that asks for it.

    With `experts` > 0 the line stands for that many tensors, `{}` in `hf` being the number of the expert. They share
    the tensor `internal`, where each takes `shape[0]` of the `stacked_rows` rows, from row `first_row` on.
    """

    internal: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    key: str
    role: Role = Role.PART
    experts: int = 0
    first_row: int = 0
    stacked_rows: int = 0


class Entry(NamedTuple):
    """Where one public tensor belongs: `tensors[internal][place]`, where the whole of it has the shape `whole`."""

    internal: str
    shape: tuple[int, ...]
    key: str
    role: Role
    place: tuple[int | slice, ...] = ()
    whole: tuple[int, ...] = ()


# ---------------------------------------------------------------------------------------------------- the table


def rows(config: ModelConfig) -> Iterator[Row]:
    """Every tensor of a model, in the order of the forward pass."""
    V, D = config.vocab_size, config.hidden_size
    yield Row("model.embed_tokens.weight", "model.embed_tokens.weight", "token_embd.weight", (V, D), "vocab_size")
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer, f"model.layers.{layer}.")
    yield Row("model.norm.weight", "model.norm.weight", "output_norm.weight", (D,), "hidden_size")
    if not config.tie_word_embeddings:
        yield Row("lm_head.weight", "lm_head.weight", "output.weight", (V, D), "tie_word_embeddings")
    for depth in range(config.num_nextn_predict_layers):
        yield from _mtp(config, depth)


def _mtp(config: ModelConfig, depth: int) -> Iterator[Row]:
    """V3 section 2.2, at the public layer number `num_hidden_layers + depth`."""
    V, D, layer = config.vocab_size, config.hidden_size, config.num_hidden_layers + depth
    key, ours, hf, gguf = "num_nextn_predict_layers", f"mtp.{depth}.", f"model.layers.{layer}.", f"blk.{layer}.nextn."
    embed = "model.embed_tokens.weight"
    head = embed if config.tie_word_embeddings else "lm_head.weight"
    yield Row(embed, f"{hf}embed_tokens.weight", f"{gguf}embed_tokens.weight", (V, D), key, Role.COPY)
    yield Row(f"{ours}enorm.weight", f"{hf}enorm.weight", f"{gguf}enorm.weight", (D,), key)
    yield Row(f"{ours}hnorm.weight", f"{hf}hnorm.weight", f"{gguf}hnorm.weight", (D,), key)
    yield Row(f"{ours}eh_proj.weight", f"{hf}eh_proj.weight", f"{gguf}eh_proj.weight", (D, 2 * D), key)
    yield from _layer(config, layer, f"{ours}block.")
    yield Row(f"{ours}norm.weight", f"{hf}shared_head.norm.weight", f"{gguf}shared_head_norm.weight", (D,), key)
    yield Row(head, f"{hf}shared_head.head.weight", f"{gguf}shared_head_head.weight", (V, D), key, Role.COPY)


def _layer(config: ModelConfig, layer: int, ours: str) -> Iterator[Row]:
    """One transformer layer, `ours` being the prefix of its internal names."""
    D, hf, gguf = config.hidden_size, f"model.layers.{layer}.", f"blk.{layer}."
    parts = [Row("input_layernorm.weight", "", "attn_norm.weight", (D,), "num_hidden_layers")]
    parts += _latent_attention(config) if config.is_mla else _grouped_attention(config)
    parts += [Row("post_attention_layernorm.weight", "", "ffn_norm.weight", (D,), "num_hidden_layers")]
    parts += _experts(config) if config.is_moe_layer(layer) else _dense(config)
    for row in parts:
        yield row._replace(internal=ours + row.internal, hf=hf + (row.hf or row.internal), gguf=gguf + row.gguf)


def _linear(name: str, gguf: str, shape: tuple[int, int], key: str, bias_key: str | None = None) -> list[Row]:
    """A weight (out, in) and, if a config key says so, its bias. Names are relative to the layer."""
    weight = Row(f"{name}.weight", "", f"{gguf}.weight", shape, key)
    return [weight, Row(f"{name}.bias", "", f"{gguf}.bias", shape[:1], bias_key)] if bias_key else [weight]


def _grouped_attention(config: ModelConfig) -> list[Row]:
    D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    bias = "attention_bias" if config.qkv_bias else None
    parts = _linear("self_attn.q_proj", "attn_q", (H * K, D), "num_attention_heads", bias)
    parts += _linear("self_attn.k_proj", "attn_k", (G * K, D), "num_key_value_heads", bias)
    parts += _linear("self_attn.v_proj", "attn_v", (G * K, D), "num_key_value_heads", bias)
    if config.qk_norm:
        parts += [Row(f"self_attn.{x}_norm.weight", "", f"attn_{x}_norm.weight", (K,), "model_type") for x in "qk"]
    o_bias = "attention_bias" if config.o_bias else None
    return parts + _linear("self_attn.o_proj", "attn_output", (D, H * K), "num_attention_heads", o_bias)


def _latent_attention(config: ModelConfig) -> list[Row]:
    D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    assert C is not None
    bias = "attention_bias" if config.attention_bias else None
    query, rank = H * config.qk_head_dim, config.q_lora_rank
    if rank is None:
        parts = _linear("self_attn.q_proj", "attn_q", (query, D), "q_lora_rank")
    else:
        parts = _linear("self_attn.q_a_proj", "attn_q_a", (rank, D), "q_lora_rank", bias)
        parts += [Row("self_attn.q_a_layernorm.weight", "", "attn_q_a_norm.weight", (rank,), "q_lora_rank")]
        parts += _linear("self_attn.q_b_proj", "attn_q_b", (query, rank), "q_lora_rank")
    up = H * (config.qk_nope_head_dim + config.v_head_dim)
    parts += _linear("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", (C + R, D), "kv_lora_rank", bias)
    parts += [Row("self_attn.kv_a_layernorm.weight", "", "attn_kv_a_norm.weight", (C,), "kv_lora_rank")]
    parts += _linear("self_attn.kv_b_proj", "attn_kv_b", (up, C), "kv_lora_rank")
    return parts + _linear("self_attn.o_proj", "attn_output", (D, H * config.v_head_dim), "v_head_dim", bias)


def _dense(config: ModelConfig) -> list[Row]:
    key = "first_k_dense_replace" if config.n_routed_experts else "model_type"
    return _gated("mlp.", "", config, config.intermediate_size, key)


def _gated(name: str, gguf: str, config: ModelConfig, hidden: int, key: str) -> list[Row]:
    """Gate, up and down of one feed-forward block."""
    D, bias = config.hidden_size, "mlp_bias" if config.mlp_bias else None
    parts = _linear(f"{name}gate_proj", f"ffn_gate{gguf}", (hidden, D), key, bias)
    parts += _linear(f"{name}up_proj", f"ffn_up{gguf}", (hidden, D), key, bias)
    return parts + _linear(f"{name}down_proj", f"ffn_down{gguf}", (D, hidden), key, bias)


def _experts(config: ModelConfig) -> list[Row]:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    parts = [Row("mlp.gate.weight", "", "ffn_gate_inp.weight", (E, D), "n_routed_experts")]
    if config.topk_method == "noaux_tc" or config.model_type == "deepseek_v3":
        role = Role.PART if config.topk_method == "noaux_tc" else Role.FILLER
        parts += [Row(f"mlp.gate.{_ROUTER_BIAS}", "", "exp_probs_b.bias", (E,), "topk_method", role)]
    for name, into, shape, first, height in (
        ("gate", "gate_up", (F, D), 0, 2 * F),
        ("up", "gate_up", (F, D), F, 2 * F),
        ("down", "down", (D, F), 0, D),
    ):
        ours, hf = f"mlp.experts.{into}_proj", f"mlp.experts.{{}}.{name}_proj.weight"
        gguf = f"ffn_{name}_exps.weight"
        parts += [Row(ours, hf, gguf, shape, "n_routed_experts", Role.PART, E, first, height)]
    shared = _gated("mlp.shared_experts.", "_shexp", config, config.n_shared_experts * F, "n_shared_experts")
    if not config.n_shared_experts:
        shared = [row._replace(role=Role.FILLER, key="n_shared_experts") for row in shared]
    return parts + shared


def hf_table(config: ModelConfig) -> dict[str, Entry]:
    """Public name -> place. Empty and repeated tensors are in it, with a role that says so."""
    table = {}
    for row in rows(config):
        for expert in range(row.experts):
            place = (expert, slice(row.first_row, row.first_row + row.shape[0]))
            whole = (row.experts, row.stacked_rows, *row.shape[1:])
            table[row.hf.format(expert)] = Entry(row.internal, row.shape, row.key, row.role, place, whole)
        if not row.experts:
            table[row.hf] = Entry(row.internal, row.shape, row.key, row.role)
    return table


def gguf_table(config: ModelConfig) -> dict[str, Entry]:
    """GGUF name -> place. There the experts of a layer are stacked too, but gate and up stand apart."""
    table = {}
    for row in rows(config):
        if row.experts:
            place = (slice(None), slice(row.first_row, row.first_row + row.shape[0]))
            whole = (row.experts, row.stacked_rows, *row.shape[1:])
            table[row.gguf] = Entry(row.internal, (row.experts, *row.shape), row.key, row.role, place, whole)
        elif row.role is not Role.FILLER:
            table[row.gguf] = Entry(row.internal, row.shape, row.key, row.role)
    return table


def matrices(config: ModelConfig) -> set[str]:
    """Our names of what may be stored in few bits: all matrices but the routers'."""
    parts = {row.internal for row in rows(config) if row.role is Role.PART and len(row.shape) > 1}
    return {name for name in parts if not name.endswith(".mlp.gate.weight")}


def count_mtp(public_names: Iterable[str], num_hidden_layers: int) -> int:
    """How many MTP modules a file really holds: transformers drops them on save and leaves the config's promise."""
    names, count = set(public_names), 0
    while f"model.layers.{num_hidden_layers + count}.eh_proj.weight" in names:
        count += 1
    return count


# ---------------------------------------------------------------------------------------------------- both directions


def to_internal(public: Mapping[str, Tensor], config: ModelConfig, *, where: str = "state dict") -> dict[str, Tensor]:
    """Public names -> ours. Experts are copied into their stacks, everything else is the same tensor as before.

    Raises `UserError`, naming up to three tensors and `where` they were, if any is missing, unknown or misshapen.
    """
    check_size(config, len(public), where=where)
    collector = Collector(hf_table(config), config, where=where)
    collector.check_names(public)
    for name, tensor in public.items():
        collector.add(name, tensor)
    return collector.finish()


def to_public(internal: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names -> public. Nothing is copied: experts are slices of their stacks, repeated tensors the same object.

    Raises `UserError` if the tensors are not those of a model with this config.
    """
    table = hf_table(config)
    known = {entry.internal for entry in table.values()}
    given = {name for name in internal if not (config.tie_word_embeddings and name == "lm_head.weight")}
    unknown = sorted(name for name in given if name not in known and _scaled(name)[0] not in known)
    if unknown:
        raise UserError(f"unknown tensors: {_first_three(unknown)} (state dict). the config describes no such part")
    missing = sorted({e.internal for e in table.values() if e.role is Role.PART and e.internal not in given})
    if missing:
        raise UserError(f"tensors are missing: {_first_three(missing)} (state dict). a model with this config has them")
    public: dict[str, Tensor] = {}
    for name, entry in table.items():
        if entry.role is Role.FILLER:
            public[name] = torch.zeros(entry.shape, dtype=_filler_dtype(name, internal))
            continue
        tensor = internal[entry.internal]
        shape = _stored_shape(entry.whole or entry.shape, tensor.dtype)
        if tuple(tensor.shape) != shape:
            raise UserError(_shape_message(entry.internal, tuple(tensor.shape), shape, "state dict"))
        public[name] = tensor[entry.place] if entry.place else tensor
        for suffix in (SCALE, SCALE_INV):
            scale = internal.get(entry.internal + suffix)
            if scale is not None:
                public[name + suffix] = scale[_place_of(entry, scale.shape[1])] if entry.place else scale
    return public


def _scaled(name: str) -> tuple[str, str]:
    """The name of the weight that a scale belongs to, and what the scale's adds to it; nothing for another tensor's."""
    suffix = next((suffix for suffix in (SCALE, SCALE_INV) if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def _place_of(entry: Entry, height: int) -> tuple[int | slice, ...]:
    """`entry.place` in a stack that has `height` rows for the weight's `whole[1]`: as many, or one for each block."""
    rows = entry.place[1]
    assert isinstance(rows, slice)
    return entry.place[0], slice(rows.start * height // entry.whole[1], rows.stop * height // entry.whole[1])


def _filler_dtype(name: str, internal: Mapping[str, Tensor]) -> torch.dtype:
    dtype = internal["model.norm.weight"].dtype
    return torch.float32 if name.endswith(_ROUTER_BIAS) else dtype


def check_size(config: ModelConfig, num_tensors: int, *, where: str, experts_apart: bool = True) -> None:
    """Refuses a config that asks for far more tensors than there are, before a table of them is built."""
    asked = 0
    for row in rows(config):
        if row.role is Role.PART:
            asked += row.experts if row.experts and experts_apart else 1
        if asked > 2 * num_tensors + 100:  # a file that lacks a few is told which ones
            experts = f" and n_routed_experts is {config.n_routed_experts}" if config.n_routed_experts else ""
            raise UserError(
                f"num_hidden_layers is {config.num_hidden_layers}{experts}, but there are only {num_tensors} tensors "
                f"({where}). check the config, or download the files again"
            )


class Collector:
    """Gathers tensors, one at a time, into a state dict under internal names.

    A stack of experts is allocated when its first expert comes, and each is copied to its place, so that reading from
    a memory-mapped file never holds two copies of a layer. `empty` gives the memory of stacks and of what `add_stored` takes,
    as torch.empty does. `dtype`, if given, is what floating tensors become; the
    router's bias stays float32 (steps of 0.001 vanish in bfloat16), weights in few bits and their scales stay as they are.
    Of block FP8 the caller has checked that the scales are as many as the blocks.
    """

    def __init__(
        self,
        table: Mapping[str, Entry],
        config: ModelConfig,
        *,
        where: str,
        dtype: torch.dtype | None = None,
        empty: Empty = torch.empty,
    ) -> None:
        self._empty = empty
        self._table = table
        self._config = config
        self._where = where
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        self._formats: dict[str, Format] = {}  # of what `add_stored` took
        self._stacks: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # what a row of each looks like
        self._scales: set[str] = set()  # table names, one for each scale
        self._quantised: set[str] = set()  # and for each weight in few bits

    def check_names(self, names: Iterable[str]) -> None:
        """Raises `UserError` for missing or unknown names. Call it before reading anything large."""
        given = set(names)
        missing = [n for n, entry in self._table.items() if entry.role is Role.PART and n not in given]
        if missing:
            key = self._table[missing[0]].key
            raise UserError(
                f"tensors are missing: {_first_three(missing)} ({self._where}). "
                f"check {key!r} in config.json, or download the files again"
            )
        unknown = sorted(n for n in given if self._base(n) is None and not self._is_ignored(n))
        if unknown:
            raise UserError(
                f"unknown tensors: {_first_three(unknown)} ({self._where}). a {self._config.model_type} model with "
                f"this config has no such part: check {self._likely_key(unknown[0])!r} in config.json"
            )

    def wants(self, name: str) -> bool:
        """False for a tensor that the model has no use for."""
        return self._base(name) is not None

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises `UserError` for a wrong shape or type. Call it for each tensor before one is read, if that is cheap."""
        base = self._base(name)
        if base is None:
            return  # check_names has let it pass
        entry, suffix = self._table[base], name.removeprefix(base)
        expected = _stored_shape(entry.shape, dtype)
        if suffix != SCALE_INV and (shape[:1] != expected[:1] if suffix else shape != expected):
            raise UserError(_shape_message(name, shape, expected[:1] if suffix else expected, self._where))
        known = dtype in _SCALES if suffix else dtype in _FLOATS or (dtype in _FEW_BITS and len(shape) > 1)
        if not known:
            kind = str(dtype).removeprefix("torch.")
            raise UserError(f"{name} holds {kind} numbers ({self._where}). convert the model to bfloat16 or float32")
        if entry.place:
            stack = entry.internal + suffix
            row = shape[len(entry.shape) - 1 :], dtype if suffix else self._becomes(name, dtype)
            if self._stacks.setdefault(stack, row) != row:
                raise UserError(
                    f"the experts of {stack} differ in type or in their scales' shape ({self._where}). "
                    "convert the model to one type"
                )

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor under its public name. Raises `UserError` for a wrong shape or type."""
        self.check(name, tuple(tensor.shape), tensor.dtype)
        base = self._base(name)
        if base is None:
            return
        entry, suffix = self._table[base], name.removeprefix(base)
        if entry.role is Role.FILLER and tensor.any():
            raise UserError(
                f"{name} is not zero, but the config uses no such tensor ({self._where}). "
                f"check {entry.key!r} in config.json"
            )
        if suffix:
            self._scales.add(base)
        elif tensor.dtype in _FEW_BITS:
            self._quantised.add(base)
        if entry.role is Role.PART:
            self._place(entry, tensor if suffix else tensor.to(self._becomes(name, tensor.dtype)), suffix)

    def add_stored(self, name: str, stored: Stored) -> None:
        """Takes a matrix under its public name as it is stored. Raises `UserError` for a wrong shape.

        Those that share a stack must be in one format, and the table must know the name.
        """
        entry = self._table[name]
        if tuple(stored.shape) != entry.shape:
            raise UserError(_shape_message(name, stored.shape, entry.shape, self._where))
        self._formats[entry.internal] = stored.format
        for suffix, part in (("", stored.data), (SCALE, stored.factors)):
            if part is not None:
                whole = entry.place or self._empty is torch.empty
                self._place(entry, part if whole else self._empty(*part.shape, dtype=part.dtype).copy_(part), suffix)

    def take_stored(self) -> dict[str, Stored]:
        """What `add_stored` took, whole stacks together, by our names; `finish` gives the rest."""
        taken = {}
        whole = {entry.internal: entry.whole or entry.shape for entry in self._table.values()}
        for name, format in self._formats.items():
            data, factors = self._tensors.pop(name), self._tensors.pop(name + SCALE, None)
            taken[name] = Stored(format, torch.Size(whole[name]), data, factors)
        return taken

    def finish(self) -> dict[str, Tensor]:
        """The state dict. Raises `UserError` if a weight in few bits and its scale do not come together."""
        alone = sorted(self._quantised ^ self._scales)
        if alone:
            is_weight = alone[0] in self._quantised
            what = "a weight in few bits without its scale" if is_weight else "a scale without such a weight"
            raise UserError(f"{alone[0]}: {what} ({self._where}). quantise the model again")
        return self._tensors

    def _base(self, name: str) -> str | None:
        """The table's name for a tensor or for the weight a scale belongs to; None if there is none."""
        if name in self._table:
            return name
        weight, suffix = _scaled(name)
        return weight if suffix and weight.endswith(".weight") and weight in self._table else None

    def _is_ignored(self, name: str) -> bool:
        tied_head = self._config.tie_word_embeddings and name.startswith("lm_head.weight")
        return bool(_IGNORED.search(name)) or tied_head

    def _becomes(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type in which a weight of type `dtype` is kept."""
        if dtype in _FEW_BITS:
            return dtype
        return torch.float32 if name.endswith(KEEP_TYPE) else self._dtype or dtype

    def _place(self, entry: Entry, tensor: Tensor, suffix: str) -> None:
        internal = entry.internal + suffix
        if not entry.place:
            self._tensors[internal] = tensor
            return
        height = entry.whole[1] * tensor.shape[-2] // entry.shape[-2]
        stack = self._tensors.get(internal)
        if stack is None:
            tail = tensor.shape[len(entry.shape) - 1 :]
            stack = self._tensors[internal] = self._empty(entry.whole[0], height, *tail, dtype=tensor.dtype)
        stack[_place_of(entry, height)] = tensor

    def _likely_key(self, name: str) -> str:
        """Which key of the config, were it different, would explain a tensor that the table does not list."""
        layer = re.match(r"(?:model\.layers|blk)\.(\d{1,18})\.", name)
        if layer and int(layer[1]) >= self._config.num_hidden_layers:
            is_mtp = any(word in name for word in ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"))
            return "num_nextn_predict_layers" if is_mtp else "num_hidden_layers"
        for part, key in _KEY_OF_PART:
            if part in name:
                return key
        return "model_type"


_KEY_OF_PART = (
    (".q_a_", "q_lora_rank"),
    (".q_b_", "q_lora_rank"),
    (".attn_q_a", "q_lora_rank"),
    ("shared_experts", "n_shared_experts"),
    ("_shexp", "n_shared_experts"),
    (".experts.", "n_routed_experts"),
    ("_exps.", "n_routed_experts"),
    ("mlp.", "first_k_dense_replace"),
    ("weight_scale_inv", "quantization_config"),
    (".qweight", "quantization_config"),
    (".scales", "quantization_config"),
    ("_norm.weight", "model_type"),
    (".bias", "attention_bias"),
    ("lm_head", "tie_word_embeddings"),
)


def _stored_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """What a float matrix of `shape` is in this type."""
    return (*shape[:-1], -(-shape[-1] // 8) * 4) if dtype == torch.uint8 else shape


def _shape_message(name: str, given: Iterable[int], shape: tuple[int, ...], where: str) -> str:
    found = " x ".join(map(str, given)) or "no dimensions"
    asked = " x ".join(map(str, shape))
    return f"{name} is {found}, but the config asks for {asked} ({where}). the two are not of one model"


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
