"""Exact counts from a config: parameters by part, cache bytes per token, forward FLOPs per token.

Every number is a sum of matrix sizes, written beside the part of the model that it counts; a test builds each preset on
the meta device and compares. V3: 671,026,404,352 parameters, 37.6 B of them active, 70,272 bytes of bf16 cache a token.

  D model dim, H heads, G key heads, Q query/key dim, K nope dim, R rope dim, C latent, V value dim, F hidden, E experts
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minga.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. The router's correction bias is a buffer, not trained by gradients, and is not counted."""

    embedding: int
    head: int  # 0 when tied to the embedding
    attention: int
    dense: int  # feed-forward of the layers without experts
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    mtp: int  # multi-token prediction modules, which share embedding and head with the model
    active: int  # of `total`, those that one token passes: all but the routed experts it does not choose

    @property
    def total(self) -> int:
        """The model without its MTP modules, as papers count it."""
        return self.total_with_mtp - self.mtp

    @property
    def total_with_mtp(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "active")


def count_parameters(config: ModelConfig) -> ParameterCounts:
    c = config
    layers = c.num_hidden_layers
    moe = sum(c.is_moe_layer(layer) for layer in range(layers))
    table = c.vocab_size * c.hidden_size
    parts = {
        "embedding": table,
        "head": 0 if c.tie_word_embeddings else table,
        "attention": layers * (_attention_matrices(c) + _attention_biases(c)),
        "dense": (layers - moe) * _mlp(c, c.intermediate_size, bias=c.mlp_bias),
        "routed_experts": moe * c.n_routed_experts * _expert(c),
        "shared_experts": moe * _shared_experts(c),
        "router": moe * _router(c),
        "norms": layers * _norms(c) + c.hidden_size,
    }
    unchosen = moe * (c.n_routed_experts - c.num_experts_per_tok) * _expert(c)
    active = sum(parts.values()) - unchosen
    return ParameterCounts(**parts, mtp=c.num_nextn_predict_layers * _mtp_module(c), active=active)


def cache_bytes_per_token(config: ModelConfig, *, number: str = "float16", mtp: bool = False) -> int:
    """What one token leaves in the attention cache, its rows in "float32", "float16" or "int8" (a float16 scale for every 64
    numbers of a row). `mtp`: with the layers of the MTP modules, which cache too.
    """
    row = config.cache_elements_per_token // config.num_hidden_layers
    size = {"float32": 4 * row, "float16": 2 * row, "int8": row + 2 * -(-row // 64)}[number]
    return size * (config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0))


def parameters_read(config: ModelConfig, tokens: float, *, mtp: bool = False) -> float:
    """What a decoding step over so many tokens fetches from memory, head included: every matrix once, and of the routed
    experts those that at least one token wakes, E (1 - (1 - A / E) ^ tokens) where each chooses for itself. mtp: of the
    first MTP module and its head instead.
    """
    c = config
    awake = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens if c.n_routed_experts else 0.0
    asleep = (1 - awake) * c.n_routed_experts * _expert(c)
    head = c.vocab_size * c.hidden_size
    if mtp:
        return _mtp_module(c) + head - asleep
    moe = sum(c.is_moe_layer(layer) for layer in range(c.num_hidden_layers))
    counts = count_parameters(c)
    return counts.total - counts.embedding - counts.head + head - moe * asleep


def speculation_limit(config: ModelConfig, acceptance: float) -> float:
    """The most that one guess a step can gain where a step takes as long as its parameters take to be read."""
    tokens = 1 + acceptance
    with_guess = parameters_read(config, 2) + parameters_read(config, tokens, mtp=True)
    return tokens * parameters_read(config, 1) / with_guess


def forward_flops(config: ModelConfig, context: int, *, absorbed: bool = False, mtp: bool = False) -> int:
    """Multiplications and additions for one token that attends over `context` keys, itself among them.

    Matrix products only; norms, activations and softmax are below a percent. For the mean over a causal sequence of T
    tokens give context (T + 1) / 2. `absorbed`: the form that decoding uses, which reads latents instead of keys and
    values; its projections cost the same. `mtp`: with the MTP modules, each of which runs the head once more.
    """
    c = config
    head = c.vocab_size * c.hidden_size
    attention = _attention_matrices(c) + context * _multiplications_per_key(c, absorbed)
    products = sum(attention + _feed_forward(c, layer) for layer in range(c.num_hidden_layers)) + head
    if mtp:
        join, block = 2 * c.hidden_size**2, attention + _feed_forward(c, c.num_hidden_layers)
        products += c.num_nextn_predict_layers * (join + block + head)
    return 2 * products


def muon_flops(config: ModelConfig, *, mtp: bool = False, steps: int = 3) -> int:
    """Matrix products of one optimizer step: `steps` Newton-Schulz iterations of every hidden matrix, whatever the batch.

    Each takes x xT, its square, and a product with x: 4 m² n + 2 m³ for m rows and n columns, m <= n.
    """
    c = config
    D, H = c.hidden_size, c.num_attention_heads
    if c.kv_lora_rank is None:
        attention = [(D, H * c.head_dim)] * 2 + [(D, c.num_key_value_heads * c.head_dim)] * 2
    else:
        C, Q = c.kv_lora_rank, H * c.qk_head_dim
        queries = [(D, Q)] if c.q_lora_rank is None else [(D, c.q_lora_rank), (c.q_lora_rank, Q)]
        up, out = (C, H * (c.qk_nope_head_dim + c.v_head_dim)), (H * c.v_head_dim, D)
        attention = [*queries, (D, C + c.qk_rope_head_dim), up, out]
    expert, shared = (D, c.moe_intermediate_size), (D, c.n_shared_experts * c.moe_intermediate_size)
    extra = c.num_nextn_predict_layers if mtp else 0
    layers = c.num_hidden_layers + extra
    moe = sum(c.is_moe_layer(layer) for layer in range(layers))
    counted = [(layers, shape) for shape in attention]
    counted += [(3 * moe * c.n_routed_experts, expert), (3 * moe, shared)]
    counted += [(3 * (layers - moe), (D, c.intermediate_size)), (extra, (D, 2 * D))]
    sides = ((count, min(shape), max(shape)) for count, shape in counted)
    return steps * sum(count * (4 * m * m * n + 2 * m**3) for count, m, n in sides)


def _attention_matrices(c: ModelConfig) -> int:
    D, H, Q, V = c.hidden_size, c.num_attention_heads, c.qk_head_dim, c.value_head_dim
    if c.kv_lora_rank is None:
        return D * H * Q + 2 * D * c.num_key_value_heads * Q + H * V * D
    C, R = c.kv_lora_rank, c.qk_rope_head_dim
    queries = D * H * Q if c.q_lora_rank is None else c.q_lora_rank * (D + H * Q)
    return queries + D * (C + R) + C * H * (c.qk_nope_head_dim + V) + H * V * D


def _attention_biases(c: ModelConfig) -> int:
    output = c.hidden_size if c.o_bias else 0
    if c.kv_lora_rank is None:
        return output + (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim * c.qkv_bias
    return output + ((c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim) * c.attention_bias


def _multiplications_per_key(c: ModelConfig, absorbed: bool) -> int:
    """One query token, all heads: score and weighted sum."""
    if c.kv_lora_rank is not None and absorbed:
        return c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return c.num_attention_heads * (c.qk_head_dim + c.value_head_dim)


def _mlp(c: ModelConfig, hidden: int, *, bias: bool) -> int:
    return 3 * c.hidden_size * hidden + (2 * hidden + c.hidden_size) * bias


def _expert(c: ModelConfig) -> int:
    return _mlp(c, c.moe_intermediate_size, bias=False)


def _shared_experts(c: ModelConfig) -> int:
    """All of a layer's shared experts, which are one wide MLP."""
    hidden = c.n_shared_experts * c.moe_intermediate_size
    return _mlp(c, hidden, bias=c.mlp_bias) if hidden else 0


def _router(c: ModelConfig) -> int:
    return c.n_routed_experts * c.hidden_size


def _norms(c: ModelConfig) -> int:
    """One block: before attention, before the feed-forward, and those inside attention."""
    inside = (c.q_lora_rank or 0) + c.kv_lora_rank if c.kv_lora_rank is not None else 2 * c.head_dim * c.qk_norm
    return 2 * c.hidden_size + inside


def _mtp_module(c: ModelConfig) -> int:
    """Two norms before the join, the join itself, a block, a norm after it."""
    D = c.hidden_size
    if c.n_routed_experts:
        feed_forward = c.n_routed_experts * _expert(c) + _shared_experts(c) + _router(c)
    else:
        feed_forward = _mlp(c, c.intermediate_size, bias=c.mlp_bias)
    block = _attention_matrices(c) + _attention_biases(c) + _norms(c) + feed_forward
    return 3 * D + 2 * D**2 + block


def _feed_forward(c: ModelConfig, layer: int) -> int:
    """Multiplications of one token in a layer's feed-forward."""
    D = c.hidden_size
    if not c.is_moe_layer(layer):
        return 3 * D * c.intermediate_size
    chosen = c.num_experts_per_tok + c.n_shared_experts
    return _router(c) + 3 * D * c.moe_intermediate_size * chosen
