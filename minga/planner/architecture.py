"""Any decoder-only model as blocks of matrices, read from the dictionary of its public `config.json`.

    arch = architecture_of(json.load(open("config.json")))     # or a ModelConfig
    arch.blocks                                                # ((3, Block(dense)), (58, Block(experts))) for DeepSeek-V3

Parameters, FLOPs, cache, traffic and memory are all sums over this one description (`counts`, `comm`, `memory`). A family
is a row of `FAMILIES`: what its config leaves open (biases, norms, windows), constants of its modelling code. The names of
sizes differ between families, never their meaning: `_ALIASES` has them all. Each row was compared, number by number, with
the model that transformers 5.23 builds from the same config (tests/planner/test_architecture.py); families that
transformers does not have say so.

D hidden size, H heads, G key heads, Q query/key dim, V value dim, C latent, R rope dim, F hidden of the feed-forward, E experts
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minga.config import ModelConfig
from minga.config.model import ARCHITECTURES, MAX_SIZE
from minga.errors import UserError

Shape = tuple[int, int]  # rows, columns: a product with it takes rows * columns multiplications
MAX_LAYERS = 2_000  # each is looked at; no model has half of it


def numbers(shapes: Iterable[Shape]) -> int:
    return sum(rows * columns for rows, columns in shapes)


@dataclass(frozen=True)
class Attention:
    """What mixes tokens. A linear attention leaves nothing in the cache; it has a `state` and a fixed cost of `mixing`."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    matrices: tuple[Shape, ...]
    biases: tuple[int, ...] = ()  # each vector's numbers; and what else is small: sinks, a depthwise convolution
    norms: tuple[int, ...] = ()  # inside attention: of queries, keys, latents
    cached: int = 0  # numbers that a token leaves in the cache
    latent: int | None = None  # C of multi-head latent attention
    rope: int = 0  # its R
    ups: tuple[Shape, ...] = ()  # of the matrices, those from latents to heads, which V3 computes again for backward
    window: int | None = None  # keys that a token sees at most, itself among them
    chunked: bool = False  # the window does not slide: positions are cut into chunks as long as it
    top: int | None = None  # keys that an indexer chooses for a token (DeepSeek sparse attention)
    indexed: int = 0  # multiplications of that indexer for each key of the whole context
    compression: int | None = None  # beside its window a token sees an entry for each so many tokens; of these, `top`
    compressed: int = 0  # numbers of such an entry in the cache
    state: int = 0  # numbers that a sequence keeps, whatever its length
    mixing: int = 0  # multiplications of a token with that state, in place of keys

    @property
    def vectors(self) -> tuple[int, ...]:
        return self.biases + self.norms

    @property
    def parameters(self) -> int:
        return numbers(self.matrices) + sum(self.vectors)


@dataclass(frozen=True)
class FeedForward:
    """An MLP, routed experts, or both: then `hidden` is that of the shared experts, which every token passes."""

    hidden: int  # 0: no MLP beside the experts
    gated: bool
    matrices: tuple[Shape, ...]
    biases: tuple[int, ...] = ()
    experts: int = 0
    chosen: int = 0  # of them, by each token
    expert_hidden: int = 0
    expert: tuple[Shape, ...] = ()  # the matrices of one expert
    expert_biases: tuple[int, ...] = ()
    router: tuple[Shape, ...] = ()
    router_biases: tuple[int, ...] = ()  # trained ones; the correction bias of V3 is not
    groups: tuple[int, int] = (1, 1)  # a token's experts lie in so many of so many groups: nodes, in DeepSeek-V3

    @property
    def vectors(self) -> tuple[int, ...]:
        """Those that every token passes."""
        return self.biases + self.router_biases

    @property
    def expert_parameters(self) -> int:
        return numbers(self.expert) + sum(self.expert_biases)

    @property
    def parameters(self) -> int:
        return numbers(self.matrices + self.router) + sum(self.vectors) + self.experts * self.expert_parameters


@dataclass(frozen=True)
class Block:
    attention: Attention
    feed_forward: FeedForward
    norms: tuple[int, ...]
    mixers: tuple[Shape, ...] = ()  # of hyper-connections: what is read from the residual streams, how they are mixed
    mixer_biases: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        mixers = numbers(self.mixers) + sum(self.mixer_biases)
        return self.attention.parameters + self.feed_forward.parameters + sum(self.norms) + mixers


@dataclass(frozen=True)
class Architecture:
    """A decoder: tables, blocks in order, a head. MTP modules (DeepSeek-V3, section 2.2) share tables and head."""

    family: str
    vocab_size: int
    hidden_size: int
    tied: bool  # the head is the embedding
    blocks: tuple[tuple[int, Block], ...]  # (how many in a row, which), in the model's order
    max_positions: int | None  # the longest context it was made for, where the config says
    mtp: tuple[Block, ...] = ()
    norms: tuple[int, ...] = ()  # outside blocks
    positions: int = 0  # learned position embeddings: rows
    embedding_size: int = 0  # width of the tables where it is not D (OPT-350m)
    head_biases: tuple[int, ...] = ()
    streams: int = 1  # residual streams of D each (hyper-connections, 2409.19606)
    mixers: tuple[Shape, ...] = ()  # join them before the last norm; each MTP module has its own
    mixer_biases: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(count for count, _ in self.blocks)

    @property
    def embedding(self) -> int:
        return self.vocab_size * (self.embedding_size or self.hidden_size) + self.positions * self.hidden_size

    @property
    def head(self) -> tuple[Shape, ...]:
        """What the last hidden state is multiplied with, tied or not."""
        width = self.embedding_size or self.hidden_size
        return ((self.vocab_size, width), *self.projections[1:])

    @property
    def projections(self) -> tuple[Shape, ...]:
        """Between the width of the tables and that of the blocks, if they differ: in, out."""
        D, width = self.hidden_size, self.embedding_size or self.hidden_size
        return () if width == D else ((D, width), (width, D))

    @property
    def mtp_join(self) -> Shape:
        """Each MTP module joins the hidden state with the next token's embedding; three norms of D stand around. Of several
        streams each is multiplied with the first half, the embedding once with the other.
        """
        return self.hidden_size, 2 * self.hidden_size


Model = ModelConfig | Mapping[str, Any] | Architecture


def architecture_of(config: Model) -> Architecture:
    """Raises `UserError` for a family that is not known, a key that is missing, sizes that make no model."""
    if isinstance(config, Architecture):
        return config
    if isinstance(config, ModelConfig):
        return _read(config.to_hf() | {"mlp_bias": config.mlp_bias}, config.model_type)
    if not isinstance(config, Mapping):
        raise UserError("this is no object (config.json). give the config.json of a model")
    for key in ("text_config", "language_config"):  # of a model that also sees or hears
        if isinstance(config.get(key), Mapping):
            outer = {k: config[k] for k in ("tie_word_embeddings", "model_type") if k in config}
            return architecture_of(outer | dict(config[key]))
    family = config.get("model_type")
    if family is None:
        raise UserError("'model_type' is missing (config.json). it says which family the model is of, such as llama")
    if not isinstance(family, str) or family not in FAMILIES:
        near = ", ".join(difflib.get_close_matches(str(family)[:99], FAMILIES, n=3, cutoff=0.0))
        raise UserError(f"model_type {family!r:.99} is not known to the planner (config.json). nearest known: {near}")
    if family in ARCHITECTURES:  # Minga opens these, and knows best what is wrong with one
        opened = ModelConfig.from_hf({k: v for k, v in config.items() if k not in _COMPUTED + _WINDOWS})
        windows = {k: config[k] for k in _WINDOWS if k in config}
        return _read(opened.to_hf() | {"mlp_bias": opened.mlp_bias} | windows, family)
    return _read(config, family)


# What changes no count: Minga refuses values that it could not compute. It refuses windows too; here they are counted.
_COMPUTED = ("hidden_act", "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor")
_WINDOWS = ("layer_types", "use_sliding_window")

_ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "kv_n_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length", "seq_length"),
    "n_routed_experts": ("num_local_experts", "num_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k", "moe_top_k"),
    "n_shared_experts": ("num_shared_expert", "num_shared_experts", "moe_num_shared_experts"),
    "shared_intermediate_size": ("shared_expert_intermediate_size",),
    "sliding_window": ("window_size",),
    "decoder_sparse_step": ("interleave_moe_layer_step", "moe_layer_interval"),
    "first_k_dense_replace": ("num_dense_layers",),
    "sliding_window_pattern": ("_sliding_window_pattern", "global_attn_every_n_layers"),
    "attention_bias": ("use_qkv_bias", "qkv_bias"),
    "use_qk_norm": ("qk_layernorm",),
    "compressed_sparse_attention": ("compress_rate_csa",),
    "heavily_compressed_attention": ("compress_rate_hca",),
}


class _Keys:
    """A config's dictionary, read size by size; what cannot be is refused by name. null is as good as absent."""

    def __init__(self, config: Mapping[str, Any], family: str, defaults: Mapping[str, Any]) -> None:
        self.config, self.family, self.defaults = config, family, defaults

    def find(self, name: str, default: Any = None) -> tuple[str, Any]:
        for key in (name, *_ALIASES.get(name, ())):
            if self.config.get(key) is not None:
                return key, self.config[key]
        return name, self.defaults.get(name, default)

    def get(self, name: str, default: Any = None) -> Any:
        return self.find(name, default)[1]

    def size(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE - 1) -> int:
        """Raises `UserError` where it is missing or no whole number from `least` to `most`. A list says it layer by layer."""
        key, value = self.find(name, default)
        if value is None:
            names = " or ".join(map(repr, (name, *_ALIASES.get(name, ()))))
            raise UserError(f"{names} is missing (config.json). a {self.family} model cannot be described without it")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{key} is {value!r:.60} (config.json). it must be a whole number from {least} to {most}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        key, value = self.find(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{key} is {value!r:.60} (config.json). it must be true or false")
        return value

    def either(self, switch: bool | str) -> bool:
        """A constant of the family, or what the key of that name says."""
        return self.flag(switch) if isinstance(switch, str) else switch

    def each(self, name: str, layers: int) -> list[Any] | None:
        """A list with an entry for each layer. Some configs list more layers than there are."""
        key, value = self.find(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple, str)) or len(value) < layers:
            raise UserError(f"{key} is {value!r:.60} (config.json). it must be a list of {layers} layers")
        return list(value[:layers])

    def numbers(self, name: str) -> list[Any] | None:
        """A list of layers."""
        key, value = self.find(name)
        if value is not None and not isinstance(value, (list, tuple)):
            raise UserError(f"{key} is {value!r:.60} (config.json). it must be a list of layer numbers")
        return None if value is None else list(value)

    def part(self, name: str) -> _Keys:
        """With the keys of an object inside the config."""
        value = self.config.get(name) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {value!r:.60} (config.json). it must be an object")
        return _Keys({**self.config, **value}, self.family, self.defaults)


@dataclass(frozen=True)
class _Family:
    """What the config of a family leaves open. A string is the key that switches it."""

    tied: bool = False  # where tie_word_embeddings is absent
    gated: bool = True
    expansion: int | None = None  # hidden of the MLP in D, where intermediate_size is absent
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    activation: int = 0  # trained numbers of the activation
    norms: int = 2  # of a block, outside attention
    norm: int = 1  # vectors of a norm: 2 with a bias, 0 without parameters
    qk_norm: str = ""  # vectors for queries and keys: of one "head", of "all" heads
    qk_norm_if: bool | str = True
    qk_norm_bias: bool = False
    sinks: bool = False  # a number per head to which attention may go
    output_gate: bool = False  # queries come with a gate as wide, and with its bias
    gate_bias: bool = True
    mla: bool = False
    indexer: bool = False  # DeepSeek sparse attention
    moe: str = ""  # the key of an expert's hidden size; none: dense
    expert_bias: bool = False  # of experts and router
    shared_gate: bool = False  # the shared expert is weighed by a router of its own
    mtp: bool = False  # num_nextn_predict_layers counts modules built like DeepSeek's
    windows: int | None = None  # 0: every layer has one, where the config gives its size; n: all but each n-th
    window: str = "sliding_window"  # the key of its size
    windows_if: bool | str = True
    positions: int | None = None  # learned positions, as many as max_position_embeddings and so many more
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys that public configs of the family omit
    read: Callable[[_Keys, _Family], Architecture] | None = None  # where the table is not enough


def _read(config: Mapping[str, Any], name: str) -> Architecture:
    family = FAMILIES[name]
    return (family.read or _decoder)(_Keys(config, name, family.defaults), family)


def _decoder(k: _Keys, f: _Family, mix: list[Attention] | None = None, **changes: Any) -> Architecture:
    """Tables, blocks, head. `mix`: the attention of each layer. `changes`: fields of the architecture."""
    D, layers = k.size("hidden_size"), k.size("num_hidden_layers", most=MAX_LAYERS)
    norm = (D,) * f.norm
    experts = _experts(k, f, D) if f.moe and k.size("n_routed_experts", least=0) else None
    sparse = _sparse(k, layers) if experts else [False] * layers
    dense = experts if experts and all(sparse) else _mlp(k, f, D)
    mix = mix or _attentions(k, f, D, layers)
    blocks = [Block(mix[i], experts if experts and sparse[i] else dense, norm * f.norms) for i in range(layers)]
    modules = k.size("num_nextn_predict_layers", 0, least=0, most=MAX_LAYERS) if f.mtp else 0
    V, longest = k.size("vocab_size"), k.get("max_position_embeddings")
    arch = Architecture(
        family=k.family,
        vocab_size=V,
        hidden_size=D,
        tied=k.flag("tie_word_embeddings", f.tied),
        blocks=tuple((len(list(same)), block) for block, same in itertools.groupby(blocks)),
        max_positions=None if longest is None else k.size("max_position_embeddings"),
        mtp=(Block(mix[-1], experts or dense, norm * f.norms),) * modules,
        norms=norm,
        positions=0 if f.positions is None else k.size("max_position_embeddings") + f.positions,
        head_biases=(V,) if k.either(f.head_bias) else (),
    )
    return dataclasses.replace(arch, **changes)


def _attentions(k: _Keys, f: _Family, D: int, layers: int) -> list[Attention]:
    """Of each layer."""
    plain = _latent(k, D) if f.mla else _grouped(k, f, D)
    if f.indexer:
        full, shared = _indexed(k, plain, D)
        return [full if indexes else shared for indexes in _indexers(k, layers)]
    windows = _windows(k, f, layers)
    chunked = f.window == "attention_chunk_size"
    kinds = {w: dataclasses.replace(plain, window=w, chunked=chunked and w is not None) for w in set(windows)}
    return [kinds[window] for window in windows]


def _grouped(k: _Keys, f: _Family, D: int) -> Attention:
    H = k.size("num_attention_heads")
    G = k.size("num_key_value_heads", H)
    if k.get("head_dim") is None and D % H:
        raise UserError(
            f"num_attention_heads {H} does not divide hidden_size {D} (config.json). give head_dim, or heads that do"
        )
    if H % G:
        raise UserError(
            f"num_key_value_heads {G} does not divide num_attention_heads {H} (config.json). "
            "each key head must serve the same number of query heads"
        )
    K = k.size("head_dim", D // H)
    queries = H * K * (2 if f.output_gate else 1)
    biases = (
        (queries if f.gate_bias else H * K, G * K, G * K) * k.either(f.qkv_bias)
        + (D,) * k.either(f.o_bias)
        + (H,) * f.sinks
    )
    inside = {"head": (K, K), "all": (H * K, G * K)}[f.qk_norm] if f.qk_norm and k.either(f.qk_norm_if) else ()
    return Attention(
        heads=H,
        kv_heads=G,
        qk_dim=K,
        v_dim=K,
        matrices=((queries, D), (G * K, D), (G * K, D), (D, H * K)),
        biases=biases,
        norms=inside * (2 if f.qk_norm_bias else 1),
        cached=2 * G * K,
    )


def _latent(k: _Keys, D: int) -> Attention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1)."""
    H, C, R = k.size("num_attention_heads"), k.size("kv_lora_rank"), k.size("qk_rope_head_dim")
    nope, V = k.size("qk_nope_head_dim"), k.size("v_head_dim")
    query = None if k.get("q_lora_rank") is None else k.size("q_lora_rank")
    ups: tuple[Shape, ...] = ((H * (nope + R), query or D), (H * (nope + V), C))
    downs: tuple[Shape, ...] = ((C + R, D),) if query is None else ((query, D), (C + R, D))
    ranks = () if query is None else (query,)
    biases = (*ranks, C + R, D) if k.flag("attention_bias") else ()
    return Attention(
        heads=H,
        kv_heads=H,
        qk_dim=nope + R,
        v_dim=V,
        matrices=(*downs, *ups, (D, H * V)),
        biases=biases,
        norms=(*ranks, C),
        cached=C + R,
        latent=C,
        rope=R,
        ups=ups[1:] if query is None else ups,
    )


def _indexed(k: _Keys, plain: Attention, D: int) -> tuple[Attention, Attention]:
    """DeepSeek-V3.2 (2512.02556), section 2.1: an indexer scores all keys, attention sees the best. And a layer that sees
    those which the one before it chose.
    """
    shared = dataclasses.replace(plain, top=k.size("index_topk"))
    h, d, query = k.size("index_n_heads"), k.size("index_head_dim"), k.size("q_lora_rank", D)
    full = dataclasses.replace(
        shared,
        matrices=(*plain.matrices, (h * d, query), (d, D), (h, D)),
        norms=(*plain.norms, d, d),
        cached=plain.cached + d,
        indexed=h * d,
    )
    return full, shared


def _indexers(k: _Keys, layers: int) -> list[bool]:
    """Which layers have an indexer of their own (GLM-5 shares some; DeepSeek-V3.2 shares none)."""
    kinds = k.each("indexer_types", layers) or k.each("index_topk_pattern", layers)
    if kinds is not None:
        return [kind in ("full", "F") for kind in kinds]
    every, offset = k.size("index_topk_freq", 1), k.size("index_skip_topk_offset", 2, least=0)
    return [max(i - offset + 1, 0) % every == 0 for i in range(layers)]


def _matrices(D: int, F: int, gated: bool) -> tuple[Shape, ...]:
    return ((F, D), (F, D), (D, F)) if gated else ((F, D), (D, F))


def _mlp(k: _Keys, f: _Family, D: int, hidden: int | None = None) -> FeedForward:
    """With no hidden size given, that of the dense layers."""
    if hidden is None:
        ratio = k.size("expansion_ratio", f.expansion) if f.expansion else 0
        hidden = k.size("intermediate_size", ratio * D or None)
    F, gated = hidden, f.gated
    if not F:
        return FeedForward(0, gated, ())
    biases = ((F, F, D) if gated else (F, D)) * k.either(f.mlp_bias) + (1,) * f.activation
    return FeedForward(F, gated, _matrices(D, F, gated), biases)


def _experts(k: _Keys, f: _Family, D: int) -> FeedForward:
    """Routed experts, beside them the shared ones, which are one wide MLP."""
    E, A, F = k.size("n_routed_experts"), k.size("num_experts_per_tok"), k.size(f.moe)
    if A > E:
        raise UserError(f"{k.find('num_experts_per_tok')[0]} {A} is above the {E} experts (config.json). lower it")
    groups, allowed = k.size("n_group", 1), k.size("topk_group", 1)
    if E % groups:
        raise UserError(f"n_group {groups} does not divide the {E} experts (config.json). groups must be equal")
    if allowed > groups:
        raise UserError(f"topk_group {allowed} is above n_group {groups} (config.json). lower it")
    if allowed * (E // groups) < A:
        raise UserError(
            f"num_experts_per_tok {A} exceeds the experts of topk_group {allowed} groups (config.json). raise topk_group"
        )
    shared = k.size("shared_intermediate_size", k.size("n_shared_experts", 0, least=0) * F, least=0)
    return dataclasses.replace(
        _mlp(k, f, D, shared),
        experts=E,
        chosen=A,
        expert_hidden=F,
        expert=_matrices(D, F, f.gated),
        expert_biases=((F, F, D) if f.gated else (F, D)) * f.expert_bias,
        router=((E, D), *((1, D),) * f.shared_gate),
        router_biases=(E,) * f.expert_bias,
        groups=(allowed, groups),
    )


def _sparse(k: _Keys, layers: int) -> list[bool]:
    """Which layers have experts. Each family has some of these keys; those that are absent exclude no layer."""
    kinds = k.each("mlp_layer_types", layers)
    if kinds is not None:
        return [kind == "sparse" for kind in kinds]
    chosen, dense = k.numbers("moe_layers"), k.numbers("mlp_only_layers") or []
    if chosen is not None:
        return [i in chosen for i in range(layers)]
    first = k.size("first_k_dense_replace", 0, least=0)
    start, end = k.size("moe_layer_start_index", 0, least=0), k.size("moe_layer_end_index", layers - 1, least=-1)
    every = k.size("moe_layer_freq", 1)
    step = k.size("decoder_sparse_step", 1)
    end = layers - 1 if end == -1 else end
    return [
        max(first, start) <= i <= end and i % every == 0 and (i + 1) % step == 0 and i not in dense
        for i in range(layers)
    ]


_FULL = ("full_attention", "linear_attention", "indexed_attention", "global")
_WINDOWED = ("sliding_attention", "chunked_attention", "local")


def _windows(k: _Keys, f: _Family, layers: int) -> list[int | None]:
    """Of each layer, the window."""
    kinds = k.each("layer_types", layers)
    for kind in kinds or ():
        if kind not in _FULL + _WINDOWED:
            raise UserError(
                f"a layer of type {kind!r} is not known (layer_types). known: {', '.join(_FULL + _WINDOWED)}"
            )
    if f.windows is None or not k.get(f.window) or not k.either(f.windows_if):
        return [None] * layers
    window, pattern = k.size(f.window), k.get("sliding_window_pattern", f.windows)
    if kinds is None and isinstance(pattern, str) and pattern:  # EXAONE: "LLLG"
        kinds = ["sliding_attention" if pattern[i % len(pattern)] == "L" else "global" for i in range(layers)]
    if kinds is not None:
        return [window if kind in _WINDOWED else None for kind in kinds]
    period = k.size("sliding_window_pattern", f.windows, least=0)
    first = k.size("max_window_layers", 0, least=0)
    return [window if i >= first and (period == 0 or (i + 1) % period) else None for i in range(layers)]


# --------------------------------------------------------------------------------- families that need more than a row


def _falcon(k: _Keys, f: _Family) -> Architecture:
    """7B: one key head, attention and MLP in parallel behind one norm. 40B, 180B: key heads in groups, a norm for each."""
    new = k.flag("new_decoder_architecture")
    norms = k.size("num_ln_in_parallel_attn", 2 if new else 1) if k.flag("parallel_attn", True) else 2
    if not new:
        heads = 1 if k.flag("multi_query", True) else k.size("num_attention_heads")
        k = _Keys({**k.config, "num_key_value_heads": heads}, k.family, k.defaults)
    return _decoder(k, dataclasses.replace(f, norms=norms))


def _one_key_head(k: _Keys, f: _Family) -> Architecture:
    heads = 1 if k.flag("multi_query", True) else k.size("num_attention_heads")
    return _decoder(_Keys({**k.config, "num_key_value_heads": heads}, k.family, k.defaults), f)


def _gpt_neo(k: _Keys, f: _Family) -> Architecture:
    """attention_types: [[["global", "local"], 12]], so many times that pattern."""
    types = k.get("attention_types")
    if types is not None:
        try:
            each = (kind for pattern, times in types for _ in range(times) for kind in pattern)
            kinds = list(itertools.islice(each, MAX_LAYERS))
        except (TypeError, ValueError):
            raise UserError(
                f"attention_types is {types!r:.60} (config.json). it must be a list such as [[['global', 'local'], 12]]"
            ) from None
        k = _Keys({**k.config, "layer_types": kinds}, k.family, k.defaults)
    return _decoder(k, f)


def _opt(k: _Keys, f: _Family) -> Architecture:
    """The 350M model has narrower tables and norms after the layers, none at the end."""
    D = k.size("hidden_size")
    f = dataclasses.replace(f, norm=2 if k.flag("layer_norm_elementwise_affine", True) else 0)
    last = k.flag("do_layer_norm_before", True) and not k.flag("_remove_final_layer_norm")
    width = k.size("word_embed_proj_dim", D)
    return _decoder(k, f, norms=(D,) * f.norm if last else (), embedding_size=0 if width == D else width)


def _bloom(k: _Keys, f: _Family) -> Architecture:
    D = k.size("hidden_size")
    return _decoder(k, f, norms=(D,) * 4)  # one behind the embedding


def _stablelm(k: _Keys, f: _Family) -> Architecture:
    return _decoder(k, dataclasses.replace(f, norms=1 if k.flag("use_parallel_residual") else 2))


def _nested(k: _Keys, f: _Family) -> Architecture:
    """MPT and DBRX keep sizes of parts in objects of their own."""
    width = k.size("hidden_size")  # DBRX's experts have a hidden_size too, the same
    k = k.part("attn_config").part("ffn_config")
    return _decoder(_Keys({**k.config, "hidden_size": width}, k.family, k.defaults), f)


def _llama4(k: _Keys, f: _Family) -> Architecture:
    """Three layers of four see chunks; dense layers are wider than experts; a shared expert as wide as a routed one."""
    layers = k.size("num_hidden_layers", most=MAX_LAYERS)
    rope = k.each("no_rope_layers", layers) if k.get("no_rope_layers") else None
    changed: dict[str, Any] = {
        "expert_size": k.size("intermediate_size"),
        "intermediate_size": k.size("intermediate_size_mlp"),
    }
    if rope is not None and k.get("layer_types") is None:
        changed["layer_types"] = ["chunked_attention" if has else "full_attention" for has in rope]
    return _decoder(_Keys({**k.config, **changed}, k.family, k.defaults), f)


def _minimax(k: _Keys, f: _Family) -> Architecture:
    """MiniMax-01 (2501.08313), section 2: lightning attention, every eighth layer softmax attention."""
    D, layers = k.size("hidden_size"), k.size("num_hidden_layers", most=MAX_LAYERS)
    H = k.size("num_attention_heads")
    K = k.size("head_dim", D // H)
    kinds = k.each("layer_types", layers)
    if kinds is None:
        softmax = k.each("attn_type_list", layers)
        kinds = [
            "full_attention" if (softmax[i] if softmax else (i + 1) % 2) else "linear_attention" for i in range(layers)
        ]
    linear = Attention(
        heads=H,
        kv_heads=H,
        qk_dim=K,
        v_dim=K,
        matrices=((3 * H * K, D), (H * K, D), (D, H * K)),
        norms=(H * K,),
        state=H * K * K,
        mixing=2 * H * K * K,  # the state's update, and its product with the query
    )
    plain = _attentions(k, f, D, layers)
    return _decoder(k, f, [linear if kind == "linear_attention" else x for kind, x in zip(kinds, plain, strict=True)])


def _qwen3_next(k: _Keys, f: _Family) -> Architecture:
    """Gated DeltaNet (2412.06464) in three layers of four; the fourth is softmax attention with a gate."""
    D, layers = k.size("hidden_size"), k.size("num_hidden_layers", most=MAX_LAYERS)
    keys, values = k.size("linear_num_key_heads"), k.size("linear_num_value_heads")
    K, V, width = k.size("linear_key_head_dim"), k.size("linear_value_head_dim"), k.size("linear_conv_kernel_dim")
    kinds, every = k.each("layer_types", layers), k.size("full_attention_interval", 4)
    if kinds is None:
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    mixed = 2 * keys * K + values * V  # queries, keys and values pass a depthwise convolution
    linear = Attention(
        heads=values,
        kv_heads=keys,
        qk_dim=K,
        v_dim=V,
        matrices=((mixed + values * V, D), (2 * values, D), (D, values * V)),
        biases=(mixed * width, values, values),
        norms=(V,),
        state=values * K * V + mixed * (width - 1),
        mixing=3 * values * K * V + mixed * width,  # what the key recalls, the update, what the query recalls
    )
    plain = _attentions(k, f, D, layers)
    return _decoder(k, f, [linear if kind == "linear_attention" else x for kind, x in zip(kinds, plain, strict=True)])


_RATIOS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def _deepseek_v4(k: _Keys, f: _Family) -> Architecture:
    """DeepSeek-V4 (2606.19348), section 2. Every layer has one key that is its value too, for all heads, of the last tokens.
    Most have entries beside them, each compressed from 4 tokens (of which an indexer chooses) or from 128 (all are seen).
    Hyper-connections keep several residual streams.

    What is not counted: the table of the hash routers (a buffer), and the products of small weights with the streams
    ((n + 2) n D multiplications twice a layer, a thousandth). MTP modules are those of DeepSeek's own code, which
    transformers does not build: a block as the others with the ratio that `compress_ratios` ends with.
    """
    D, layers, n = k.size("hidden_size"), k.size("num_hidden_layers", most=MAX_LAYERS), k.size("hc_mult")
    k.size("n_shared_experts", most=1)  # the modelling code has exactly one
    kinds = _compressions(k, layers)
    mix = {kind: _shared_key(k, D, *kind) for kind in set(kinds)}
    rows = (n + 2) * n  # weights to read a stream, to write it, to mix all with all
    mixed: dict[str, Any] = {"mixers": ((rows, n * D),) * 2, "mixer_biases": (rows, 3) * 2}
    k = _Keys({**k.config, "mlp_layer_types": None, "first_k_dense_replace": 0}, k.family, k.defaults)  # no dense layer
    arch = _decoder(k, f, [mix[kind] for kind in kinds[:layers]])
    return dataclasses.replace(
        arch,
        blocks=tuple((count, dataclasses.replace(block, **mixed)) for count, block in arch.blocks),
        mtp=tuple(
            dataclasses.replace(block, attention=mix[kind], **mixed)
            for block, kind in zip(arch.mtp, kinds[layers:], strict=True)
        ),
        streams=n,
        mixers=((n, n * D),),
        mixer_biases=(n, 1),
    )


def _compressions(k: _Keys, layers: int) -> list[tuple[str, int]]:
    """Of each layer and MTP module, the kind of attention and how many tokens are one entry. DeepSeek's config has
    `compress_ratios`; transformers' has `layer_types` and `compress_rates`, without the modules.
    """
    named, ratios = k.each("layer_types", layers), k.each("compress_ratios", layers)
    if named is None and ratios is None:
        raise UserError(
            "'compress_ratios' is missing (config.json). a deepseek_v4 model cannot be described without it"
        )
    kinds: list[Any] = named or []
    if named is None:
        for ratio in k.numbers("compress_ratios") or ():
            if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _RATIOS:
                raise UserError(
                    f"a ratio of {ratio!r:.60} is not known (compress_ratios). known: {', '.join(map(str, _RATIOS))}"
                )
            kinds.append(_RATIOS[ratio])
    rates = k.part("compress_rates")
    known = {kind: ratio and rates.size(kind, ratio) for ratio, kind in _RATIOS.items()}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise UserError(f"a layer of type {kind!r:.60} is not known (layer_types). known: {', '.join(known)}")
    all_layers = layers + k.size("num_nextn_predict_layers", 0, least=0, most=MAX_LAYERS)
    kinds = [*kinds, *[_RATIOS[0]] * all_layers][:all_layers]
    return [(kind, known[kind]) for kind in kinds]


def _shared_key(k: _Keys, D: int, kind: str, ratio: int) -> Attention:
    """Queries from a latent, one key that is also the value, an output projection through g groups of heads."""
    H, K, query = k.size("num_attention_heads"), k.size("head_dim"), k.size("q_lora_rank")
    groups, rank = k.size("o_groups"), k.size("o_lora_rank")
    if H % groups:
        raise UserError(
            f"o_groups {groups} does not divide num_attention_heads {H} (config.json). groups must be equal"
        )
    x = Attention(
        heads=H,
        kv_heads=1,
        qk_dim=K,
        v_dim=K,
        matrices=((query, D), (H * K, query), (K, D), *((rank, H * K // groups),) * groups, (D, groups * rank)),
        biases=(H,),  # sinks
        norms=(query, K),
        cached=K,
        ups=((H * K, query),),
        window=k.size("sliding_window"),
    )
    if not ratio:
        return x
    # An entry is a weighted mean over its tokens. Under an indexer, of its and the last entry's, in two projections; and the
    # indexer compresses keys of its own. Values and weights of tokens without an entry yet are kept, in float32.
    indexed = kind == _RATIOS[4]
    series, h, d = (2, k.size("index_n_heads"), k.size("index_head_dim")) if indexed else (1, 0, 0)
    widths = (K, d) if indexed else (K,)
    x = dataclasses.replace(
        x,
        matrices=(*x.matrices, *((series * w, D) for w in widths for _ in ("value", "weight"))),
        biases=(*x.biases, *(ratio * series * w for w in widths)),  # weights by position
        norms=(*x.norms, *widths),
        compression=ratio,
        compressed=sum(widths),
        state=2 * series * ratio * series * sum(widths),
    )
    if not indexed:
        return x
    indexer = ((h * d, query), (h, D))
    return dataclasses.replace(x, matrices=x.matrices + indexer, top=k.size("index_topk"), indexed=h * d)


# ------------------------------------------------------------------------------------------------------- the families

_LLAMA = _Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")
_GPT2 = _Family(tied=True, gated=False, expansion=4, qkv_bias=True, o_bias=True, mlp_bias=True, norm=2, positions=0)
_GPTJ = _Family(gated=False, expansion=4, mlp_bias=True, head_bias=True, norms=1, norm=2)
_QWEN2 = _Family(qkv_bias=True, mlp_bias="mlp_bias", windows=0, windows_if="use_sliding_window")
_QWEN3 = dataclasses.replace(_LLAMA, qk_norm="head", windows=0, windows_if="use_sliding_window")
_MISTRAL = _Family(windows=0)
_DEEPSEEK = _Family(mla=True, moe="moe_intermediate_size", mlp_bias="mlp_bias")
_V3 = dataclasses.replace(_DEEPSEEK, mtp=True)
_GEMMA = _Family(tied=True, qkv_bias="attention_bias", o_bias="attention_bias", defaults={"head_dim": 256})
_GLM = _Family(qkv_bias="attention_bias", defaults={"attention_bias": True})
_ATTENTION_BIAS = _Family(qkv_bias="attention_bias", o_bias="attention_bias")
_OLMO2 = dataclasses.replace(_ATTENTION_BIAS, qk_norm="all")
_COHERE = dataclasses.replace(_ATTENTION_BIAS, tied=True, norms=1)
_HUNYUAN = dataclasses.replace(_ATTENTION_BIAS, qk_norm="head")
_ERNIE = _Family(tied=True, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias")
_MINIMAX = _Family(moe="intermediate_size", read=_minimax)
_QWEN3_NEXT = dataclasses.replace(_ATTENTION_BIAS, qk_norm="head", output_gate=True, read=_qwen3_next)


def _with(family: _Family, **changes: Any) -> _Family:
    return dataclasses.replace(family, **changes)


FAMILIES: dict[str, _Family] = {
    "Yi": _LLAMA,  # this and the next four are not in transformers: modelling code of their own repositories
    "baichuan": _Family(),
    "bailing_moe": _with(_ATTENTION_BIAS, moe="moe_intermediate_size"),
    "internlm": _with(_Family(qkv_bias="bias", o_bias="bias"), defaults={"bias": True}),
    "internlm2": _Family(qkv_bias="bias", o_bias="bias"),
    "afmoe": _Family(
        qkv_bias="attention_bias", o_bias="attention_bias", norms=4, qk_norm="head", output_gate=True,
        gate_bias=False, moe="moe_intermediate_size", windows=4,
    ),
    "apertus": _with(_ATTENTION_BIAS, gated=False, activation=2, qk_norm="head"),
    "arcee": _with(_LLAMA, gated=False),
    "biogpt": _with(_GPT2, positions=2),
    "bloom": _Family(tied=True, gated=False, expansion=4, qkv_bias=True, o_bias=True, mlp_bias=True, norm=2, read=_bloom),
    "codegen": _GPTJ,
    "cohere": _with(_COHERE, qk_norm="all", qk_norm_if="use_qk_norm"),
    "cohere2": _with(_COHERE, windows=4),
    "dbrx": _Family(moe="intermediate_size", read=_nested),
    "deepseek": _with(_ATTENTION_BIAS, moe="moe_intermediate_size"),  # not in transformers: DeepSeekMoE (2401.06066)
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _V3,
    "deepseek_v32": _with(_V3, indexer=True),
    "deepseek_v4": _with(_V3, mla=False, read=_deepseek_v4),
    "dots1": _with(_ATTENTION_BIAS, qk_norm="head", moe="moe_intermediate_size", windows=0),
    "ernie4_5": _ERNIE,
    "ernie4_5_moe": _with(_ERNIE, head_bias="use_bias", moe="moe_intermediate_size"),
    "exaone4": _Family(qk_norm="head", windows=4),
    "exaone_moe": _Family(qk_norm="head", moe="moe_intermediate_size", windows=4),
    "falcon": _Family(
        tied=True, gated=False, expansion=4, qkv_bias="bias", o_bias="bias", mlp_bias="bias", norm=2, read=_falcon
    ),
    "flex_olmo": _with(_OLMO2, moe="intermediate_size"),
    "gemma": _GEMMA,
    "gemma2": _with(_GEMMA, norms=4, windows=2),
    "gemma3_text": _with(
        _GEMMA, norms=4, qk_norm="head", windows=6,
        defaults={"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
    "glm": _GLM,
    "glm4": _with(_GLM, norms=4),
    "glm4_moe": _Family(
        qkv_bias="attention_bias", qk_norm="head", qk_norm_if="use_qk_norm", moe="moe_intermediate_size", mtp=True
    ),
    "glm4_moe_lite": _V3,
    "glm_moe_dsa": _with(_V3, indexer=True),
    "gpt2": _GPT2,
    "gpt_bigcode": _with(_GPT2, read=_one_key_head),
    "gpt_neo": _with(_GPT2, qkv_bias=False, windows=0, defaults={"sliding_window": 256}, read=_gpt_neo),
    "gpt_neox": _Family(
        gated=False, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=True, norm=2,
        defaults={"attention_bias": True},
    ),
    "gpt_oss": _with(
        _ATTENTION_BIAS, sinks=True, moe="intermediate_size", expert_bias=True, windows=2, defaults={"attention_bias": True}
    ),
    "gptj": _GPTJ,
    "granite": _LLAMA,
    "granitemoe": _with(_ATTENTION_BIAS, moe="intermediate_size"),
    "granitemoeshared": _with(_ATTENTION_BIAS, moe="intermediate_size"),
    "helium": _Family(qkv_bias="attention_bias", mlp_bias="mlp_bias"),
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _with(_HUNYUAN, moe="intermediate_size", defaults={"n_shared_experts": 1}),
    "hy_v3": _with(_HUNYUAN, moe="moe_intermediate_size"),
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _with(_LLAMA, gated=False, norm=2, defaults={"attention_bias": True, "mlp_bias": True}),
    "kimi_k2": _V3,  # DeepSeek-V3's modelling code with another name
    "llama": _LLAMA,
    "llama4_text": _with(
        _ATTENTION_BIAS, moe="expert_size", windows=4, window="attention_chunk_size", defaults={"n_shared_experts": 1},
        read=_llama4,
    ),
    "minicpm3": _Family(tied=True, mla=True, mlp_bias="mlp_bias"),
    "minimax": _MINIMAX,
    "minimax_m1": _MINIMAX,  # the names of the first two in their own repositories; "minimax" is transformers' form
    "minimax_m2": _Family(qk_norm="all", moe="intermediate_size"),
    "minimax_text_01": _MINIMAX,
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL,
    "mistral": _MISTRAL,
    "mixtral": _with(_MISTRAL, moe="intermediate_size"),
    "mpt": _Family(tied=True, gated=False, expansion=4, read=_nested),
    "nanochat": _with(_ATTENTION_BIAS, gated=False, norm=0),
    "nemotron": _with(_LLAMA, gated=False, norm=2),
    "olmo": _with(_ATTENTION_BIAS, norm=0),
    "olmo2": _OLMO2,
    "olmo3": _with(_OLMO2, windows=4),
    "olmoe": _with(_OLMO2, moe="intermediate_size"),
    "opt": _Family(
        tied=True, gated=False, qkv_bias="enable_bias", o_bias="enable_bias", mlp_bias="enable_bias", positions=2,
        defaults={"enable_bias": True}, read=_opt,
    ),
    "persimmon": _Family(
        gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm=2, qk_norm="head", qk_norm_if="use_qk_norm",
        qk_norm_bias=True, defaults={"use_qk_norm": True},
    ),
    "phi": _Family(
        gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True, norms=1, norm=2, qk_norm="head",
        qk_norm_if="use_qk_norm", qk_norm_bias=True,
    ),
    "phi3": _MISTRAL,
    "phimoe": _with(_ATTENTION_BIAS, head_bias="lm_head_bias", norm=2, moe="intermediate_size", windows=0),
    "qwen2": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_moe": _with(
        _QWEN2, qkv_bias="attention_bias", moe="moe_intermediate_size", shared_gate=True, defaults={"attention_bias": True}
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": _with(_QWEN3, mlp_bias=False, moe="moe_intermediate_size"),
    "qwen3_5_moe_text": _with(_QWEN3_NEXT, moe="moe_intermediate_size", shared_gate=True),
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_vl_moe_text": _with(_QWEN3, mlp_bias=False, moe="moe_intermediate_size"),
    "qwen3_vl_text": _QWEN3,
    "qwen3_next": _with(_QWEN3_NEXT, moe="moe_intermediate_size", shared_gate=True),
    "seed_oss": _Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": _with(_LLAMA, tied=True, windows=0, windows_if="use_sliding_window"),
    "solar_open": _Family(qkv_bias="attention_bias", moe="moe_intermediate_size"),
    "stablelm": _Family(
        qkv_bias="attention_bias", norm=2, qk_norm="all", qk_norm_if="use_qk_norm", read=_stablelm
    ),
    "starcoder2": _Family(
        tied=True, gated=False, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", norm=2, windows=0,
        defaults={"use_bias": True},
    ),
    "vaultgemma": _with(_GEMMA, windows=2),
    "xglm": _with(_GPT2, positions=None),
    "youtu": _Family(tied=True, mla=True),
}  # fmt: skip
