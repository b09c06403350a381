"""How long an optimizer step and a whole run take: a roofline whose coefficients are fitted to published measurements.

    step = step_time(config, setup, machine)         # seconds: step.parts["attention"], ..., step.total.typical
    run = run_time(config, setup, machine, 14.8e12)  # run.gpu_hours, run.days

Each part of a step is an ideal time (work / what the data sheet says, `ideal_times`) times a coefficient that says how far
real stacks are from it. `benchmarks/fit.py` fits the coefficients to the rows of `benchmarks/published` by bounded least
squares of the relative error and writes `coefficients.json`. They are effects that overlap, not constants of the hardware;
their bounds (`BOUNDS`) keep what lies outside the rows physical. `calibrate` moves them to what a user's own machine shows.

The traffic of collectives (Korthikanti et al. 2022, section 4; Rajbhandari et al. 2020, section 7) is counted per device. A
ring over several nodes moves as fast as the slower of the link inside a node and *all* network cards of the node together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

from minga.config.hardware import HOST_LINK, Device, Machine
from minga.errors import UserError
from minga.planner.architecture import Block, FeedForward, Model, architecture_of, numbers
from minga.planner.counts import attention_multiplications, muon_flops
from minga.planner.estimate import Estimate
from minga.planner.setup import Setup

# Part -> least and greatest coefficient. Those of `launches` and `calls` are seconds, all others multiply an ideal time.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "linear": (1.05, 1.9),  # no kernel reaches the peak, the best reach 50-90 % of it
    "experts": (1.05, 2.0),
    "calls": (0.0, 5e-4),  # seconds per expert, layer and micro-batch: kernels of few rows, padding
    "dispatch": (0.3, 3.0),
    "attention": (0.8, 3.5),  # below 1 where the triangle's idle half is skipped better than counted
    "memory": (0.3, 3.0),  # fused kernels read less than counted, eager ones more
    "weights": (0.0, 1.0),
    "logits": (0.3, 3.0),
    "optimizer": (0.3, 3.0),
    "launches": (0.0, 1.5e-3),  # seconds per layer and micro-batch
    "tensor": (0.0, 1.0),  # of traffic, what computation does not hide
    "routing": (0.0, 1.0),
    "data": (0.0, 1.0),
}
TRAFFIC = ("tensor", "routing", "data")
HOP = 10e-6  # seconds of latency from node to node (ai-dynamo/aiconfigurator, its tables of systems)
# Devices whose coefficients are those of another one: the same processor with other memory or links.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "A100-SXM-40GB": ("A100-SXM-40GB", "A100-PCIe-40GB"),
    "A100-SXM-80GB": ("A100-SXM-80GB", "A100-PCIe-80GB", "A800-SXM-80GB"),
    "H100-SXM": (
        "H100-SXM", "H100-PCIe", "H100-NVL", "H800", "H20", "H200", "H200-NVL", "GH200-96GB", "GH200-141GB",
    ),
    "B200": ("B200", "B300", "GB200", "GB300"),
}  # fmt: skip
# From no lost time to the 10 % of Llama 3 405B's 54 days on 16,384 devices (2407.21783, section 3.3.4: "higher than 90 %").
LOST = Estimate(1.0, 1.05, 1.11)
SHIPPED = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True)
class Coefficients:
    """What multiplies each ideal time, and between which factors of the result nine measurements of ten lie."""

    terms: Mapping[str, float]
    dense: tuple[float, float] = (1.0, 1.0)
    sparse: tuple[float, float] = (1.0, 1.0)  # of models with routed experts
    source: str = ""

    def doubt(self, sparse: bool) -> tuple[float, float]:
        return self.sparse if sparse else self.dense


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the slowest device. `parts` add up to the typical total."""

    parts: Mapping[str, float]
    total: Estimate
    tokens: int  # of the step, over all devices

    @property
    def tokens_per_second(self) -> Estimate:
        t = self.total
        return Estimate(self.tokens / t.high, self.tokens / t.typical, self.tokens / t.low)


@dataclass(frozen=True)
class RunTime:
    """A whole run.

    gpu_hours: of its steps alone, typically; the range reaches from the fastest stacks to what the dearest runs are billed.
    billed: what published runs took in all, with restarts, evaluation, checkpoints, slow starts and stacks of all kinds; None
    after a calibration, which has measured the stack itself.
    """

    gpu_hours: Estimate
    billed: Estimate | None
    days: Estimate
    steps: float
    step: StepTime

    def slower(self, factor: float) -> RunTime:
        """The same run, each step taking so many times as long."""
        parts = {name: seconds * factor for name, seconds in self.step.parts.items()}
        step = StepTime(parts, self.step.total * factor, self.step.tokens)
        billed = None if self.billed is None else self.billed * factor
        return RunTime(self.gpu_hours * factor, billed, self.days * factor, self.steps, step)


def step_time(model: Model, setup: Setup, machine: Machine, *, coefficients: Coefficients | None = None) -> StepTime:
    """coefficients: of a calibration; without, the shipped ones of the device's family.

    Raises `UserError` where nodes are joined by a network of unknown speed.
    """
    work, known = work_of(model, setup.seq_len, mtp=setup.mtp), coefficients or coefficients_of(machine.device)
    parts = step_parts(work, setup, machine, known)
    total = sum(parts.values())
    low, high = known.doubt(work.num_experts > 0)
    return StepTime(parts, Estimate(low * total, total, high * total), setup.step_tokens)


def step_parts(work: Work, setup: Setup, machine: Machine, known: Coefficients) -> dict[str, float]:
    """Seconds of a step by part, in sum its typical time."""
    ideal = ideal_times(work, setup, machine)
    parts = {term: known.terms[term] * seconds for term, seconds in ideal.items()}
    exposed, traffic = (sum(times[term] for term in TRAFFIC) for times in (parts, ideal))
    computing = sum(parts.values()) - exposed
    if traffic - exposed > computing:  # traffic hides behind computation, but behind no more of it than there is
        parts |= {term: ideal[term] * (1 - computing / traffic) for term in TRAFFIC}
    idle = idle_factor(setup, work.num_layers)
    bubble = 0.0
    if idle > 1:
        for term in parts:
            if term not in ONCE:
                bubble += parts[term] * (1 - 1 / idle)
                parts[term] /= idle
    return parts | {"bubble": bubble}


def run_time(
    model: Model, setup: Setup, machine: Machine, tokens: float, *, coefficients: Coefficients | None = None
) -> RunTime:
    """GPU-hours and days of a run over so many tokens. After a calibration only lost time is added (`LOST`)."""
    step = step_time(model, setup, machine, coefficients=coefficients)
    steps = tokens / step.tokens
    computing, billed = step.total * (steps * setup.devices / 3600), None
    if coefficients is None:
        low, typical, high = (shipped()["runs"][key] * computing.typical for key in ("low", "typical", "high"))
        billed = Estimate(low, typical, high)
        gpu_hours = Estimate(min(low, computing.low), computing.typical, max(high, computing.high))
    else:
        gpu_hours = computing * LOST
    return RunTime(gpu_hours, billed, gpu_hours / (24 * setup.devices), steps, step)


# ------------------------------------------------------------------------------------------------------------- ideal times


@dataclass(frozen=True)
class Work:
    """What a model asks of a step, per token: multiplications, numbers moved, parameters. Sums over its blocks."""

    hidden_size: int
    num_layers: int
    depth: int  # layers, with those of MTP modules that are trained
    heads: int  # how often the head runs: once, and once per MTP module
    vocab_size: int
    dense: int  # multiplications with matrices that every token passes, head left out; as many parameters
    head: int
    routed: int  # ... with those of chosen experts
    scores: float  # ... with earlier tokens
    moved: int  # numbers read and written outside matrix products
    copied: int  # the same for experts
    tables: int  # parameters of embedding and head
    experts: int  # parameters of all routed experts
    num_experts: int  # in all layers together
    sums: int  # outputs that tensor parallelism sums: of attention and of MLPs
    # Layers with experts: how many, experts of a token, share of groups they lie in.
    chosen: tuple[tuple[int, int, float], ...]
    sides: int  # rows and columns of matrices that every token passes, added up: what LoRA's pairs are as long as
    expert_sides: int  # ... of all routed experts
    muon: int  # products of a Muon step


def work_of(model: Model, seq_len: int, *, mtp: bool = True) -> Work:
    a = architecture_of(model)
    blocks = [*a.blocks, *((1, block) for block in a.mtp if mtp)]
    extra = len(blocks) - len(a.blocks)
    mlps = [(count, block.feed_forward) for count, block in blocks]
    return Work(
        hidden_size=a.hidden_size,
        num_layers=a.num_layers,
        depth=sum(count for count, _ in blocks),
        heads=1 + extra,
        vocab_size=a.vocab_size,
        dense=sum(c * _multiplications(block) for c, block in blocks) + extra * numbers([a.mtp_join]),
        head=numbers(a.head),
        routed=sum(c * f.chosen * numbers(f.expert) for c, f in mlps),
        scores=sum(c * attention_multiplications(block.attention, seq_len) for c, block in blocks),
        moved=sum(c * _moved(block, a.hidden_size) for c, block in blocks),
        copied=sum(c * _copied(f, a.hidden_size) for c, f in mlps),
        tables=(1 if a.tied else 2) * a.vocab_size * a.hidden_size,
        experts=sum(c * f.experts * numbers(f.expert) for c, f in mlps),
        num_experts=sum(c * f.experts for c, f in mlps),
        sums=sum(c * (1 + bool(f.hidden)) for c, f in mlps),
        chosen=tuple((c, f.chosen, f.groups[0] / f.groups[1]) for c, f in mlps if f.experts),
        sides=sum(c * sum(map(sum, b.attention.matrices + b.feed_forward.matrices)) for c, b in blocks),
        expert_sides=sum(c * f.experts * sum(map(sum, f.expert)) for c, f in mlps),
        muon=muon_flops(model, mtp=mtp),
    )


def ideal_times(work: Work, setup: Setup, machine: Machine) -> dict[str, float]:
    """Seconds that a step would take for each reason alone at the rates of the data sheet; of `launches` and `calls`, their
    number. All but `ONCE` are stretched by the pipeline's idle time.
    """
    w, s, device = work, setup, machine.device
    full, frozen = s.recompute == "full", s.lora_rank is not None
    width = 4 if s.precision == "float32" else 2
    fast, slow = device.rate(s.precision), device.rate("float32" if s.precision == "float32" else "bf16")
    split = s.tp * s.pp
    share = s.micro_batch * s.seq_len * s.accumulate / split  # tokens, as if a device computed whole ones alone
    products = 2 + (not frozen) + full  # of a matrix with a token: forward, to the input, to the weight, forward again
    passes = 3 + {"none": 0.0, "selective": 0.5, "full": 1.0}[s.recompute]  # backward moves twice what forward does
    held = (w.dense / s.tp + w.experts / s.ep) / s.pp  # parameters of a device's blocks
    updated = sum(part.trained / (part.ranks if s.shard else 1) for part in _parts(w, s))
    update = _UPDATE[s.optimizer] + 2 * (s.master and width == 2)
    times = {
        "linear": share * 2 * (w.dense * products / fast + w.heads * w.head * (3 - frozen) / slow),
        "experts": share * 2 * w.routed * products / fast,
        # The backward pass of flash attention computes the scores again: five products instead of four.
        "attention": share * 2 * w.scores * (3.5 + full) / slow,
        "memory": share * w.moved * passes * width / device.bandwidth,
        "dispatch": share * w.copied * passes * width / device.bandwidth,
        # Each micro-batch reads every matrix for each product, and adds to its gradient in float32.
        "weights": s.accumulate * held * (products * width + 8 * (not frozen)) / device.bandwidth,
        # bf16 logits out and in, in float32 for the loss, their gradient out and in.
        "logits": share * w.heads * w.vocab_size * (0 if s.fused_loss else 12) / device.bandwidth,
        "optimizer": updated * update / device.bandwidth,
        "launches": s.accumulate * w.depth / s.pp * (3 + full) / 3,
        "calls": s.accumulate * w.num_experts / (s.ep * s.pp) * (3 + full) / 3,
        "tensor": _tensor_bytes(w, s, width) / _link(machine, s.tp, 1),
        "routing": _routing(w, s, machine),
        "data": _data(w, s, machine, width),
    }
    if s.optimizer == "muon":
        times["optimizer"] += w.muon / s.devices / slow
    idle = idle_factor(s, w.num_layers)
    return {term: seconds if term in ONCE else seconds * idle for term, seconds in times.items()}


ONCE = ("optimizer", "data")  # outside the pipeline


def idle_factor(setup: Setup, layers: int) -> float:
    """By what a pipeline stretches a step: stages that wait for the first and last micro-batch (Narayanan et al. 2021,
    section 2.2: (pp - 1) / (micro-batches x chunks)), and the longest stage where layers do not divide.
    """
    if setup.pp == 1:
        return 1.0
    runs = setup.pp * setup.chunks
    return -(-layers // runs) * runs / layers * (1 + (setup.pp - 1) / (setup.accumulate * setup.chunks))


# Bytes read and written per parameter by an update: gradient, weights, moments. A copy that computes comes on top.
_UPDATE = {"adamw": 4 + 2 * 12, "adamw8bit": 4 + 2 * 6, "muon": 4 + 2 * 8}


class _Part(NamedTuple):
    """Of what a device holds, that which the same number of ranks hold too."""

    held: float  # parameters
    trained: float  # of them, or of the low-rank pairs beside them
    ranks: int
    stride: int  # from one to the next


def _parts(w: Work, s: Setup) -> tuple[_Part, _Part]:
    """What every token passes, and the experts, of which tensor ranks hold whole ones."""
    dense, experts = (w.dense + w.tables) / (s.tp * s.pp), w.experts / (s.ep * s.pp)
    trained = dense, experts
    if s.lora_rank is not None:
        trained = s.lora_rank * w.sides / (s.tp * s.pp), s.lora_rank * w.expert_sides / (s.ep * s.pp)
    return _Part(dense, trained[0], s.dp, s.tp), _Part(experts, trained[1], s.expert_copies, s.ep)


def _multiplications(block: Block) -> int:
    """Of a token with the matrices that every token passes."""
    return numbers(block.attention.matrices + block.feed_forward.matrices + block.feed_forward.router + block.mixers)


def _moved(block: Block, D: int) -> int:
    """Numbers that a token's forward pass reads and writes outside matrix products: two norms (in, out), two residual sums
    (two in, one out), rotation of queries and keys, the activation's inputs and output.
    """
    a, f = block.attention, block.feed_forward
    return 10 * D + 2 * (a.heads + a.kv_heads) * a.qk_dim + (3 if f.gated else 2) * f.hidden


def _copied(f: FeedForward, D: int) -> int:
    """The same for experts: copies of a token in their order and back (in, out), and their activations."""
    return f.chosen * (4 * D + (3 if f.gated else 2) * f.expert_hidden)


# ----------------------------------------------------------------------------------------------------------------- traffic


def _link(machine: Machine, members: int, stride: int) -> float:
    """Bytes/s of a device in a ring of so many devices, each `stride` after the last, when all devices of a node do the same."""
    inside = machine.device.link or HOST_LINK
    near = max(1, machine.per_node // stride)  # members in a node
    if members <= near:
        return inside
    return min(inside, network(machine) * near / machine.per_node)


def network(machine: Machine) -> float:
    """Bytes/s of a node, per direction."""
    speed = machine.network or machine.device.network
    if speed is None:
        raise UserError(
            f"{machine.nodes} nodes with {machine.device.name} need a network (machine). say how fast it is, in Gbit/s of a "
            "node: --network 25"
        )
    return speed


def _tensor_bytes(w: Work, s: Setup, width: int) -> float:
    """Of a device: forward and backward each sum the outputs of attention and MLPs over the tensor ranks."""
    rows = s.accumulate * s.micro_batch * s.seq_len * w.sums / s.pp * (2 + (s.recompute == "full"))
    return rows * w.hidden_size * width * 2 * (s.tp - 1) / s.tp


def _routing(w: Work, s: Setup, machine: Machine) -> float:
    """Seconds of all-to-all: each token to its experts (8 bits where products are) and back, and so its gradients.

    A token goes once to each node that has one of its experts, and there to all of them; if its experts lie in a part of all
    groups, so do those nodes (DeepSeek-V3, section 3.2.2).
    """
    if s.ep == 1:
        return 0.0
    near = min(s.ep, max(1, machine.per_node // s.tp))
    nodes, inside = s.ep / near, machine.device.link or HOST_LINK
    seconds = 0.0  # for each byte of each token
    for layers, chosen, part in w.chosen:
        around = chosen * (s.ep - 1) / s.ep * (near - 1) / near / inside
        within = max(1.0, nodes * part)
        reached = within * (1 - (1 - 1 / within) ** chosen)
        away = reached * (nodes - 1) / nodes * machine.per_node / network(machine) if nodes > 1 else 0.0
        seconds += layers * max(away, around)
    there, back = {"float32": (4, 4), "bf16": (2, 2)}.get(s.precision, (1, 2))
    share = s.accumulate * s.micro_batch * s.seq_len / (s.tp * s.pp)
    return share * w.hidden_size * (there + back) * (2 + (s.recompute == "full")) * seconds


def _data(w: Work, s: Setup, machine: Machine, width: int) -> float:
    """Seconds of gathering weights and summing gradients over data ranks, and of handing activations on in a pipeline."""
    seconds = 0.0
    gathers = 2 * s.accumulate if s.shard == 3 else 1 if s.shard else 0
    sums = s.accumulate if s.shard >= 2 else 1 if s.shard else 2
    for part in _parts(w, s):
        if part.ranks == 1 or not part.held:
            continue
        times, numbers = gathers + sums, (gathers + sums) * part.held
        if s.lora_rank is not None:  # only the pairs have gradients
            times = 2 + gathers * (s.shard == 3)
            numbers = 2 * part.trained + gathers * (s.shard == 3) * part.held
        seconds += numbers * width * (part.ranks - 1) / part.ranks / _link(machine, part.ranks, part.stride)
        hops = part.ranks * part.stride / machine.per_node - 1  # around the ring, for each layer's collective
        seconds += times * w.depth / s.pp * HOP * max(0.0, hops)
    if s.pp > 1:
        rows = 2 * s.accumulate * s.micro_batch * s.seq_len * s.chunks / s.tp
        seconds += rows * w.hidden_size * width / _link(machine, s.pp, s.tp * s.dp)
    return seconds


# ------------------------------------------------------------------------------------------------------------ coefficients


@cache
def shipped() -> Mapping[str, Any]:
    """`coefficients.json`, as `benchmarks/fit.py` wrote it."""
    return json.loads(SHIPPED.read_text())


def coefficients_of(device: Device) -> Coefficients:
    """The shipped ones: of the device's family, or, with a wider doubt, those of all rows together."""
    family = next((name for name, members in FAMILIES.items() if device.name in members), "other")
    return _coefficients(shipped()["families"][family])


def _coefficients(found: Mapping[str, Any]) -> Coefficients:
    terms = {term: float(found["terms"][term]) for term in BOUNDS}
    (dense_low, dense_high), (sparse_low, sparse_high) = found["dense"], found["sparse"]
    return Coefficients(terms, (dense_low, dense_high), (sparse_low, sparse_high), found["source"])


@dataclass(frozen=True)
class Measured:
    """One measured step: `seconds` is the mean of a few, the first ones left out."""

    model: Model
    setup: Setup
    machine: Machine
    seconds: float


def calibrate(rows: Sequence[Measured], *, start: Coefficients | None = None) -> Coefficients:
    """The coefficients that explain these steps of one machine.

    All of `start` (the shipped ones) are first multiplied by one factor from 1/3 to 10, which two or three rows determine.
    Then each moves as far as more rows say: one that they say nothing about stays, since moving it costs as much as an error.
    """
    if not rows:
        raise UserError(
            "there is no measured step (calibration). measure at least one, better three of different sizes"
        )
    start = start or coefficients_of(rows[0].machine.device)
    shares = [shares_of(row) for row in rows]
    sums = [sum(start.terms[term] * share[term] for term in start.terms) for share in shares]
    factor = min(10.0, max(1 / 3, sum(sums) / sum(value * value for value in sums)))
    scaled = {term: factor * value for term, value in start.terms.items()}
    bounds = {term: (low * min(1.0, factor), high * max(1.0, factor)) for term, (low, high) in BOUNDS.items()}
    found = least_squares(shares, bounds, scaled, pull=0.1)
    errors = [abs(sum(found[term] * share[term] for term in found) - 1) for share in shares]
    spread = max(0.15, *errors)  # a handful of rows says little about its own doubt
    dense = (1 / (1 + spread), 1 + spread)
    sparse = (dense[0] * start.sparse[0] / start.dense[0], dense[1] * start.sparse[1] / start.dense[1])
    return Coefficients(found, dense, sparse, f"{len(rows)} measured steps of this machine")


def shares_of(row: Measured) -> dict[str, float]:
    """Ideal times as parts of the measured one: what coefficients turn into a sum of 1."""
    work = work_of(row.model, row.setup.seq_len, mtp=row.setup.mtp)
    return {term: ideal / row.seconds for term, ideal in ideal_times(work, row.setup, row.machine).items()}


def least_squares(
    shares: Sequence[Mapping[str, float]],
    bounds: Mapping[str, tuple[float, float]],
    start: Mapping[str, float],
    *,
    pull: float = 0.0,
) -> dict[str, float]:
    """Coefficients within bounds with which each row's shares add up to 1 as nearly as can be, in the sense of squares.

    pull: what it costs to leave `start`, as if a row said, with an error so many times as heavy, that a term is where it was.
    By coordinate descent: exact for so few terms, respects the bounds, needs no library.
    """
    terms = list(bounds)
    scale = [start[term] or bounds[term][1] for term in terms]  # unknowns are relative: all of the size of 1
    rows = [[share.get(term, 0.0) * size for term, size in zip(terms, scale, strict=True)] for share in shares]
    first = [start[term] / size for term, size in zip(terms, scale, strict=True)]
    square = [[sum(row[i] * row[j] for row in rows) for j in range(len(terms))] for i in range(len(terms))]
    right = [sum(row[i] for row in rows) for i in range(len(terms))]
    for i in range(len(terms)):
        square[i][i] += pull**2
        right[i] += pull**2 * first[i]
    low, high = ([bounds[term][end] / size for term, size in zip(terms, scale, strict=True)] for end in (0, 1))
    x = [min(h, max(v, lo)) for lo, v, h in zip(low, first, high, strict=True)]
    for _ in range(20_000):
        moved = 0.0
        for i, row in enumerate(square):
            if row[i]:
                step = (right[i] - sum(map(mul, row, x))) / row[i]
                new = min(high[i], max(low[i], x[i] + step))
                moved = max(moved, abs(new - x[i]))
                x[i] = new
        if moved < 1e-9:
            break
    return {term: value * size for term, value, size in zip(terms, x, scale, strict=True)}
