"""What a training step sends: bytes that leave a process, by collective, from the config alone.

    sent = step_bytes(config, dp=2, ep=2, with_mtp=True)         # sent.all_gather, .reduce_scatter, ..., .total

Each line of the sums below stands beside what it counts in `minga.train.sharding` and `dispatch`; tests compare with the
bytes counted in real and pretended runs. The means over all processes are given; how evenly tokens are routed does not
change them, only their spread, as long as every process reads text of the same kind. A ring's traffic is assumed: of S bytes,
gathering or reduce-scattering sends S (P - 1) / P, all-reducing twice that.

P processes, D model dim, H heads, G key heads, Q query/key dim, C latent, R rope dim, V value dim, E experts, F expert hidden
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from minga.config import ModelConfig, TrainConfig

Shape = tuple[int, int]  # rows, columns; a vector has one column, a stack of experts as many rows as experts


@dataclass(frozen=True)
class CommBytes:
    """Bytes that a process sends in an optimizer step."""

    all_gather: float  # parameters, for forward and again for backward (FSDP)
    reduce_scatter: float  # gradients (FSDP)
    experts: float  # all-to-all: tokens to their experts and back, and so their gradients
    matrices: float  # all-to-all: gradients of matrices to their owners, new weights back (Muon)
    all_reduce: float  # token counts, metrics, the gradient's norm, CPU time, the wish to stop

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def step_bytes(config: TrainConfig, *, dp: int, ep: int = 1, with_mtp: bool = False, width: int = 4) -> CommBytes:
    """Mean over the dp · ep processes. `width`: bytes of a parameter, a gradient, an activation."""
    c, processes = config.model, dp * ep
    layers = [c.is_moe_layer(layer) for layer in range(c.num_hidden_layers)]
    modules = c.num_nextn_predict_layers if with_mtp else 0
    layers += [bool(c.n_routed_experts)] * modules
    moe = sum(layers)

    matrices = [shape for is_moe in layers for shape in layer_matrices(c, is_moe)]
    matrices += [(c.hidden_size, 2 * c.hidden_size)] * modules  # the modules' joins, and their three norms
    inside = matrices + [shape for is_moe in layers for shape in _others(c, is_moe)]
    inside += [(c.hidden_size, 1)] * (3 * modules)
    table, norm = (c.vocab_size, c.hidden_size), (c.hidden_size, 1)
    head = [] if c.tie_word_embeddings else [table]
    stacks = [(c.n_routed_experts // ep, 3 * c.hidden_size * c.moe_intermediate_size)] * moe if moe else []

    # A block is gathered for forward and for backward. Embedding, last norm and head stay whole between the two.
    wholes = [*2 * inside, table, norm, *head]
    sums = [*inside, table, norm, *head]
    gathered = width * (_share(processes) * _padded(wholes, processes) + _share(dp) * _padded(2 * stacks, dp))
    reduced = width * (_share(processes) * _padded(sums, processes) + _share(dp) * _padded(stacks, dp))
    tokens = config.batch_size * config.seq_len / processes
    rows = 4 * tokens * c.num_experts_per_tok * c.hidden_size * width  # there and back, values and gradients
    routed = moe * _share(ep) * (rows + 8 * c.n_routed_experts)  # and how many rows are coming
    owned = 2 * width * _share(processes) * sum(r * columns for r, columns in matrices) / processes

    depths = 1 + c.num_nextn_predict_layers
    routers = sum(c.is_moe_layer(layer) for layer in range(c.num_hidden_layers))
    routers += c.num_nextn_predict_layers * bool(c.n_routed_experts)
    counted = 2 * c.n_routed_experts + 1  # of a router: choices and scores of each expert, and the scores' squares
    numbers = config.accumulate * depths + 3 + routers * counted + 2
    small = 2 * _share(processes) * (8 * numbers + 4)
    return CommBytes(
        config.accumulate * gathered, config.accumulate * reduced, config.accumulate * routed, owned, small
    )


def _share(processes: int) -> float:
    """Of what is spread over processes, the part that is elsewhere."""
    return (processes - 1) / processes


def _padded(shapes: Iterable[Shape], processes: int) -> int:
    """Numbers in all, rows filled up to a multiple of the processes, as FSDP lays them out."""
    return sum(-(-rows // processes) * processes * columns for rows, columns in shapes)


def layer_matrices(c: ModelConfig, is_moe: bool) -> list[Shape]:
    """A block's matrices, experts and router left out."""
    D, H, Q, V = c.hidden_size, c.num_attention_heads, c.qk_head_dim, c.value_head_dim
    hidden = c.n_shared_experts * c.moe_intermediate_size if is_moe else c.intermediate_size
    mlp = [(hidden, D), (hidden, D), (D, hidden)] if hidden else []
    if c.kv_lora_rank is None:
        keys = c.num_key_value_heads * c.head_dim
        return [(H * Q, D), (keys, D), (keys, D), (D, H * V), *mlp]
    C, query = c.kv_lora_rank, c.q_lora_rank
    queries = [(H * Q, D)] if query is None else [(query, D), (H * Q, query)]
    return [*queries, (C + c.qk_rope_head_dim, D), (H * (c.qk_nope_head_dim + V), C), (D, H * V), *mlp]


def _others(c: ModelConfig, is_moe: bool) -> list[Shape]:
    """A block's norms, biases and router."""
    D, hidden = c.hidden_size, c.n_shared_experts * c.moe_intermediate_size if is_moe else c.intermediate_size
    router = [(c.n_routed_experts, D)] * is_moe
    biases = ([hidden, hidden, D] if hidden else []) * c.mlp_bias + [D] * c.o_bias
    if c.kv_lora_rank is None:
        keys = c.num_key_value_heads * c.head_dim
        inside = [c.head_dim] * (2 * c.qk_norm)
        biases += [c.num_attention_heads * c.head_dim, keys, keys] * c.qkv_bias
    else:
        queries = [] if c.q_lora_rank is None else [c.q_lora_rank]
        inside = [*queries, c.kv_lora_rank]
        biases += [*queries, c.kv_lora_rank + c.qk_rope_head_dim] * c.attention_bias
    return [*router, *((size, 1) for size in (D, D, *inside, *biases))]
