"""What `minga train` and `minga serve` themselves take of a computer's main memory: the peak of a process, term by term.

The terms follow from the code: what modules keep for the backward pass, what optimizers hold, what loading copies. What is
measured are constants of the process and the share of the heap that lies in holes (2026-11-25: CPython 3.11, torch 2.13 for
CPU, Linux x86-64, two threads). Resident memory is counted as the system does: of a mapped file, what has been read. With
the compiled kernels, without which training takes more.

  D model dim, H heads, C latent, F hidden, A experts of a token
"""

from __future__ import annotations

from collections.abc import Iterator

from minga.config import ModelConfig, TrainConfig
from minga.planner.counts import cache_bytes_per_token, count_parameters
from minga.planner.memory import EIGHT_BIT, WEIGHT_BYTES, Memory

TRAIN_PROCESS = 421e6  # Python, torch and all that a run imports
SERVE_PROCESS = 306e6  # the same of a server, which imports less, after its first request
FIRST_REQUEST = 24e6  # of that: not there yet while the model is opened
SAMPLE = 23e6  # the engine that writes a few lines at an evaluation
HOLES = 0.2  # of the heap, between tensors that live for different times: 0 to 0.3 in training, 0 to 0.6 as weights are rounded
OWN_PAGES = 32 * 2**20  # bytes from which a tensor has pages of its own and gives them back (REUSED in kernels.cpp)
LOSS_CHUNK = 2**22  # logits in memory at a time (kernels/cross_entropy.py)
PACKED = {"float32": 4, "bf16": 2, "int8": 1, "fp8": 4}  # bytes of a number as the kernels pack it for a product
PREFILL = 512  # tokens of all prompts that the engine reads at once (engine/runner.py)
WEIGHTS_SHARE = 0.8  # of free memory: a file that is larger stays on the disk, as far as memory does not hold it
CACHE_SHARE = 1 / 4  # of what is free then, for the cache, unless one context takes more
PAGE = 64  # tokens of the cache that are handed out together
ROUNDING = 3.0  # float32 copies of a matrix while it is rounded


def own_training_memory(config: TrainConfig, *, mtp: bool = True) -> Memory:
    """The peak of a run in one process, evaluations included. mtp: as far as the share of the run that trains MTP too."""
    c, tokens = config.model, config.batch_size * config.seq_len
    counts, mtp = count_parameters(c), mtp and c.num_nextn_predict_layers > 0
    total, tables = counts.total_with_mtp, counts.embedding + counts.head
    number = 2.0 if config.weight_dtype == "bf16" else 4.0

    widths = [*_kept(c, mtp=mtp, recompute=config.recompute), *_backward(c)]
    sizes = [4.0 * tokens * width for width in widths]
    sizes += [4.0 * counts.embedding] * (1 + mtp)  # gradients of the head, which the forward pass computes
    sizes.append(4.0 * min(LOSS_CHUNK, tokens * c.vocab_size))
    heap = (1 + HOLES) * sum(size for size in sizes if size < OWN_PAGES)
    # gate and up are joined to one matrix for the kernels
    step = sum(size for size in sizes if size >= OWN_PAGES) + sum(8.0 * c.hidden_size * F for F in _mlps(c, mtp=mtp))
    # An evaluation has the whole heap of a step and, beside it, all logits of a batch and their logarithms.
    logits = 4.0 * tokens * c.vocab_size
    evaluation = SAMPLE + (2 * logits if logits >= OWN_PAGES else 0.0)
    return Memory(
        weights=number * total * (2 if config.ema_decay else 1),
        gradients=number * total,
        # Muon keeps one number, AdamW, of the tables, two
        optimizer=(EIGHT_BIT if config.optimizer_bits == 8 else 4.0) * (total + tables),
        activations=heap + (step if step > evaluation else 0.0),
        logits=0.0 if step > evaluation else evaluation,
        # of one product
        buffers=1.25 * PACKED[config.precision] * tokens * max(c.hidden_size, *_mlps(c, mtp=False)),
        runtime=TRAIN_PROCESS,
    )


def own_serving_memory(
    model: ModelConfig,
    *,
    quant: str | None = None,
    cache: str | None = None,
    context: int,
    running: int = 1,
    max_running: int = 64,
    prefix_memory: float | None = None,
    loading: bool = True,
    file_bytes: float | None = None,
) -> Memory:
    """The peak of a server of one model while `running` requests of `context` tokens are answered, again and again with other
    prompts. prefix_memory: bytes of the cache that stay for prompts that come again; None: four whole contexts, or 64 MB.
    loading: the peak while the model is opened counts too. file_bytes: of weights that are stored in fewer bits than float32
    has; they are laid out anew for the kernels, or rounded, while the file is in memory too.
    """
    c, counts = model, count_parameters(model)
    total, experts = counts.total_with_mtp, _expert_numbers(c)
    # A file has each expert by itself, memory all of a layer in one piece.
    float_file, stacked = 4.0 * total, 4.0 * experts
    row = cache_bytes_per_token(c, number=cache or ("float32" if quant is None else "float16"), mtp=True)
    if quant is None and file_bytes is not None:
        weights, opening = file_bytes * 17 / 16, 2 * file_bytes
    elif quant is None:
        weights = float_file + stacked - (0.0 if c.tie_word_embeddings else 4.0 * counts.embedding)  # few rows are read
        opening = 0.0
    else:
        rounded = WEIGHT_BYTES[quant] * total
        weights = rounded * 17 / 16 + 4 * 2**20  # in one piece with large pages
        opening = float_file + _rounding(c, quant) - FIRST_REQUEST
        if file_bytes is not None:
            opening = file_bytes + float_file  # widened, then rounded one by one
    kept = max(64e6, 4.0 * c.max_position_embeddings * row) if prefix_memory is None else prefix_memory
    pages = -(-context // PAGE) * PAGE * row * min(running, max_running)
    stays = min(kept, pages)  # of the requests before
    work = 1.25 * 4 * min(PREFILL, running * context) * _step_width(c, context)
    held = weights + pages + stays + work
    return Memory(
        weights=weights,
        cache=pages + stays,
        activations=work,
        buffers=max(0.0, opening - held) if loading else 0.0,
        runtime=SERVE_PROCESS,
    )


def own_serving_weights(model: ModelConfig, *, quant: str | None, file_bytes: float | None) -> tuple[float, float]:
    """Bytes of weights that the system cannot give back, for they are no copy of a file: while a model is opened, and after."""
    numbers, stacked = 4.0 * count_parameters(model).total_with_mtp, 4.0 * _expert_numbers(model)
    if quant is None:
        held = stacked if file_bytes is None else file_bytes * 17 / 16
        return held, held
    after = WEIGHT_BYTES[quant] * numbers / 4 * 17 / 16
    return (_rounding(model, quant) if file_bytes is None else numbers), after


def _rounding(c: ModelConfig, quant: str) -> float:
    """Bytes beside the file while the weights of a float32 model are rounded."""
    rounded, stacked = WEIGHT_BYTES[quant] * count_parameters(c).total_with_mtp, 4.0 * _expert_numbers(c)
    piece = 4.0 * c.n_routed_experts * c.hidden_size * c.moe_intermediate_size  # downs; gates and ups take two of it
    heap = rounded + stacked * ((piece < OWN_PAGES) / 3 + (2 * piece < OWN_PAGES) * 2 / 3)
    return stacked + rounded + ROUNDING * 4 * _largest_matrix(c) + HOLES * heap


# ---------------------------------------------------------------------------------------------- widths, in numbers a token


def _kept(c: ModelConfig, *, mtp: bool, recompute: bool) -> Iterator[float]:
    """Of each tensor that waits for the backward pass. recompute: without what norms and the latent's up-projection give."""
    D = c.hidden_size
    blocks = [
        c.is_moe_layer(layer) for layer in range(c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0))
    ]
    for moe in blocks:
        yield from [D] * (2 if recompute else 4)  # the stream before both norms, and after them
        yield from _attention(c, recompute=recompute)
        if moe:
            A, F, E = c.num_experts_per_tok, c.moe_intermediate_size, c.n_routed_experts
            yield from (2 * A * F, 2 * E + 10 * A)  # gates and ups; scores, and whose rows go where
        hidden = _hidden(c, moe)
        if hidden:
            yield 2 * hidden
    yield from [D, D, D]  # around the last norm; and the loss's gradient
    if mtp:
        yield from (D, 2 * D, D, D, D)  # embedding, joined, around the norm, gradient


def _attention(c: ModelConfig, *, recompute: bool) -> Iterator[float]:
    heads = c.num_attention_heads
    queries, values = heads * c.qk_head_dim, heads * c.value_head_dim
    if c.kv_lora_rank is None:
        keys = c.num_key_value_heads * c.head_dim
        yield from (queries, keys, keys, values, heads)
        return
    latents = [c.kv_lora_rank, c.qk_rope_head_dim] + ([c.q_lora_rank] if c.q_lora_rank else [])
    yield from (queries, *latents, values, heads)
    if not recompute:
        yield from (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, c.q_lora_rank or 0)


def _backward(c: ModelConfig) -> Iterator[float]:
    """What the backward pass of the widest part adds: gradients of an MLP's or of the experts' inside, and of the stream."""
    D, A, F = c.hidden_size, c.num_experts_per_tok, c.moe_intermediate_size
    dense = [(1, _hidden(c, moe)) for moe in {c.is_moe_layer(layer) for layer in range(c.num_hidden_layers)}]
    times, hidden = max([*dense, (A, F)], key=lambda part: part[0] * (4 * part[1] + D))
    yield from (times * hidden, times * hidden, 2 * times * hidden, times * D, D, D, D)


def _hidden(c: ModelConfig, moe: bool) -> int:
    return c.n_shared_experts * c.moe_intermediate_size if moe else c.intermediate_size


def _mlps(c: ModelConfig, *, mtp: bool) -> list[int]:
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if mtp else 0)
    return [_hidden(c, c.is_moe_layer(layer)) for layer in range(layers)]


def _step_width(c: ModelConfig, context: int) -> float:
    """Of all that the engine's compiled step lays out for a token (kernels/cpu/net.cpp, lay_out)."""
    D, H, A, F = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok, c.moe_intermediate_size
    key = (c.kv_lora_rank or 0) + c.rope_dim if c.is_mla else c.head_dim
    value = c.kv_lora_rank or c.head_dim
    hidden = max(_mlps(c, mtp=True))
    parts = -(-context // PAGE)  # attention goes over a page at a time, and adds up the parts
    return 5 * D + H * (parts * (value + 2) + 2 * key + 2 * value + 2 * c.qk_head_dim) + A * (3 * F + D) + 3 * hidden


def _expert_numbers(c: ModelConfig) -> int:
    layers = c.num_hidden_layers + c.num_nextn_predict_layers
    moe = sum(c.is_moe_layer(layer) for layer in range(layers))
    return 3 * moe * c.n_routed_experts * c.hidden_size * c.moe_intermediate_size


def _largest_matrix(c: ModelConfig) -> int:
    experts = 2 * c.n_routed_experts * c.moe_intermediate_size
    return c.hidden_size * max(c.vocab_size, experts, c.intermediate_size)
