"""GGUF files, llama.cpp's model format, read only: metadata, tokenizer and (quantised) tensors in one file.

  magic "GGUF", version, number of tensors, number of metadata entries
  metadata    key, type, value; strings and arrays carry their length
  infos       for each tensor: name, dimensions (fastest first), type, offset into the data
  data        from the next multiple of `general.alignment` on; each tensor begins at such a multiple

Every length and offset is checked against the size of the file before anything is allocated or read: a model file comes
from strangers. What fails is a `UserError` with the file's name and the byte where it went wrong. Texts take several
times their bytes as Python objects, so the header has limits of its own, far above those of any real file.

Two things differ from the public format besides the names (`names`). For `llama` the converter reorders the rows of q
and k, because llama.cpp rotates neighbouring pairs where Hugging Face rotates halves; we order them back. (`qwen2` and
`qwen3` keep theirs, and `deepseek2` rotates pairs in both worlds.) And newer `deepseek2` files hold kv_b in two parts,
ready for absorbed attention: k_b, transposed, and v_b.

The config is rebuilt from metadata, shapes, and which tensors there are: see `config_from_gguf`.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minga.checkpoint import names
from minga.checkpoint.ggml_types import OTHER_NAMES, TYPES, GGMLType, dequantise, keep
from minga.config.model import ModelConfig
from minga.errors import UserError
from minga.kernels.panels import Empty
from minga.quant.blocks import Stored

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_HEADER = 1 << 26  # bytes; the largest vocabularies take 10 MB
_MAX_FREQUENCIES = 1 << 12  # of one head; the widest heads have 128
_MAX_ENTRIES = 1 << 16  # metadata entries, or tensors; DeepSeek-V3 has 1,025 tensors


# ---------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class TensorInfo:
    """`shape` is in our order, slowest first; `offset` counts from the start of the file."""

    kind: GGMLType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GGUF:
    """An open file: `metadata` (plain Python values; texts in lists, numbers in `array.array`s), `tensors`, and `read`.

    The file is mapped, not read: numbers come from the disk when a tensor is first used.
    """

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor as stored, 1-d uint8, mapped."""
        info = self.tensors[name]
        return torch.frombuffer(self._data, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)

    def read(self, name: str) -> Tensor:
        """One tensor in float32. F32 is a private view of the file: writing to it changes no file."""
        info = self.tensors[name]
        return dequantise(self.raw(name), info.kind).view(info.shape)


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Opens a GGUF file of version 2 or 3. Raises `UserError` if it is damaged, or of a kind we do not read."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise UserError(f"the file is empty ({file}). download it again")
            # private: torch wants writable memory, and must not write to the file
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(f"cannot be opened: {error.strerror} ({file}). check the path") from error
    metadata, tensors = _Parser(file, data).parse()
    return GGUF(file, data, metadata, tensors)


class _Parser:
    """A cursor over the header."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.size = len(data)
        self.end = min(self.size, _MAX_HEADER)
        self.beyond = "the file" if self.end == self.size else f"the {_MAX_HEADER} bytes that a header may have"
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._take(4, "the magic number") != b"GGUF":
            raise self._damaged("it does not begin with GGUF", at=0)
        version = self._scalar("<I", "the version")
        if version not in (2, 3):
            what = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise UserError(
                f"the file is {what}, and Minga reads little-endian GGUF 2 and 3 ({self.file}). convert the model again"
            )
        num_tensors = self._count("<Q", 24, "tensors")  # a tensor's info has at least 24 bytes: lengths, type, offset
        num_entries = self._count("<Q", 13, "metadata entries")
        if max(num_tensors, num_entries) > _MAX_ENTRIES:
            raise self._damaged(f"{num_tensors} tensors and {num_entries} metadata entries are too many", at=8)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            at = self.at
            key = self._string("a metadata key")
            if key in metadata:
                raise self._damaged(f"the metadata key {key!r} comes twice", at=at)
            metadata[key] = self._value(self._scalar("<I", f"the type of {key!r}"), key)
        if metadata.get("split.count", 1) != 1:
            raise UserError(f"the file is one part of several ({self.file}). join them with llama-gguf-split --merge")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment!r} and not a power of two from 8 on")
        infos = self._infos(num_tensors)
        start = -(-self.at // alignment) * alignment
        return metadata, {name: self._locate(name, info, start, alignment) for name, info in self._in_order(infos)}

    def _infos(self, count: int) -> dict[str, tuple[TensorInfo, int]]:
        """Name -> (info with a relative offset, where it stands)."""
        infos: dict[str, tuple[TensorInfo, int]] = {}
        for _ in range(count):
            at = self.at
            name = self._string("a tensor's name")
            if name in infos:
                raise self._damaged(f"the tensor {name!r} comes twice", at=at)
            num_dims = self._scalar("<I", f"the dimensions of {name!r}")
            if not 1 <= num_dims <= _MAX_DIMS:
                raise self._damaged(f"{name!r} has {num_dims} dimensions", at=at)
            dims = [self._scalar("<Q", f"the dimensions of {name!r}") for _ in range(num_dims)]
            if 0 in dims:
                raise self._damaged(f"{name!r} is empty: its dimensions are {dims}", at=at)
            kind = self._kind(name, self._scalar("<I", f"the type of {name!r}"))
            offset = self._scalar("<Q", f"the offset of {name!r}")
            if dims[0] % kind.numbers:
                raise self._damaged(f"rows of {dims[0]} numbers in {name!r} are not whole {kind.name} blocks", at=at)
            num_bytes = math.prod(dims) // kind.numbers * kind.num_bytes
            infos[name] = TensorInfo(kind, tuple(reversed(dims)), offset, num_bytes), at
        return infos

    def _kind(self, name: str, number: int) -> GGMLType:
        if number in TYPES:
            return TYPES[number]
        if number in OTHER_NAMES:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise UserError(
                f"the tensor {name!r} is in {OTHER_NAMES[number]}, which Minga does not read "
                f"({self.file}, byte {self.at - 4}). take a version in one of: {known}"
            )
        raise self._damaged(f"the tensor {name!r} has the unknown type {number}", at=self.at - 4)

    def _in_order(self, infos: Mapping[str, tuple[TensorInfo, int]]) -> Iterable[tuple[str, tuple[TensorInfo, int]]]:
        """The infos as they are, once it is sure that no two tensors share bytes."""
        end = 0
        for name, (info, at) in sorted(infos.items(), key=lambda item: (item[1][0].offset, item[1][0].num_bytes)):
            if info.offset < end:
                raise self._damaged(f"the tensor {name!r} overlaps another", at=at)
            end = info.offset + info.num_bytes
        return infos.items()

    def _locate(self, name: str, found: tuple[TensorInfo, int], start: int, alignment: int) -> TensorInfo:
        info, at = found
        if info.offset % alignment:
            raise self._damaged(f"the offset of {name!r} is no multiple of {alignment}", at=at)
        if start + info.offset + info.num_bytes > self.size:
            raise self._damaged(
                f"the tensor {name!r} ends at byte {start + info.offset + info.num_bytes}, beyond the file", at=at
            )
        return TensorInfo(info.kind, info.shape, start + info.offset, info.num_bytes)

    # ------------------------------------------------------------------ values

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind != _ARRAY:
            return self._scalar(self._format(kind, key), f"the value of {key!r}")
        item = self._scalar("<I", f"the type of {key!r}")
        if item == _STRING:
            return self._strings(self._count("<Q", 8, f"items of {key!r}"), key)
        form = self._format(item, key)
        count = self._count("<Q", struct.calcsize(form), f"items of {key!r}")
        raw = self._take(count * struct.calcsize(form), f"the items of {key!r}")
        return array(form[1].replace("?", "B"), raw)

    def _format(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"the value of {key!r} has the unknown type {kind}", at=self.at - 4)
        return _SCALARS[kind]

    def _scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), what))[0]

    def _count(self, form: str, least: int, what: str) -> int:
        """A number of items of at least `least` bytes each, which must fit into the rest of the file."""
        at = self.at
        count: int = self._scalar(form, f"the number of {what}")
        if count > (self.end - self.at) // least:
            raise self._damaged(f"{count} {what} do not fit into {self.beyond}", at=at)
        return count

    def _string(self, what: str) -> str:
        at = self.at
        raw = self._take(self._count("<Q", 1, f"bytes of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8", at=at) from None

    def _strings(self, count: int, key: str) -> list[str]:
        """As `_string`, `count` times, without its cost: vocabularies have a hundred thousand."""
        data, at, end, length = self.data, self.at, self.end, struct.Struct("<Q")
        strings = []
        try:
            for _ in range(count):
                (n,) = length.unpack_from(data, at)
                if n > end - at - 8:
                    raise self._damaged(f"an item of {key!r} ends beyond {self.beyond}", at=at)
                strings.append(data[at + 8 : at + 8 + n].decode())
                at += 8 + n
        except (struct.error, UnicodeDecodeError):
            raise self._damaged(f"an item of {key!r} is cut short or not UTF-8", at=at) from None
        self.at = at
        return strings

    def _take(self, count: int, what: str) -> bytes:
        if count > self.end - self.at:
            raise self._damaged(f"{what} ends beyond {self.beyond}")
        self.at += count
        return self.data[self.at - count : self.at]

    def _damaged(self, what: str, *, at: int | None = None) -> UserError:
        where = self.at if at is None else at
        return UserError(f"cut short or damaged: {what} ({self.file}, byte {where}). download the file again")


# ---------------------------------------------------------------------------------------------------- tensors


def read_tensors(gguf: GGUF, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors under our names (see `names`), dequantised.

    Raises `UserError` if they are not those of a model with this config.
    """
    collector, sources = _collector(gguf, config, dtype, torch.empty)
    for name, source in sources.items():
        collector.add(name, source.read())
    return collector.finish()


def read_stored(
    gguf: GGUF, config: ModelConfig, *, empty: Empty = torch.empty
) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """The same without widening: matrices as they are stored, in memory from `empty`, and the other tensors in float32.

    Float32 besides are routers, what is put together from two tensors (kv_b from k_b and v_b), and experts whose gates
    and ups are in different types.
    """
    collector, sources = _collector(gguf, config, torch.float32, empty)
    table, matrices = names.gguf_table(config), names.matrices(config)
    kinds: dict[str, set[str]] = {}
    for name in gguf.tensors.keys() & table.keys():
        kinds.setdefault(table[name].internal, set()).add(gguf.tensors[name].kind.name)
    for name, source in sources.items():
        internal = table[name].internal if name in table and table[name].role is names.Role.PART else ""
        if source.order is None or internal not in matrices or len(kinds[internal]) > 1 or kinds[internal] == {"F32"}:
            collector.add(name, source.read())
            continue
        stored = keep(gguf.raw(name), gguf.tensors[name].kind, gguf.tensors[name].shape)
        factors = None if stored.factors is None else source.order(stored.factors)
        collector.add_stored(name, replace(stored, data=source.order(stored.data), factors=factors))
    taken = collector.take_stored()
    return collector.finish(), taken


class _Source(NamedTuple):
    """A tensor of the public layout. `order`: what brings the rows of the one in the file, whose name is the same, into
    that layout; None if there is no such one."""

    read: Callable[[], Tensor]
    order: Callable[[Tensor], Tensor] | None


def _collector(
    gguf: GGUF, config: ModelConfig, dtype: torch.dtype, empty: Empty
) -> tuple[names.Collector, dict[str, _Source]]:
    """Names and numbers checked, nothing read."""
    sources, where = _sources(gguf, config), str(gguf.path)
    names.check_size(config, len(sources), where=where, experts_apart=False)
    collector = names.Collector(names.gguf_table(config), config, where=where, dtype=dtype, empty=empty)
    collector.check_names(sources)
    for name in sources:
        if name in gguf.tensors:  # the others are made of two, and checked as they are read
            collector.check(name, gguf.tensors[name].shape, torch.float32)
    return collector, sources


def _sources(gguf: GGUF, config: ModelConfig) -> dict[str, _Source]:
    sources = {name: _Source(partial(gguf.read, name), _as_they_are) for name in gguf.tensors}
    sources.pop("rope_freqs.weight", None)  # in the config by now
    if gguf.metadata.get("general.architecture") == "llama":
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for name in sources:
            if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name):
                order = partial(_in_halves, num_heads=heads[match[1]])
                sources[name] = _Source(partial(_read_in_order, gguf, name, order), order)
    for name in [name for name in sources if name.endswith(".attn_k_b.weight")]:
        layer = name.removesuffix("attn_k_b.weight")
        if f"{layer}attn_v_b.weight" in sources:
            joined = _Source(partial(_read_kv_b, gguf, layer, config), None)
            sources.setdefault(f"{layer}attn_kv_b.weight", joined)  # some files hold both forms
            del sources[f"{layer}attn_k_b.weight"], sources[f"{layer}attn_v_b.weight"]
    return sources


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _read_in_order(gguf: GGUF, name: str, order: Callable[[Tensor], Tensor]) -> Tensor:
    return order(gguf.read(name))


def _in_halves(rows: Tensor, num_heads: int) -> Tensor:
    """q or k of a `llama` file: within each head, rows 0, half, 1, half + 1, .. become 0, 1, .., half, half + 1, ..

    The heads share the rows, or `check` would have refused them.
    """
    return rows.view(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _read_kv_b(gguf: GGUF, layer: str, config: ModelConfig) -> Tensor:
    """(H * (nope + value), C) from k_b (H, C, nope) and v_b (H, value, C)."""
    k, v = gguf.read(f"{layer}attn_k_b.weight"), gguf.read(f"{layer}attn_v_b.weight")
    H, C, nope, value = config.num_attention_heads, config.kv_lora_rank or 0, config.qk_nope_head_dim, config.v_head_dim
    if k.numel() != H * C * nope or v.numel() != H * C * value:
        raise UserError(f"{layer}attn_k_b and attn_v_b do not fit the metadata ({gguf.path}). convert the model again")
    return torch.cat((k.view(H, C, nope).transpose(1, 2), v.view(H, value, C)), 1).reshape(-1, C)


# ---------------------------------------------------------------------------------------------------- config


class _Metadata:
    """Typed access to the metadata of one architecture; raises `UserError` for what is missing or of another type."""

    def __init__(self, gguf: GGUF, arch: str) -> None:
        self.gguf = gguf
        self.arch = arch

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.gguf.metadata

    def integer(self, key: str, default: int | None = None, *, least: int = 0) -> int:
        value = self._get(key, default)
        if isinstance(value, (list, array)) and value and all(item == value[0] for item in value):
            value = value[0]  # one number for each layer, all the same
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(key, value, f"a whole number from {least} on, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Stored as float32; seven digits give back the decimal number that was meant."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, value, "a number")
        return float(f"{value:.7g}")

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.gguf.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise UserError(f"the metadata lacks {self.arch}.{key} ({self.gguf.path}). convert the model again")
        return value

    def _wrong(self, key: str, value: Any, kind: str) -> UserError:
        shown = repr(value.tolist() if isinstance(value, array) else value)[:60]
        return UserError(f"{self.arch}.{key} is {shown} and not {kind} ({self.gguf.path}). convert the model again")


def config_from_gguf(gguf: GGUF) -> dict[str, Any]:
    """The dictionary that `config.json` of the same model holds, for `ModelConfig.from_hf`.

    What the metadata does not say follows from the tensors: tied embeddings from the absence of `output.weight`, biases
    and MTP modules from their presence. A `deepseek2` file is V3 if its router has a bias or a sigmoid, else V2.
    Raises `UserError` for other architectures and for variants that the families cannot express.
    """
    arch = gguf.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"the architecture is {arch!r} ({gguf.path}). Minga opens GGUF files of: {', '.join(ARCHITECTURES)}"
        )
    meta = _Metadata(gguf, arch)
    num_layers = meta.integer("block_count") - meta.integer("nextn_predict_layers", 0)
    config = {
        "model_type": arch,
        "vocab_size": _embedding_rows(gguf),
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": meta.integer("attention.head_count", least=1),
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(gguf, meta),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        **_special_tokens(gguf),
    }
    return config | (
        _latent_config(gguf, meta, num_layers) if arch == "deepseek2" else _grouped_config(gguf, meta, config)
    )


def _embedding_rows(gguf: GGUF) -> int:
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(
            f"there is no token_embd.weight, so this is no language model ({gguf.path}). choose another file"
        )
    return embedding.shape[0]


def _special_tokens(gguf: GGUF) -> dict[str, Any]:
    """End of text, of turn and of message all end a generation, as in llama.cpp."""
    found = {name: gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    ids = {name: value for name, value in found.items() if isinstance(value, int)}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    return {"bos_token_id": ids.get("bos"), "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _grouped_config(gguf: GGUF, meta: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    if meta.integer("expert_count", 0):
        raise UserError(f"experts in a {meta.arch} model are not supported ({gguf.path}). choose a deepseek2 model")
    heads = config["num_attention_heads"]
    head_dim = meta.integer("attention.key_length", config["hidden_size"] // heads)
    if {meta.integer(key, head_dim) for key in ("attention.value_length", "rope.dimension_count")} != {head_dim}:
        raise UserError(
            f"keys, values and rotation differ in width ({gguf.path}). only one width per head is supported"
        )
    return {
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "attention_bias": meta.arch != "qwen2" and "blk.0.attn_q.bias" in gguf.tensors,  # qwen2 always has it
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
    }


def _latent_config(gguf: GGUF, meta: _Metadata, num_layers: int) -> dict[str, Any]:
    """Multi-head latent attention and experts.

    `key_length` means the absorbed head (latent + rope) in files that have `key_length_mla`, and the plain one before.
    Files from before groups were recorded route without them, as llama.cpp does.
    """
    if "attention.kv_lora_rank" not in meta:
        raise UserError(
            f"a deepseek2 model without latent attention is not supported ({gguf.path}). choose another file"
        )
    rope = meta.integer("rope.dimension_count")
    num_experts = meta.integer("expert_count", 0)
    sigmoid = meta.integer("expert_gating_func", 1) == 2 or any(".exp_probs_b" in name for name in gguf.tensors)
    groups = meta.integer("expert_group_count", 1)
    v2_method = "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if sigmoid or not num_experts else "deepseek_v2",
        "num_key_value_heads": meta.integer("attention.head_count"),  # the file says 1 for the absorbed form
        "q_lora_rank": meta.integer("attention.q_lora_rank") if "blk.0.attn_q_a.weight" in gguf.tensors else None,
        "kv_lora_rank": meta.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": meta.integer("attention.key_length_mla", meta.integer("attention.key_length")) - rope,
        "v_head_dim": meta.integer("attention.value_length_mla", meta.integer("attention.value_length")),
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in gguf.tensors,
        "n_routed_experts": num_experts,
        "n_shared_experts": meta.integer("expert_shared_count", 0),
        "num_experts_per_tok": meta.integer("expert_used_count", 0),
        "moe_intermediate_size": meta.integer("expert_feed_forward_length", 0),
        "first_k_dense_replace": meta.integer("leading_dense_block_count", 0),
        "moe_layer_freq": 1,
        "n_group": groups,
        "topk_group": meta.integer("expert_group_used_count", 1),
        "topk_method": "noaux_tc" if sigmoid else v2_method,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": meta.flag("expert_weights_norm"),
        "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
        "num_nextn_predict_layers": _count_mtp(gguf, num_layers),
        "rope_interleave": True,
    }


def _count_mtp(gguf: GGUF, num_layers: int) -> int:
    count = 0
    while f"blk.{num_layers + count}.nextn.eh_proj.weight" in gguf.tensors:
        count += 1
    return count


# ---------------------------------------------------------------------------------------------------- rope scaling


def _rope_scaling(gguf: GGUF, meta: _Metadata) -> dict[str, Any] | None:
    kind = meta.text("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.number("rope.scaling.factor")}
    if kind == "yarn":
        return _yarn(meta)
    if kind != "none":
        raise UserError(f"the rope scaling {kind!r} is not supported ({gguf.path}). known: none, linear, yarn")
    return _llama3(gguf, meta) if "rope_freqs.weight" in gguf.tensors else None


def _yarn(meta: _Metadata) -> dict[str, Any]:
    """`yarn_log_multiplier` is 0.1 * mscale_all_dim. mscale itself is not stored: llama.cpp takes the two as equal."""
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": meta.number("rope.scaling.factor"),
        "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
    }
    for ours, stored in (
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
        ("attention_factor", "yarn_attn_factor"),
    ):
        if f"rope.scaling.{stored}" in meta:
            scaling[ours] = meta.number(f"rope.scaling.{stored}")
    if "rope.scaling.yarn_log_multiplier" in meta:
        mscale = float(f"{10 * meta.number('rope.scaling.yarn_log_multiplier'):.6g}")
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _llama3(gguf: GGUF, meta: _Metadata) -> dict[str, Any] | None:
    """Llama-3.1's scaling, recovered from what it does: `rope_freqs` holds one divisor for each frequency.

    Below a frequency all are divided by `factor`, above another one none; in between the part kept whole, s, grows
    linearly: divisor = 1 / ((1 - s) / factor + s), s = (original * f / 2 pi - low) / (high - low). Two points of the
    ramp fix it. The scale of (original, low, high) is free; 8192 is Meta's. Fewer points, in very small heads, fix it
    less, but then no other frequency is there to tell the difference.
    """
    theta, original = meta.number("rope.freq_base", 10000.0), 8192
    half, damaged = math.prod(gguf.tensors["rope_freqs.weight"].shape), f"({gguf.path}). download the file again"
    if half > _MAX_FREQUENCIES or theta <= 1:
        raise UserError(f"rope_freqs.weight has {half} numbers for a base frequency of {theta} {damaged}")
    divisors = gguf.read("rope_freqs.weight").double().flatten().tolist()
    freqs = [theta ** (-i / half) for i in range(half)]
    factor = float(f"{max(divisors):.6g}")
    if not all(math.isfinite(d) and d > 0 for d in divisors) or factor < 1:
        raise UserError(f"rope_freqs.weight holds impossible numbers {damaged}")
    if factor == 1:
        return None
    if min(divisors) > factor * (1 - 1e-5):
        return {"rope_type": "linear", "factor": factor}
    kept = [(1 / d - 1 / factor) / (1 - 1 / factor) for d in divisors]
    other = UserError(f"rope_freqs.weight is no Llama-3 scaling ({gguf.path}). this variant is not supported")
    try:
        slope, zero = _ramp(freqs, kept)
        low, span = zero * original / (2 * math.pi), original / (2 * math.pi * slope)
    except ZeroDivisionError:
        raise other from None
    scaling = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low + span}
    scaling = {name: float(f"{value:.6g}") for name, value in scaling.items()}
    expected = [min(max(slope * (f - zero), 0.0), 1.0) for f in freqs]
    if max(abs(a - b) for a, b in zip(kept, expected, strict=True)) > 1e-4 or low <= 0:
        raise other
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": original}


def _ramp(freqs: list[float], kept: list[float]) -> tuple[float, float]:
    """Slope and zero of the line through the points strictly between 0 and 1; frequencies fall with the index."""
    inside = [i for i, s in enumerate(kept) if 1e-4 < s < 1 - 1e-4]
    if len(inside) > 1:
        first, last = inside[0], inside[-1]
        slope = (kept[first] - kept[last]) / (freqs[first] - freqs[last])
        return slope, freqs[last] - kept[last] / slope
    ones = sum(s >= 1 - 1e-4 for s in kept)  # the number of untouched frequencies
    above = freqs[ones - 1] if ones else math.inf
    below = freqs[ones + len(inside)] if ones + len(inside) < len(freqs) else 0.0
    if inside:
        freq, s = freqs[inside[0]], kept[inside[0]]
    else:
        freq, s = (min(above, 2 * freqs[0]) + below) / 2, 0.5
    slope = max(s / (freq - below), (1 - s) / (above - freq))
    return slope, freq - s / slope
