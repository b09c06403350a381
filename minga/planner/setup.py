"""How a model is trained, as far as memory, time and traffic depend on it."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("float32", "bf16", "fp8", "int8")  # of matrix products
STORED = ("float32", "bf16", "fp8", "int8", "int4")  # of weights that are only read
OPTIMIZERS = ("adamw", "adamw8bit", "muon")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Setup:
    """One way to lay a training run over devices. `dp * tp * pp` devices; experts are spread over `ep` of the `dp * tp`
    ranks of a stage, none of them cut (in Megatron: expert tensor parallelism of 1).

    precision: what matrix products are computed in. With float32 everything is; with bf16, fp8 or int8 there is a float32 copy of
    each trained weight for the optimizer (`master`; without it weights, gradients and moments are bf16 alone).
    fed_in_8_bits: with fp8, what feeds products waits for the backward pass in 8 bits, as in Transformer Engine and DeepSeek-V3;
    in torchao's float8 it keeps its 16.
    shard: what is spread over data-parallel ranks: 0 nothing (DDP), 1 optimizer states, 2 gradients too, 3 weights too (FSDP).
    recompute: activations computed again in the backward pass. selective: norms, activations of the MLPs and up-projections;
    full: everything but each block's input.
    lora_rank: trains only low-rank pairs beside every matrix, above weights stored as `stored` (int4: QLoRA).
    """

    seq_len: int
    micro_batch: int = 1  # sequences that a data-parallel rank computes at once
    accumulate: int = 1  # micro-batches of a rank in an optimizer step
    dp: int = 1
    tp: int = 1
    pp: int = 1
    chunks: int = 1  # runs of layers that a pipeline stage holds: more than one is the interleaved schedule
    ep: int = 1
    shard: int = 0
    precision: str = "bf16"
    fed_in_8_bits: bool = True
    optimizer: str = "adamw"
    master: bool = True
    recompute: str = "none"
    fused_loss: bool = False  # the logits of a micro-batch are never held at once
    mtp: bool = True  # the model's multi-token prediction modules, if it has any, are trained too
    lora_rank: int | None = None
    stored: str = "bf16"  # with lora_rank

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def expert_copies(self) -> int:
        """Ranks of a stage that hold the same experts."""
        return max(1, self.dp * self.tp // self.ep)

    @property
    def step_tokens(self) -> int:
        return self.dp * self.micro_batch * self.accumulate * self.seq_len
