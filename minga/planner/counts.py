"""Exact counts: parameters by part, cache bytes, FLOPs forward, in training, of Muon. The one place for these formulas.

Every number is a sum over the matrices of `architecture_of`; a test builds each preset on the meta device and compares.
V3: 671,026,404,352 parameters, 37.6 B of them active, 70,272 bytes of bf16 cache a token. Every function takes a
`ModelConfig`, the dictionary of a public config.json or an `Architecture`, and raises `UserError` as `architecture_of` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from minga.planner.architecture import Architecture, Attention, Block, Model, Shape, architecture_of, numbers

_NUMBER_BYTES = {"float32": 4, "float16": 2, "bf16": 2, "fp8": 1, "int8": 1}
CACHED = tuple(_NUMBER_BYTES)  # what a cache's rows may be kept in
SCALED = 64  # numbers of a row of the int8 cache that share a float16 scale


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. The router's correction bias is a buffer, not trained by gradients, and is not counted."""

    embedding: int  # learned positions too
    head: int  # 0 when tied to the embedding
    attention: int
    dense: int  # feed-forward of the layers without experts
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    streams: int  # what hyper-connections read, write and mix residual streams with
    mtp: int  # multi-token prediction modules, which share embedding and head with the model
    active: int  # of `total`, those that one token passes: all but the routed experts it does not choose

    @property
    def total(self) -> int:
        """The model without its MTP modules, as papers count it."""
        return self.total_with_mtp - self.mtp

    @property
    def total_with_mtp(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "active")


def count_parameters(model: Model) -> ParameterCounts:
    a = architecture_of(model)
    parts = dict.fromkeys((f.name for f in fields(ParameterCounts)), 0)
    unchosen = 0
    for count, block in a.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        parts["attention"] += count * (numbers(attention.matrices) + sum(attention.biases))
        parts["norms"] += count * (sum(block.norms) + sum(attention.norms))
        parts["streams"] += count * (numbers(block.mixers) + sum(block.mixer_biases))
        mlp = "shared_experts" if feed_forward.experts else "dense"
        parts[mlp] += count * (numbers(feed_forward.matrices) + sum(feed_forward.biases))
        parts["router"] += count * (numbers(feed_forward.router) + sum(feed_forward.router_biases))
        parts["routed_experts"] += count * feed_forward.experts * feed_forward.expert_parameters
        unchosen += count * (feed_forward.experts - feed_forward.chosen) * feed_forward.expert_parameters
    parts["embedding"] = a.embedding + numbers(a.projections[:1])
    parts["head"] = numbers(a.head[a.tied :]) + sum(a.head_biases)
    parts["norms"] += sum(a.norms)
    parts["streams"] += numbers(a.mixers) + sum(a.mixer_biases)
    parts["active"] = sum(parts.values()) - unchosen
    parts["mtp"] = sum(_module(a, block) for block in a.mtp)
    return ParameterCounts(**parts)


def cache_bytes_per_token(model: Model, *, number: str = "bf16", mtp: bool = False) -> int:
    """What one token leaves in the attention cache, its rows in "float32", "bf16", "float16", "fp8" or "int8" (a float16
    scale for every 64 numbers of a row), in layers with a window too: `cache_bytes` knows when these are full. Of an entry
    compressed from several tokens, its share. `mtp`: with the layers of the MTP modules, which cache too.
    """
    blocks = [(count, block.attention) for count, block in _all_blocks(architecture_of(model), mtp)]
    return sum(n * (_row(x.cached, number) - -_row(x.compressed, number) // (x.compression or 1)) for n, x in blocks)


def cache_bytes(model: Model, context: int, *, number: str = "bf16", mtp: bool = False) -> int:
    """Of a whole sequence of `context` tokens: a window keeps no more than its tokens, a linear attention its state,
    in float32, whatever the length; so does what compresses tokens to entries, beside these.
    """
    blocks = [(count, block.attention) for count, block in _all_blocks(architecture_of(model), mtp)]

    def rows(x: Attention) -> int:
        entries = context // x.compression * _row(x.compressed, number) if x.compression else 0
        return min(context, x.window or context) * _row(x.cached, number) + entries

    return sum(n * (rows(x) + 4 * x.state) for n, x in blocks)


def matmul_parameters(model: Model) -> int:
    """Of the active ones, those that are multiplied with: all but the embedding, which is looked up, unless it is the head."""
    counts = count_parameters(model)
    return counts.active - (0 if architecture_of(model).tied else counts.embedding)


def parameters_read(model: Model, tokens: float, *, mtp: bool = False) -> float:
    """What a decoding step over so many tokens fetches from memory, head included: every matrix once, and of the routed
    experts those that at least one token wakes, E (1 - (1 - A / E) ^ tokens) where each chooses for itself. mtp: of the
    first MTP module and its head instead.
    """
    a = architecture_of(model)
    head = numbers(a.head) + sum(a.head_biases)
    if mtp:
        return _module(a, a.mtp[0]) + head - _asleep(a.mtp[0], tokens)
    counts = count_parameters(a)
    rest = counts.total - counts.embedding - counts.head
    return rest + head - sum(count * _asleep(block, tokens) for count, block in a.blocks)


def speculation_limit(model: Model, acceptance: float) -> float:
    """The most that one guess a step can gain where a step takes as long as its parameters take to be read."""
    tokens = 1 + acceptance
    with_guess = parameters_read(model, 2) + parameters_read(model, tokens, mtp=True)
    return tokens * parameters_read(model, 1) / with_guess


def forward_flops(model: Model, context: float, *, absorbed: bool = False, mtp: bool = False) -> float:
    """Multiplications and additions for one token that attends over `context` keys, itself among them.

    Matrix products only; norms, activations and softmax are below a percent. A window, or the keys that an indexer chooses,
    cut the context short. For the mean over a causal sequence of T tokens give context (T + 1) / 2 to a model without
    either; `training_flops` is exact for all. `absorbed`: the form that decoding uses, which reads latents instead of keys
    and values; its projections cost the same. `mtp`: with the MTP modules, each of which runs the head once more.
    """

    def keys(limit: float, _: bool, ratio: int) -> float:
        return min(context if ratio == 1 else context // ratio, limit)

    return _flops(architecture_of(model), keys, absorbed, mtp)


def training_flops(
    model: Model,
    seq_len: int,
    *,
    causal: bool = True,
    mtp: bool = True,
    recompute: str = "none",
    lora: int = 0,
    teacher: Model | None = None,
) -> float:
    """Per token of sequences of `seq_len`, forward and backward: three times the forward pass, and what the options add.

    causal: attention counts the keys that a token may see, on average over the sequence, as NVIDIA's published TFLOP/s do;
    otherwise all of them, as the papers of Megatron-LM (2104.04473) and PaLM do. recompute: "full" runs the blocks once
    more, "selective" only what leads from latents to heads (the other parts have no matrix products). lora: the rank of
    pairs beside every matrix of the blocks, which alone are trained: no gradient of weights is computed, that of attention
    is. teacher: its forward pass is added.
    """
    a = architecture_of(model)

    def whole(limit: float, chunked: bool, ratio: int) -> float:
        return min(seq_len // ratio, limit)

    keys = partial(_mean_keys, seq_len) if causal else whole

    blocks = _all_blocks(a, mtp)
    forward = _flops(a, keys, False, mtp)
    core = 2 * sum(count * _core(block.attention, keys, False) for count, block in blocks)
    total = 3 * forward
    if lora:
        pairs = sum(count * lora * sum(r + c for r, c in _passed(block)) for count, block in blocks)
        total = 2 * forward + core + 3 * 2 * pairs
    if recompute == "full":
        total += core + 2 * sum(count * numbers(_passed(block)) for count, block in blocks)
    elif recompute == "selective":
        total += 2 * sum(count * numbers(block.attention.ups) for count, block in blocks)
    if teacher is not None:
        total += _flops(architecture_of(teacher), keys, False, False)
    return total


def muon_flops(model: Model, *, mtp: bool = False, steps: int = 3) -> int:
    """Matrix products of one optimizer step: `steps` Newton-Schulz iterations of every hidden matrix, whatever the batch.

    Each takes x xT, its square, and a product with x: 4 m² n + 2 m³ for m rows and n columns, m <= n.
    """
    a = architecture_of(model)
    counted: list[tuple[int, Shape]] = [(len(a.mtp) if mtp else 0, a.mtp_join)]
    for count, block in _all_blocks(a, mtp):
        feed_forward = block.feed_forward
        counted += [(count, shape) for shape in block.attention.matrices + feed_forward.matrices]
        counted += [(count * feed_forward.experts, shape) for shape in feed_forward.expert]
    sides = ((count, min(shape), max(shape)) for count, shape in counted)
    return steps * sum(count * (4 * m * m * n + 2 * m**3) for count, m, n in sides)


# ------------------------------------------------------------------------------------------------------- parts of sums


def _all_blocks(a: Architecture, mtp: bool) -> list[tuple[int, Block]]:
    return [*a.blocks, *((1, block) for block in a.mtp if mtp)]


def _module(a: Architecture, block: Block) -> int:
    """An MTP module: two norms before the join, the join itself, a block, a norm after it; what joins streams."""
    return 3 * a.hidden_size + numbers([a.mtp_join, *a.mixers]) + sum(a.mixer_biases) + block.parameters


def _asleep(block: Block, tokens: float) -> float:
    """Parameters of the experts that none of so many tokens chooses."""
    f = block.feed_forward
    return f.experts * (1 - f.chosen / f.experts) ** tokens * f.expert_parameters if f.experts else 0.0


def _passed(block: Block) -> tuple[Shape, ...]:
    """The matrices that a token is multiplied with."""
    f = block.feed_forward
    return block.attention.matrices + f.matrices + f.router + f.chosen * f.expert + block.mixers


def _row(n: int, number: str) -> int:
    return n * _NUMBER_BYTES[number] + (2 * -(-n // SCALED) if number == "int8" else 0)


# Keys that a token sees: given the most that it may, whether its window is a chunk, how many tokens are one.
Keys = Callable[[float, bool, int], float]


def attention_multiplications(attention: Attention, seq_len: int) -> float:
    """Of a token with earlier ones, on average over a causal sequence."""
    return _core(attention, partial(_mean_keys, seq_len), False)


def _core(attention: Attention, keys: Keys, absorbed: bool) -> float:
    """Multiplications of one token with other tokens: scores and weighted sum, an indexer's scores, a linear state."""
    x = attention
    if x.mixing:
        return x.mixing
    each = x.heads * (2 * x.latent + x.rope if absorbed and x.latent else x.qk_dim + x.v_dim)
    window, top, ratio = x.window or math.inf, x.top or math.inf, x.compression or 1
    indexing = x.indexed * keys(math.inf, False, ratio) if x.indexed else 0
    if x.compression is not None:
        return each * (keys(window, False, 1) + keys(top, False, ratio)) + indexing
    return each * keys(min(window, top), x.chunked, 1) + indexing


def _mean_keys(seq_len: int, limit: float, chunked: bool, ratio: int) -> float:
    """Of token t = 1..S of a causal sequence, min(floor(t / r), w) keys on average; in chunks of w, those of its own up to
    it.
    """
    S, w = seq_len, min(seq_len // ratio, limit)
    if chunked:
        whole, rest = divmod(S, w)
        return (whole * w * (w + 1) / 2 + rest * (rest + 1) / 2) / S
    return w * (1 - (ratio * (w + 1) - 2) / (2 * S))


def _flops(a: Architecture, keys: Keys, absorbed: bool, mtp: bool) -> float:
    head = numbers(a.head)
    products: float = numbers(a.projections[:1]) + numbers(a.mixers) + head
    products += sum(n * (numbers(_passed(b)) + _core(b.attention, keys, absorbed)) for n, b in _all_blocks(a, mtp))
    if mtp:
        join = numbers([a.mtp_join]) * (1 + a.streams) / 2
        products += len(a.mtp) * (join + numbers(a.mixers) + head)
    return 2 * products
