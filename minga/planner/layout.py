"""Which parallel set-up trains a model on a machine in the least time: a search over what people use, by predicted time.

    setup = choose_setup(config, machine, precision="bf16", seq_len=4096, fits=lambda setup: ...)

Tensor parallelism stays inside a node, as its traffic cannot hide; pipelines, experts and data ranks go across. Ties go to
fewer pipeline stages and tensor ranks. Memory is somebody else's question, `fits`, asked only of set-ups that would be
faster than the best one found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from minga.config.hardware import Machine
from minga.errors import UserError
from minga.planner.architecture import Architecture, Model, architecture_of
from minga.planner.setup import RECOMPUTE, Setup
from minga.planner.time import Coefficients, coefficients_of, idle_factor, step_parts, work_of

# Tokens of a step: of GPT-3's smallest models (2005.14165, table 2.1), of Llama 3 405B (2407.21783, section 3.4.1).
LEAST_BATCH, MOST_BATCH = 2**19, 2**24
MOST_MICRO_BATCH = 64


def typical_batch(model: Model, tokens: float | None = None) -> int:
    """Tokens of a step, 0.292 C^0.3271 for C FLOPs (DeepSeek LLM, 2401.02954, section 3.1), from 0.5 to 16 million.

    tokens: of the whole run; without, 20 for each active parameter (Hoffmann et al. 2022).
    """
    work = work_of(model, 1, mtp=False)
    active = work.dense + work.routed + work.head
    compute = 6 * active * (tokens or 20 * active)
    return int(min(MOST_BATCH, max(LEAST_BATCH, 0.292 * compute**0.3271)))


def choose_setup(
    model: Model,
    machine: Machine,
    *,
    precision: str,
    seq_len: int,
    fits: Callable[[Setup], bool],
    tokens: float | None = None,
    batch_tokens: float | None = None,
    shard: int | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    recompute: str | None = None,
    micro_batch: int | None = None,
    optimizer: str = "adamw",
    master: bool = True,
    lora_rank: int | None = None,
    stored: str = "bf16",
    mtp: bool = True,
    fused_loss: bool = False,
    coefficients: Coefficients | None = None,
) -> Setup:
    """The set-up of all devices with the least predicted time for a token, of those that `fits` says fit.

    What is given is fixed, what is None is chosen. tokens: of the whole run, and batch_tokens: of a step, which is rounded to
    what the data ranks can share; without it `typical_batch`. Raises `UserError` if nothing fits or can be.
    """
    arch = architecture_of(model)
    work, known = work_of(arch, seq_len, mtp=mtp), coefficients or coefficients_of(machine.device)
    sequences = max(1, round((batch_tokens or typical_batch(arch, tokens)) / seq_len))
    fixed = Setup(
        seq_len=seq_len, precision=precision, optimizer=optimizer, master=master, lora_rank=lora_rank,
        stored=stored, mtp=mtp, fused_loss=fused_loss,
    )  # fmt: skip
    recomputes = [recompute] if recompute else list(RECOMPUTE)

    def cost(setup: Setup) -> float:
        return sum(step_parts(work, setup, machine, known).values()) / setup.step_tokens

    def variants(layout: Setup) -> list[tuple[float, Setup]]:
        """With each micro-batch that the batch allows, the fastest first."""
        share = max(1, round(sequences / layout.dp))  # sequences of a data rank
        sizes = [micro_batch] if micro_batch else [2**n for n in range(MOST_MICRO_BATCH.bit_length()) if 2**n <= share]
        found = []
        for size in sizes:
            setup = replace(layout, micro_batch=size, accumulate=max(1, round(share / size)))
            setup = replace(setup, chunks=_chunks(setup, work.num_layers))
            found.append((cost(setup), setup))
        return sorted(found, key=lambda pair: pair[0])

    cuts = list(_layouts(arch, machine, fixed, shard, tp, pp, ep))
    if not cuts:
        raise UserError(
            f"{machine.count} devices cannot be cut like that (tp, pp, ep). each must divide what is left of the devices, "
            "tensor ranks the attention heads, expert ranks the experts"
        )
    # No data rank is without a sequence, unless the devices are too many for any cut. The least time of a layout is that
    # without recomputing: layouts are tried in that order, until none can win any more.
    ranks = max(sequences * 4 / 3, min(layout.dp for layout in cuts))
    layouts = [(variants(replace(layout, recompute=recomputes[0])), layout) for layout in cuts if layout.dp <= ranks]
    best: tuple[float, Setup] | None = None
    for tried, layout in sorted(layouts, key=lambda pair: pair[0][0][0]):
        if best and tried[0][0] >= best[0]:
            break
        smallest = min((setup for _, setup in tried), key=lambda setup: setup.micro_batch)
        if not fits(replace(smallest, recompute=recomputes[-1])):
            continue
        for kind in recomputes:
            if kind != recomputes[0]:
                tried = variants(replace(layout, recompute=kind))
            for time, setup in tried:
                if best and time >= best[0]:
                    break
                if fits(setup):
                    best = time, setup
                    break
    if best is None:
        raise UserError(
            f"no set-up of {machine.count} {machine.device.name} holds this model in training (memory). a smaller model, "
            "shorter sequences, more devices, LoRA, or an optimizer with 8-bit states would"
        )
    return best[1]


def _layouts(
    arch: Architecture,
    machine: Machine,
    fixed: Setup,
    shard: int | None,
    tp: int | None,
    pp: int | None,
    ep: int | None,
) -> Iterator[Setup]:
    """Cuts of the devices, the least cut first."""
    heads = math.gcd(*(block.attention.heads for _, block in arch.blocks))
    experts = math.gcd(*(block.feed_forward.experts for _, block in arch.blocks))  # 0 without any
    for stages, ranks in product(_powers(machine.count, pp), _powers(machine.per_node, tp)):
        if machine.count % (stages * ranks) or heads % ranks or stages > arch.num_layers:
            continue
        dp = machine.count // (stages * ranks)
        shards = [shard] if shard is not None else [0] if dp == 1 else [1] if stages > 1 else [1, 3]
        for spread, level in product(_powers(dp, ep) if experts else [1], shards):
            if dp % spread == 0 and experts % spread == 0:
                yield replace(fixed, dp=dp, tp=ranks, pp=stages, ep=spread, shard=level)


def _powers(most: int, given: int | None) -> list[int]:
    return [given] if given else [2**n for n in range(most.bit_length())]


def _chunks(setup: Setup, layers: int) -> int:
    """Of a pipeline stage: as many as shorten its idle time, up to 4. Interleaving needs micro-batches in whole rounds."""
    if setup.pp == 1 or setup.accumulate % setup.pp:
        return 1
    return min((1, 2, 4), key=lambda chunks: idle_factor(replace(setup, chunks=chunks), layers))
