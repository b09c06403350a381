"""What a model needs on each device, byte by byte: to be trained in a given set-up, or to serve a given load.

States follow Megatron's and ZeRO's accounting (Rajbhandari et al. 2020, 1910.02054), activations Korthikanti et al. 2022
(2205.05198) carried over to gated MLPs, experts and latent attention: an operation keeps what its gradient asks for, and
today's fused attention keeps no scores. Nothing here is fitted; tests compare with published peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import NamedTuple, TypeVar

from minga.planner.architecture import Architecture, Block, Model, architecture_of, numbers
from minga.planner.counts import cache_bytes, count_parameters
from minga.planner.setup import Setup

# Bytes of a stored weight with its scales. fp8: a float32 for each block of 128 x 128 (DeepSeek-V3, 2412.19437, section 3.3);
# int8 and int4: ours, a float16 for 64 and for 32 numbers of a row; fp4: a byte for 16 (NVFP4); Q*: GGUF's.
WEIGHT_BYTES = {
    "float32": 4.0,
    "bf16": 2.0,
    "Q8_0": 8.5 / 8,
    "int8": 8.25 / 8,
    "fp8": 1 + 4 / 128**2,
    "Q6_K": 6.5625 / 8,
    "Q5_K": 5.5 / 8,
    "Q4_K": 4.5 / 8,
    "int4": 4.5 / 8,
    "fp4": 4.5 / 8,
}
EIGHT_BIT = 1 + 4 / 256  # a moment in 8 bits, with a float32 for each 256 numbers (Dettmers et al. 2022, 2110.02861)
# Of a logit in PyTorch's loss: itself in bf16, its float32 copy and the logarithm of its softmax; in the backward pass the
# logarithm, its gradient and that in bf16. With several heads the others wait with their logarithm.
LOGIT_BYTES, WAITING_LOGIT_BYTES = {2: 10, 4: 12}, 4
# What feeds products stays in the 8 bits that they read, a float32 for each 128 numbers (DeepSeek-V3, 2412.19437, section
# 3.3.3); residuals, queries, keys and values stay as they are.
FED_IN_8_BITS = 1 + 4 / 128
CONTEXT_BYTES = 1e9  # a CUDA context with its kernels and libraries; assumed, it depends on device and driver
NCCL_BYTES = 0.4e9  # 340 to 392 MB in NVIDIA's measured tables (ai-dynamo/aiconfigurator)
GREEN = 0.8  # of 454 runs estimated below this share none went out of memory
RULE, RULE_SOURCE = "green below 80 %, amber to 100 %, red above", "Fujii et al. 2024 (2411.06465)"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0  # moments, and the float32 copy of weights
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0  # gathered weights, gradients before they are spread, tokens on their way to experts
    cache: float = 0.0  # of serving: keys and values, or latents
    runtime: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """By name, those that are not 0."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name))}


def verdict(total: float, available: float) -> str:
    """green: it fits. amber: it fits if the estimate is exact. red: it does not."""
    return "green" if total < GREEN * available else "amber" if total <= available else "red"


# ---------------------------------------------------------------------------------------------- training


def training_memory(model: Model, setup: Setup) -> Memory:
    """The fullest device of a run. Experts are taken to be chosen evenly, a sequence to be cut in `tp` pieces where it is not
    cut by heads (sequence parallelism), layers to be spread evenly over `pp` stages, each of which holds as many
    micro-batches as stages are left to pass: 1F1B, to which zero-bubble schedules keep (ZB-V, 2401.10241, which is ours).
    Megatron's interleaving holds more, on the first stage 1 + (pp - 1) / (pp x chunks) times as much (2104.04473).
    """
    a = architecture_of(model)
    layers = _layers(a, mtp=setup.mtp)
    cuts = [stage * len(layers) // setup.pp for stage in range(setup.pp + 1)]
    stages = (_stage(a, setup, layers[cuts[i] : cuts[i + 1]], i) for i in range(setup.pp))
    return max(stages, key=lambda memory: memory.total)


def _stage(a: Architecture, setup: Setup, layers: Sequence[_Layer], stage: int) -> Memory:
    s, d, first, last = setup, a.hidden_size, stage == 0, stage == setup.pp - 1
    number = 4 if s.precision == "float32" else 2
    tokens = s.micro_batch * s.seq_len / s.tp
    tables = (first * a.embedding + (last and not (first and a.tied)) * numbers(a.head[:1])) / s.tp
    ends = last * (sum(a.norms) + sum(a.head_biases)) + (first + last) * numbers(a.projections) / 2
    dense, experts = (sum(x.dense for x in layers) + ends) / s.tp, sum(x.experts for x in layers) / s.ep
    copies = s.expert_copies

    if s.lora_rank is None:
        states = [(tables, s.dp, 2), (dense, s.dp, _moments(s)), (experts, copies, _moments(s))]
        frozen = 0.0
    else:
        pairs = s.lora_rank * sum(x.sides for x in layers) / s.tp
        expert_pairs = s.lora_rank * sum(x.expert_sides for x in layers) / s.ep
        states = [(pairs, s.dp, _moments(s)), (expert_pairs, copies, _moments(s))]
        stored = WEIGHT_BYTES[s.stored]
        spread, expert_spread = (s.dp, copies) if s.shard == 3 else (1, 1)
        # embedding and head keep 16 bits, as in QLoRA (2305.14314)
        frozen = (tables * max(2.0, stored) + dense * stored) / spread + experts * stored / expert_spread
    weights, gradients, optimizer = (sum(parts) for parts in zip(*(_states(s, *each) for each in states), strict=True))

    waiting = min(s.pp - stage, s.accumulate)  # micro-batches between their forward and backward passes
    fed = FED_IN_8_BITS if s.precision == "fp8" and s.fed_in_8_bits else number
    kept = sum(x.kept(s.recompute, number, fed) for x in layers) + number * d * last
    again = max((x.kept("none", number, fed) - x.kept(s.recompute, number, fed) for x in layers), default=0.0)
    backward = again + number * max((x.widest for x in layers), default=0)
    logits = 0.0
    if last and not s.fused_loss:
        logits = a.vocab_size * (LOGIT_BYTES[number] + WAITING_LOGIT_BYTES * len(a.mtp) * s.mtp)
    return Memory(
        weights=weights + frozen,
        gradients=gradients,
        optimizer=optimizer,
        activations=tokens * (waiting * kept + backward),
        # gone before the first block's backward pass, but the allocator seldom reuses their place
        logits=tokens * logits,
        buffers=_buffers(s, layers, tables, tokens, number, d, copies),
        runtime=CONTEXT_BYTES + (NCCL_BYTES if s.devices > 1 else 0.0),
    )


def _moments(s: Setup) -> int:
    """Numbers that the optimizer keeps for one of a matrix; tables are AdamW's, with two, always."""
    return 1 if s.optimizer == "muon" else 2


def _states(s: Setup, count: float, ranks: int, moments: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states of so many trained numbers, spread over `ranks` from the level `shard` says.

    With master copies 2 + 4 + 12 bytes a number. Fully sharded there is no copy: the float32 weights are gathered as bf16.
    """
    wide = s.precision == "float32"
    master = s.master and not wide
    state = EIGHT_BIT if s.optimizer == "adamw8bit" else 4.0 if wide or master else 2.0
    weight = 4.0 if wide or (master and s.shard == 3) else 2.0
    gradient = 4.0 if wide or master else 2.0
    optimizer = moments * state + (4.0 if master and s.shard < 3 else 0.0)
    return (
        count * weight / (ranks if s.shard == 3 else 1),
        count * gradient / (ranks if s.shard >= 2 else 1),
        count * optimizer / (ranks if s.shard >= 1 else 1),
    )


def _buffers(
    s: Setup, layers: Sequence[_Layer], tables: float, tokens: float, number: int, d: int, copies: int
) -> float:
    """Fully sharded, weights of the block at work, of the next, and of the tables are gathered; gradients are whole for a
    block before they are spread. A matrix in few bits is widened as it is used.
    """
    dense, experts = [x.dense / s.tp for x in layers], [x.experts / s.ep for x in layers]
    held = 0.0
    for parts, table, ranks in ((dense, tables, s.dp), (experts, 0.0, copies)):
        others = 1 - 1 / ranks  # the share of it that is not this rank's own
        if s.shard == 3:
            size = WEIGHT_BYTES[s.stored] if s.lora_rank is not None else number
            held += size * others * (table + sum(sorted(parts)[-2:]))
        if s.shard >= 2 and s.lora_rank is None:
            held += number * min(max([table, *parts]), others * (table + sum(parts)))
    if s.tp > 1:
        held += 2 * tokens * s.tp * number * d  # a product's whole input, put together from all ranks, and its gradient
    if s.ep > 1:
        held += 2 * tokens * number * d * max((x.chosen for x in layers), default=0)  # sent and received
    if s.lora_rank is not None and s.stored not in ("float32", "bf16"):
        held += number * max((x.largest for x in layers), default=0) / s.tp
    return held


class _Layer(NamedTuple):
    """One block in numbers: of weights, and of a token's activations."""

    dense: int  # weights that every token passes
    experts: int
    sides: int  # rows and columns of all matrices, which a pair of rank one has
    expert_sides: int
    largest: int  # matrix
    stream: int  # d
    streams: int  # residual ones, all kept where attention and MLP begin
    latents: int  # of latent attention, before their norms
    normed: int  # latents, or queries and keys, after norms of their own
    projected: int  # queries, keys and values
    rebuilt: int  # of these, what is projected up from a latent
    attended: int  # what attention gives, all heads
    heads: int
    hidden: int  # of the MLP that every token passes, and of the chosen experts
    gated: bool
    chosen: int

    def kept(self, recompute: str, number: int, fed: float | None = None) -> float:
        """Bytes a token leaves for the backward pass, with `number` bytes each and a float32 a head for the softmax.

        fed: bytes of a number that only feeds a matrix product or the MLP's activation, where it is another.
        """
        if recompute == "full":
            return number * self.streams * self.stream
        wide = (1 + self.gated) * self.hidden + self.chosen * self.stream
        values, feeding = 2 * self.streams * self.stream + self.projected + self.attended, self.latents
        feeding += wide  # gate and up; what experts are sent
        if recompute == "none":
            feeding += 2 * self.stream + self.normed  # after norms
            feeding += wide  # after the activation; what experts give
        else:
            values -= self.rebuilt
        return number * values + (number if fed is None else fed) * feeding + 4 * self.heads

    @property
    def widest(self) -> int:
        """Numbers of the gradients that stand beside them while the MLP's is computed."""
        return (2 + self.gated) * self.hidden


def _layers(a: Architecture, *, mtp: bool) -> list[_Layer]:
    layers = [layer for count, block in a.blocks for layer in [_layer(a, block)] * count]
    for block in a.mtp if mtp else ():
        layer = _layer(a, block)
        layers.append(layer._replace(dense=layer.dense + numbers([a.mtp_join]) + 3 * a.hidden_size))
    return layers


def _layer(a: Architecture, block: Block) -> _Layer:
    x, f = block.attention, block.feed_forward
    shapes = x.matrices + f.matrices
    queries, values = x.heads * x.qk_dim, x.heads * x.v_dim
    if x.latent is None:
        keys, own_values = x.kv_heads * x.qk_dim, x.kv_heads * x.v_dim
        latents, normed, rebuilt = 0, queries + keys if x.norms else 0, 0
    else:  # to be attended over, a latent gives keys and values to every head
        keys, own_values, normed = queries, values, sum(x.norms)
        latents, rebuilt = normed + x.rope, keys + values + (queries if len(x.norms) > 1 else 0)
    return _Layer(
        dense=block.parameters - f.experts * f.expert_parameters,
        experts=f.experts * f.expert_parameters,
        sides=sum(map(sum, shapes)),
        expert_sides=f.experts * sum(map(sum, f.expert)),
        largest=max(rows * columns for rows, columns in shapes + f.expert),
        stream=a.hidden_size,
        streams=a.streams,
        latents=latents,
        normed=normed,
        projected=queries + keys + own_values,
        rebuilt=rebuilt,
        attended=values,
        heads=x.heads,
        hidden=f.hidden + f.chosen * f.expert_hidden,
        gated=f.gated,
        chosen=f.chosen,
    )


# ---------------------------------------------------------------------------------------------- what makes it fit


S = TypeVar("S")  # how something is set up
Change = tuple[float, str, Callable[[S], S]]  # how much it costs, in words, and itself


def ways_to_fit(model: Model, setup: Setup, available: float, *, num: int = 3) -> list[tuple[Setup, str]]:
    """The `num` cheapest changes that make a run fit, each as the set-up and in words, best first; [] where none does, or
    none is needed. They make it green, or amber where nothing makes it green.

    Cheap is what changes neither the result nor the time, then what costs some time, then what trains less of the model,
    then a shorter sequence. None has all kinds of changes that a cheaper one has.
    """
    return cheapest(setup, list(_changes(setup)), lambda s: training_memory(model, s).total, available, num=num)


def cheapest(
    start: S,
    changes: Sequence[Change[S]],
    needed: Callable[[S], float],
    available: float,
    *,
    num: int = 3,
) -> list[tuple[S, str]]:
    """What `ways_to_fit` gives, for any kind of set-up. needed: its bytes. The first word of a change says what kind it is: of a
    kind one is made.
    """
    if verdict(needed(start), available) == "green":
        return []
    several = [each for size in (1, 2, 3, 4) for each in combinations(changes, size) if _differ(each)]
    several.sort(key=lambda each: (sum(cost for cost, _, _ in each), len(each)))
    for wanted in ({"green"}, {"green", "amber"}):
        found: list[tuple[set[str], S, str]] = []
        for each in several:
            kinds = {_kind(change) for change in each}
            if any(before <= kinds for before, _, _ in found):
                continue
            changed = start
            for _, _, change in each:
                changed = change(changed)
            if verdict(needed(changed), available) in wanted:
                found.append((kinds, changed, " + ".join(words for _, words, _ in each)))
            if len(found) == num:
                break
        if found:
            break
    return [(changed, words) for _, changed, words in found]


def _kind(change: Change[S]) -> str:
    return change[1].split()[0]


def _differ(changes: Sequence[Change[S]]) -> bool:
    return len({_kind(change) for change in changes}) == len(changes)


def _changes(s: Setup) -> Iterator[Change[Setup]]:
    """The first word of each says what kind it is."""
    if not s.fused_loss:
        yield 1, "fused loss (logits are never held)", lambda s: replace(s, fused_loss=True)
    size, cost = s.micro_batch, 1.5
    while size > 1:
        size, cost = size // 2, cost + 0.5
        yield cost, f"micro-batch of {size} instead of {s.micro_batch}", _micro_batch(size)
    for level in range(s.shard + 1, 4) if s.dp > 1 else ():
        what = {1: "optimizer states", 2: "gradients too", 3: "weights too"}[level]
        yield 1 + level / 2, f"sharding over {s.dp} devices: {what}", _sharded(level)
    if s.recompute == "none":
        yield 2.5, "recompute norms, MLP activations and up-projections", lambda s: replace(s, recompute="selective")
    if s.recompute != "full":
        yield 4, "recompute whole blocks (a third more work)", lambda s: replace(s, recompute="full")
    if s.lora_rank is None and s.optimizer == "adamw":
        yield 3, "8-bit optimizer states", lambda s: replace(s, optimizer="adamw8bit")
    if s.lora_rank is None:
        yield 8, "LoRA of rank 16 instead of all weights", lambda s: replace(s, lora_rank=16)
        yield 10, "LoRA of rank 16 over int4 weights (QLoRA)", lambda s: replace(s, lora_rank=16, stored="int4")
    elif s.stored != "int4":
        yield 5, "LoRA over int4 weights (QLoRA)", lambda s: replace(s, stored="int4")
    if s.seq_len >= 1024:
        yield 12, f"sequences of {s.seq_len // 2} tokens instead of {s.seq_len}", _halved


def _micro_batch(size: int) -> Callable[[Setup], Setup]:
    """As many sequences a step, or a few more where it does not divide."""
    return lambda s: replace(s, micro_batch=size, accumulate=-(-s.accumulate * s.micro_batch // size))


def _sharded(level: int) -> Callable[[Setup], Setup]:
    return lambda s: replace(s, shard=level)


def _halved(s: Setup) -> Setup:
    return replace(s, seq_len=s.seq_len // 2, accumulate=2 * s.accumulate)


# ---------------------------------------------------------------------------------------------- serving


def serving_memory(
    model: Model,
    *,
    weights: str = "bf16",
    cache: str = "bf16",
    context: int,
    batch: int = 1,
    chunk: int = 2048,
) -> Memory:
    """One device that holds the whole model and answers `batch` requests of `context` tokens at a time. weights: of
    `WEIGHT_BYTES`, embedding and head included, as our formats store them. cache: float32, float16, bf16, fp8 or int8.
    chunk: prompt tokens read at once. How several devices share a model is in `serving`.
    """
    a = architecture_of(model)
    running = max(x.kept("none", 2) - 2 * x.streams * x.stream for x in _layers(a, mtp=False))  # of one block at a time
    return Memory(
        weights=count_parameters(a).total * WEIGHT_BYTES[weights],
        activations=min(chunk, batch * context) * running,
        logits=4.0 * batch * a.vocab_size,
        cache=batch * cache_bytes(a, context, number=cache),
        runtime=CONTEXT_BYTES,
    )


def fitting(
    model: Model,
    available: float,
    *,
    context: int,
    batch: int = 1,
    cache: str = "bf16",
    formats: Sequence[str] = ("bf16", "fp8", "int8", "int4"),
) -> list[tuple[str, float, str]]:
    """(format of the weights, bytes with cache and all, verdict) for serving, the most exact format first."""
    totals = ((f, serving_memory(model, weights=f, cache=cache, context=context, batch=batch).total) for f in formats)
    return [(f, total, verdict(total, available)) for f, total in totals]
