"""What a model needs on each device, byte by byte: to be trained in a given set-up, or to serve a given load.

States follow Megatron's and ZeRO's accounting (Rajbhandari et al. 2020, 1910.02054), activations Korthikanti et al. 2022
(2205.05198) carried over to gated MLPs, experts and latent attention: an operation keeps what its gradient asks for, and
today's fused attention keeps no scores. Nothing here is fitted; tests compare with published peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from minga.planner.architecture import Architecture, Model, architecture_of, numbers
from minga.planner.setup import Setup

# Bytes of a stored weight with its scales. fp8: a float32 for each block of 128 x 128 (DeepSeek-V3, 2412.19437, section 3.3);
# int8 and int4: ours, a float16 for 64 and for 32 numbers of a row; Q*: GGUF's.
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
}
EIGHT_BIT = 1 + 4 / 256  # a moment in 8 bits, with a float32 for each 256 numbers (Dettmers et al. 2022, 2110.02861)
# Of a logit in PyTorch's loss: itself in bf16, its float32 copy and the logarithm of its softmax; in the backward pass the
# logarithm, its gradient and that in bf16. With several heads the others wait with their logarithm.
LOGIT_BYTES, WAITING_LOGIT_BYTES = {2: 10, 4: 12}, 4
CONTEXT_BYTES = 1e9  # a CUDA context with its kernels and the libraries' work space
NCCL_BYTES = 0.4e9  # 340 to 392 MB in NVIDIA's measured tables (ai-dynamo/aiconfigurator)
GREEN = 0.8  # of 454 runs estimated below this share none went out of memory (Fujii et al. 2024, 2411.06465)


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
        return sum(getattr(self, f.name) for f in fields(self))


def verdict(total: float, available: float) -> str:
    """green: it fits. amber: it fits if the estimate is exact. red: it does not."""
    return "green" if total < GREEN * available else "amber" if total <= available else "red"


# ---------------------------------------------------------------------------------------------- training


def training_memory(model: Model, setup: Setup) -> Memory:
    """The fullest device of a run. Experts are taken to be chosen evenly, a sequence to be cut in `tp` pieces where it is not
    cut by heads (sequence parallelism), layers to be spread evenly over `pp` stages, each of which holds as many
    micro-batches as stages are left to pass (1F1B).
    """
    a = architecture_of(model)
    layers = _layers(a, mtp=setup.mtp)
    cuts = [stage * len(layers) // setup.pp for stage in range(setup.pp + 1)]
    stages = (_stage(a, setup, layers[cuts[i] : cuts[i + 1]], i) for i in range(setup.pp))
    return max(stages, key=lambda memory: memory.total)


def _stage(model: Architecture, setup: Setup, layers: Sequence[_Layer], stage: int) -> Memory:
    s, d, first, last = setup, model.hidden_size, stage == 0, stage == setup.pp - 1
    number = 4 if s.precision == "float32" else 2
    tokens = s.micro_batch * s.seq_len / s.tp
    num_tables = 1 if first and last and model.tied else first + last
    tables = num_tables * model.vocab_size * d / s.tp
    dense, experts = sum(x.dense for x in layers) / s.tp, sum(x.experts for x in layers) / s.ep
    copies = max(1, s.dp // s.ep)  # ranks that hold the same experts

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
    kept = sum(x.kept(s.recompute, number) for x in layers) + number * d * last
    again = max((x.kept("none", number) - x.kept(s.recompute, number) for x in layers), default=0.0)
    backward = again + number * max((x.widest for x in layers), default=0)
    logits = 0.0
    if last and not s.fused_loss:
        waits = len(model.mtp) * WAITING_LOGIT_BYTES if s.mtp else 0
        logits = model.vocab_size * (LOGIT_BYTES[number] + waits)
    return Memory(
        weights=weights + frozen,
        gradients=gradients,
        optimizer=optimizer,
        activations=tokens * (waiting * kept + backward),
        logits=tokens
        * logits,  # gone before the first block's backward pass, but the allocator seldom reuses their place
        buffers=_buffers(s, layers, tables, tokens, number, d, copies),
        runtime=CONTEXT_BYTES + (NCCL_BYTES if s.devices > 1 else 0.0),
    )


def _moments(s: Setup) -> int:
    """Numbers that the optimizer keeps for one of a matrix; tables and vectors are AdamW's, with two, always."""
    return 1 if s.optimizer == "muon" else 2


def _states(s: Setup, numbers: float, ranks: int, moments: int) -> tuple[float, float, float]:
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
        numbers * weight / (ranks if s.shard == 3 else 1),
        numbers * gradient / (ranks if s.shard >= 2 else 1),
        numbers * optimizer / (ranks if s.shard >= 1 else 1),
    )


def _buffers(
    s: Setup, layers: Sequence[_Layer], tables: float, tokens: float, number: int, d: int, copies: int
) -> float:
    """Fully sharded, weights of the block at work, of the next, and of the tables are gathered; gradients are whole for a
    block before they are spread. An int4 matrix is widened as it is used.
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
    latents: int  # of latent attention, before their norms
    normed: int  # latents after them
    projected: int  # queries, keys and values
    rebuilt: int  # of these, what is projected up from a latent
    attended: int  # what attention gives, all heads
    heads: int
    hidden: int  # of the dense MLP or the shared experts
    gated: bool
    chosen: int
    expert_hidden: int

    def kept(self, recompute: str, number: int) -> float:
        """Bytes a token leaves for the backward pass, with `number` bytes each and a float32 a head for the softmax."""
        if recompute == "full":
            return number * self.stream
        wide = self.hidden + self.chosen * self.expert_hidden
        values = 2 * self.stream + self.latents + self.projected + self.attended
        values += (2 if self.gated else 1) * wide + self.chosen * self.stream  # gate and up; what experts are sent
        if recompute == "selective":
            return number * (values - self.rebuilt) + 4 * self.heads
        values += 2 * self.stream + self.normed  # after norms
        values += (
            2 if self.gated else 1
        ) * wide + self.chosen * self.stream  # activated, multiplied; what experts give
        return number * values + 4 * self.heads

    @property
    def widest(self) -> int:
        """Numbers of the gradients that stand beside them while the MLP's is computed."""
        return (3 if self.gated else 2) * (self.hidden + self.chosen * self.expert_hidden)


def _layers(a: Architecture, *, mtp: bool) -> list[_Layer]:
    layers: list[_Layer] = []
    for number, (count, block) in enumerate([*a.blocks, *((1, block) for block in a.mtp if mtp)]):
        x, f, join = block.attention, block.feed_forward, [a.mtp_join] if number >= len(a.blocks) else []
        queries, values = x.heads * x.qk_dim, x.heads * x.v_dim
        if x.latent is None:
            latents = normed = rebuilt = 0
            projected = queries + x.kv_heads * (x.qk_dim + x.v_dim)
        else:
            normed = sum(x.norms)  # of the latents: that of keys and values, and that of queries if there is one
            latents, projected = normed + x.rope, 2 * queries + values  # latents give keys to every head
            rebuilt = queries + values + (queries if normed > x.latent else 0)
        matrices = [*x.matrices, *f.matrices, *join]
        experts = f.experts * f.expert_parameters
        layer = _Layer(
            dense=block.parameters - experts + numbers(join),
            experts=experts,
            sides=sum(map(sum, matrices)),
            expert_sides=f.experts * sum(map(sum, f.expert)),
            largest=max(rows * columns for rows, columns in (*matrices, *f.expert)),
            stream=a.hidden_size,
            latents=latents,
            normed=normed,
            projected=projected,
            rebuilt=rebuilt,
            attended=values,
            heads=x.heads,
            hidden=f.hidden,
            gated=f.gated,
            chosen=f.chosen,
            expert_hidden=f.expert_hidden,
        )
        layers += count * [layer]
    return layers
