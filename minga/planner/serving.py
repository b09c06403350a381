"""What a machine serves: tokens per second, and what a million of them cost, from a roofline.

    s = serve_estimate(v3(), machine, utilization=0.5, prompt_tokens=4000, output_tokens=1000, price=Estimate(1.5, 2, 3))
    s.decode.tokens_per_second, s.prefill.tokens_per_second, s.cost.output           # each an estimate

A decoding step over B sequences that each hold `context` tokens takes, on each device,

    max(matrix bytes / bandwidth, matrix FLOPs / rate) + activation bytes / bandwidth
      + max(cache bytes / bandwidth, attention FLOPs / rate) + what of the traffic between devices is not hidden + launching

Matrix bytes are those of the experts that B tokens wake, E (1 - (1 - A / E)^B), and of everything else; MLA attends in its
absorbed form, over latents. Prefill computes the same with the tokens of whole prompts. Two ways to lay a copy of the model over
devices: "tensor" cuts each matrix and sums with two all-reduces a layer; "expert" gives each device sequences and experts of its
own, and sends a token to its experts (one byte a number) and their answers back (two bytes). Where it is faster, two half-batches
take turns then: one is sent while the other computes, and weights are read twice (DeepSeek-V3 report, section 3.4).

How much of what a machine can do is asked of it, its utilization, is the first argument, for it decides the cost.

Constants were set on the rows of benchmarks/published/serving.csv that are marked "fit"; low and high hold nine of ten, or more.
B sequences, E experts, A chosen experts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minga.config.hardware import HOST_LINK, Machine
from minga.errors import UserError
from minga.planner.architecture import Architecture, Block, Model, architecture_of, numbers
from minga.planner.counts import CACHED, cache_bytes, count_parameters, forward_flops, parameters_read
from minga.planner.estimate import Estimate, Fact
from minga.planner.memory import WEIGHT_BYTES, Memory
from minga.planner.words import size as size_words

# What matrices of weights of each format are multiplied in: four-bit integers are only storage.
PRODUCTS = {"float32": "float32", "bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "bf16", "fp4": "fp4"}

LINK_SHARE = 0.8  # of a link's rate that collectives reach (InferSim)
# Of the peak, what the best matrix product reaches where a device's own figure is not known: of fp4, and of any other format,
# 0.68 to 0.87 (stas00/ml-engineering, MAMF).
ACHIEVABLE, ANY_ACHIEVABLE = {"fp4": 0.5}, 0.75


@dataclass(frozen=True)
class Kernels:
    """What an engine's kernels reach of a device's figures."""

    bandwidth: float = 0.8  # NVIDIA aiconfigurator; InferSim
    products: float = 1.0  # of the best matrix product
    attention: float = 0.6  # of the bf16 peak; FlashMLA and FlashAttention 3 on Hopper: 0.65 to 0.75
    unpack: float = 0.8  # of the bandwidth, weights of four bits
    launch: float = 50e-6  # seconds a layer
    # How often a matrix product's input and output cross the memory, in bf16: also for norms, activations, quantisation; of
    # experts for gathering, sorting and adding up rows, and for waiting where some experts get more of them.
    passes: float = 2.5
    expert_passes: float = 14.0


# Those of processors are of our own engine, set on model B of `minga bench engine` on two cores (docs/log.md); its products of
# four-bit weights are those of 8 bits, and their peak was measured on large matrices.
KERNELS = {
    "apple": Kernels(unpack=0.5),
    "cpu": Kernels(bandwidth=0.9, products=0.55, attention=1.0, unpack=0.75, launch=5e-6),
}
MEMORY_SHARE = 0.9  # of a device's memory, for weights and cache (vLLM and TensorRT-LLM default)
MESSAGE = 10e-6  # seconds that a collective takes at least (aiconfigurator)
MAX_BATCH = 1024  # sequences that an engine schedules at once on a device
PREFILL_TOKENS = 8192  # and tokens of prompts (vLLM's and TensorRT-LLM's default)
# Tokens/s, of the typical value: 97 % of the rows that constants were set on lie between, and 95 % of the others.
DOUBT = Estimate(0.6, 1.0, 1.4)
DOUBT_REASON = "between low and high lie at least nine of ten published rows (benchmarks/published/serving.csv)"
GAIN_DOUBT = 0.85  # of a gain by guesses. An assumption: few are published with batch and acceptance
SOURCE = "roofline; constants set on published rows (benchmarks/published/serving.csv)"


@dataclass(frozen=True)
class Phase:
    """Prefill or decode, with the whole machine doing nothing else."""

    devices: int  # that share a copy of the model
    parallel: str  # "one", "tensor" or "expert"
    batch: int  # sequences that a copy decodes at once; tokens that it prefills at once
    seconds: float  # of a step, typical
    limit: str  # what the step waits for most: "memory", "arithmetic", "attention", "network" or "launching"
    tokens_per_second: Estimate  # of the machine; in prefill, tokens found in a cache count too


@dataclass(frozen=True)
class Cost:
    """Money per million tokens, idle time of the machine paid."""

    input: Estimate
    output: Estimate  # decoding alone
    blended: Estimate  # of a request's prompt and output together


@dataclass(frozen=True)
class Serving:
    utilization: float
    prefill: Phase
    decode: Phase
    per_user: Estimate  # tokens/s that one user sees while nobody's prompt is in the way
    speculation: Estimate | None  # decode with guesses, of decode without; below 1 they cost more than they bring
    requests_per_second: Estimate  # of the machine, prefill and decode sharing its time, at this utilization
    cost: Cost | None  # None without a price
    memory: Memory  # of a device, full: weights, and the cache of all sequences
    facts: tuple[Fact, ...]

    @property
    def needed(self) -> float:
        """Bytes of a device without which nothing is served: weights, and the cache of one sequence. More of them fill
        what is left, by choice.
        """
        return self.memory.weights + self.memory.cache / self.decode.batch


@dataclass(frozen=True)
class _Step:
    """Seconds of one step of a copy, by part."""

    matrices_memory: float
    matrices_arithmetic: float
    activations: float
    cache: float
    attention: float
    network: float
    launch: float
    overlap: bool

    @property
    def computing(self) -> float:
        matrices, attention = max(self.matrices_memory, self.matrices_arithmetic), max(self.cache, self.attention)
        return matrices + self.activations + attention

    @property
    def seconds(self) -> float:
        busy = max(self.computing, self.network) if self.overlap else self.computing + self.network
        return busy + self.launch

    @property
    def parts(self) -> dict[str, float]:
        return {
            "matrices_memory": self.matrices_memory,
            "matrices_arithmetic": self.matrices_arithmetic,
            "activations": self.activations,
            "cache": self.cache,
            "attention": self.attention,
            "network": self.network,
            "launch": self.launch,
        }

    @property
    def limit(self) -> str:
        parts = {
            "memory": (self.matrices_memory >= self.matrices_arithmetic) * self.matrices_memory
            + self.activations
            + (self.cache >= self.attention) * self.cache,
            "arithmetic": (self.matrices_memory < self.matrices_arithmetic) * self.matrices_arithmetic,
            "attention": (self.cache < self.attention) * self.attention,
            "network": self.network if not self.overlap or self.network > self.computing else 0.0,
            "launching": self.launch,
        }
        return max(parts, key=lambda name: parts[name])


class _Copy:
    """A copy of a model over `devices` of a machine."""

    def __init__(
        self, model: Architecture, machine: Machine, devices: int, parallel: str, weights: str, cache: str, mtp: bool
    ):
        """mtp: it guesses, so that its MTP modules are in memory too."""
        self.model, self.guesses = model, mtp
        a = model
        self.machine, self.devices, self.parallel, self.number = machine, devices, parallel, cache
        device, number = machine.device, PRODUCTS[weights]
        self.kernels = KERNELS.get(device.kind, Kernels())
        if device.kind == "cpu" and weights == "int4":
            number = "int8"
        number = device.nearest(number)
        share = device.achievable.get(number) or ACHIEVABLE.get(number, ANY_ACHIEVABLE)
        self.matrix_rate = device.rate(number) * share * self.kernels.products
        self.attention_rate = device.rate("bf16") * self.kernels.attention
        self.bandwidth = self.kernels.bandwidth * device.bandwidth
        self.link = device.link or HOST_LINK
        if devices > machine.per_node:
            self.link = (machine.network or 0.0) / machine.per_node  # 0: not known
        self.unpack = self.kernels.unpack if weights == "int4" else 1.0
        self.bytes = WEIGHT_BYTES[weights]

        counts = count_parameters(a)
        self.experts, total = counts.routed_experts, counts.total
        if mtp:
            self.experts += sum(b.feed_forward.experts * b.feed_forward.expert_parameters for b in a.mtp)
            total = counts.total_with_mtp
        self.rest = total - self.experts
        self.hidden, self.layers = a.hidden_size, a.num_layers
        self.chosen = [(count, b.feed_forward.chosen) for count, b in a.blocks if b.feed_forward.experts]
        self.head = numbers(a.head)
        self.traffic = 2 * sum(count * _traffic(block, self.kernels) for count, block in a.blocks)
        # The cache of keys is cut by heads; MLA's latent belongs to all heads, so each device of a "tensor" copy holds all of it.
        heads = min(1 if b.attention.latent else b.attention.kv_heads for _, b in a.blocks)
        self.cut = devices if parallel == "tensor" else 1  # of matrices beside experts
        self.shares = min(devices, heads) if parallel == "tensor" else devices  # of the cache

    # ------------------------------------------------------------------------------------------ memory

    @property
    def held(self) -> float:
        """Bytes of weights on a device."""
        return (self.rest / self.cut + self.experts / self.devices) * self.bytes

    def sequences(self, tokens: float) -> int:
        """That fit, each with so many tokens in the cache."""
        free = max(0.0, MEMORY_SHARE * self.machine.device.memory - self.held)
        limit = MAX_BATCH * (self.devices if self.parallel == "expert" else 1)
        return min(limit, int(free * self.shares / self.cache(tokens, mtp=self.guesses)))

    def cache(self, tokens: float, *, mtp: bool = False) -> int:
        """Bytes of a sequence of so many tokens. mtp: those of the MTP modules too."""
        return cache_bytes(self.model, round(tokens), number=self.number, mtp=mtp)

    # ------------------------------------------------------------------------------------------ time

    def decode(self, sequences: float, context: float, tokens: int = 1) -> _Step:
        return self._fastest(sequences, tokens, context)

    def draft(self, sequences: float, context: float, tokens: float) -> _Step:
        """The MTP module's guess."""
        return self._fastest(sequences, tokens, context, mtp=True)

    def prefill(self, tokens: float, context: float) -> _Step:
        return self._fastest(tokens, 1, context, prefill=True)

    def _fastest(
        self, sequences: float, tokens: float, context: float, *, prefill: bool = False, mtp: bool = False
    ) -> _Step:
        """In one piece, or in two halves that hide each other's traffic, where weights are read twice for it."""
        ways = (1, 2) if self.parallel == "expert" else (1,)
        steps = [self._step(sequences, tokens, context, halves, prefill=prefill, mtp=mtp) for halves in ways]
        return min(steps, key=lambda step: step.seconds)

    def _step(self, sequences: float, tokens: float, context: float, halves: int, *, prefill: bool, mtp: bool) -> _Step:
        """`tokens` new ones of each of `sequences`, each of which attends over `context`."""
        c, n, rows = self.model, self.devices, sequences * tokens
        still = parameters_read(c, 0, mtp=mtp)
        woken = parameters_read(c, rows / halves, mtp=mtp) - still
        matrices = forward_flops(c, 0)
        core = forward_flops(c, round(context), absorbed=not prefill) - matrices
        share = 1.0  # of the layers
        if mtp:
            matrices, share = forward_flops(c, 0, mtp=True) - matrices, 1 / self.layers
        elif prefill:
            matrices -= 2 * self.head  # only a prompt's last token needs the head
        cached = 0.0 if prefill else sequences * self.cache(context)
        return _Step(
            matrices_memory=halves * (still / self.cut + woken / n) * self.bytes / (self.unpack * self.bandwidth),
            matrices_arithmetic=rows * matrices / n / self.matrix_rate,
            activations=share * rows * self.traffic * ((1 + 1 / n) / 2 if self.cut > 1 else 1 / n) / self.bandwidth,
            cache=share * cached / self.shares / self.bandwidth,
            attention=share * rows * core / n / self.attention_rate,
            network=share * self._network(rows, prefill=prefill),
            launch=share * halves * self.layers * self.kernels.launch,
            overlap=halves == 2,
        )

    def _network(self, rows: float, *, prefill: bool) -> float:
        n = self.devices
        if n == 1:
            return 0.0
        link = LINK_SHARE * self.link
        if self.parallel == "tensor":
            return 2 * self.layers * max(MESSAGE, 2 * (n - 1) / n * rows * self.hidden * 2 / link)
        # In prefill a token goes to each node once, and on from there over the faster links (DeepEP).
        places = n // self.machine.per_node if prefill and n > self.machine.per_node else n
        seconds = 0.0
        for count, chosen in self.chosen:
            copies = chosen if places == n else places * (1 - (1 - 1 / places) ** chosen)
            seconds += count * max(2 * MESSAGE, 3 * rows / n * copies * (places - 1) / places * self.hidden / link)
        return seconds


def _traffic(block: Block, kernels: Kernels) -> float:
    """Numbers that inputs and outputs of the matrix products of a token move through memory."""
    f = block.feed_forward
    plain = sum(rows + columns for rows, columns in block.attention.matrices + f.matrices + f.router)
    return kernels.passes * plain + kernels.expert_passes * f.chosen * sum(rows + columns for rows, columns in f.expert)


def serve_estimate(
    model: Model,
    machine: Machine,
    *,
    utilization: float,
    prompt_tokens: float,
    output_tokens: float,
    context: float | None = None,
    weights: str = "fp8",
    cache: str = "bf16",
    target: float | None = None,
    batch: int | None = None,
    acceptance: float | None = None,
    cached_share: float = 0.0,
    price: Estimate | None = None,
    devices: int | None = None,
    parallel: str | None = None,
) -> Serving:
    """What `machine` serves of `model`, to requests of so many tokens.

    utilization: of what the machine could serve, the share that is asked of it. context: mean number of tokens that a new one
    attends over in decoding (default: the prompt and half of the answer). target: tokens/s that each user must get; the largest
    batch that gives it is taken, else the largest that fits. batch: sequences of a copy, instead. acceptance: the share of
    the MTP module's guesses that are right; decoding guesses where that is faster. cached_share: of prompts' tokens, those found
    in a prefix cache. price: of a device-hour. devices: of a copy, and `parallel` "tensor" or "expert" (default: the fastest).
    Raises `UserError` for what is impossible or does not fit.
    """
    model = architecture_of(model)
    _check(
        model,
        machine,
        weights,
        cache,
        utilization,
        acceptance,
        cached_share,
        prompt_tokens,
        output_tokens,
        target,
        devices,
        parallel,
    )
    context = prompt_tokens + output_tokens / 2 if context is None else context
    # Room is kept for the whole of each answer, as TensorRT-LLM does, unless the caller knows that so many go together.
    longest = context if batch is not None else max(context, prompt_tokens + output_tokens)
    copies = list(_copies(model, machine, weights, cache, devices, parallel, acceptance is not None))
    plans = []
    for copy in copies:
        fits = copy.sequences(longest)
        seconds = _seconds(copy, context, acceptance)
        size = _largest(fits, seconds, target) if batch is None else batch if batch <= fits else 0
        if size:
            plans.append((size / seconds(size) / copy.devices, size, copy))
    if not plans:
        raise UserError(_why(copies, longest, target, batch))
    _, size, copy = max(plans, key=lambda plan: plan[0])

    per_token = _seconds(copy, context, acceptance)(size)
    plain = copy.decode(size, context)
    groups = machine.count // copy.devices
    decode = Phase(copy.devices, copy.parallel, size, per_token, plain.limit, DOUBT * (groups * size / per_token))
    rows = PREFILL_TOKENS * (copy.devices if copy.parallel == "expert" else 1)
    span = prompt_tokens * (1 + cached_share) / 2
    step = copy.prefill(rows, span)
    rate = groups * rows / step.seconds / (1 - cached_share)
    prefill = Phase(copy.devices, copy.parallel, rows, step.seconds, step.limit, DOUBT * rate)
    together = prompt_tokens / rate + output_tokens / decode.tokens_per_second.typical
    requests = DOUBT * (utilization / together)
    cost = None
    if price is not None:
        hourly = price * machine.count
        cost = Cost(
            input=_per_million(hourly, prefill.tokens_per_second * utilization),
            output=_per_million(hourly, decode.tokens_per_second * utilization),
            blended=_per_million(hourly, requests * (prompt_tokens + output_tokens)),
        )
    speculation = None
    if acceptance is not None:
        gain = plain.seconds / _guessing(copy, size, context, acceptance)
        speculation = Estimate(gain * GAIN_DOUBT, gain, min(1 + acceptance, gain / GAIN_DOUBT))
    found = Serving(
        utilization=utilization,
        prefill=prefill,
        decode=decode,
        per_user=DOUBT * (1 / per_token),
        speculation=speculation,
        requests_per_second=requests,
        cost=cost,
        memory=Memory(weights=copy.held, cache=size * copy.cache(longest, mtp=copy.guesses) / copy.shares),
        facts=(),
    )
    inputs = {
        "fit": copy.sequences(longest),
        "target_tokens_per_second": target,
        "acceptance": acceptance,
        "copies": groups,
        "cached_share": cached_share,
        "price_of_device_hour": price,
        "devices": machine.count,
    }
    return replace(found, facts=tuple(_facts(found, plain, step, prompt_tokens, output_tokens, context, inputs)))


def _facts(
    found: Serving,
    plain: _Step,
    step: _Step,
    prompt_tokens: float,
    output_tokens: float,
    context: float,
    inputs: Mapping[str, Any],
) -> Iterator[Fact]:
    """plain: a decoding step without guesses. step: of prefill."""

    def some(*names: str) -> dict[str, Any]:
        return {name: inputs[name] for name in names if inputs[name] is not None}

    decode, prefill = found.decode, found.prefill
    yield Fact(
        "serve.utilization",
        found.utilization,
        "share",
        "utilisation",
        "an input: of what the machine could serve, the share asked of it",
    )
    memory = {"weights": found.memory.weights, "cache": found.memory.cache, "laid_out": decode.parallel}
    yield Fact("serve.devices", decode.devices, "", "devices that share a copy", "the fastest that holds it", memory)
    yield Fact(
        "serve.batch",
        decode.batch,
        "",
        "sequences of a copy at once",
        "the largest that fits memory and, if one is given, the target",
        {"context": context, **some("fit", "target_tokens_per_second")},
    )
    yield Fact(
        "serve.decode.step_seconds",
        plain.seconds,
        "s",
        formula="max(matrix bytes / bandwidth, matrix FLOPs / rate) + activation bytes / bandwidth + max(cache bytes / "
        f"bandwidth, attention FLOPs / rate) {'or' if plain.overlap else '+'} traffic + launching",
        inputs=plain.parts,
        source=SOURCE,
    )
    yield Fact(
        "serve.prefill.tokens_per_second",
        prefill.tokens_per_second,
        "tokens/s",
        "reads, doing nothing else",
        "copies x tokens / step / (1 - cached share); " + DOUBT_REASON,
        {"tokens": prefill.batch, **some("copies", "cached_share"), **step.parts},
        SOURCE,
    )
    yield Fact(
        "serve.decode.tokens_per_second",
        decode.tokens_per_second,
        "tokens/s",
        f"writes, doing nothing else (waits for {decode.limit})",
        "copies x batch / seconds per token; " + DOUBT_REASON,
        {"batch": decode.batch, "seconds_per_token": decode.seconds, **some("copies", "acceptance")},
        SOURCE,
    )
    yield Fact(
        "serve.per_user",
        found.per_user,
        "tokens/s",
        "writes for one user",
        "1 / seconds per token, while nobody's prompt is in the way",
        {"seconds_per_token": decode.seconds},
        SOURCE,
    )
    if found.speculation is not None:
        yield Fact(
            "serve.speculation",
            found.speculation,
            "times",
            "by multi-token prediction",
            "tokens a step with guesses x time without / time with them; below 1 guesses are left out",
            {"batch": decode.batch, **some("acceptance")},
            SOURCE,
        )
    yield Fact(
        "serve.requests_per_second",
        found.requests_per_second,
        "requests/s",
        f"requests of {prompt_tokens:,.0f} + {output_tokens:,.0f} tokens",
        "utilisation / (prompt / reading speed + answer / writing speed)",
        {"utilization": found.utilization},
        SOURCE,
    )
    if found.cost is not None:
        for name, words in (("input", "a million tokens read"), ("output", "written"), ("blended", "of both")):
            yield Fact(
                f"serve.cost_per_million.{name}",
                getattr(found.cost, name),
                "USD",
                words,
                "price x devices / (tokens/s x utilisation), low price with high rate",
                {"utilization": found.utilization, **some("price_of_device_hour", "devices")},
                SOURCE,
            )


def _guessing(copy: _Copy, size: float, context: float, acceptance: float) -> float:
    """Seconds per token and sequence where each step checks a guess of the MTP module, whose tokens are 1 + acceptance."""
    tokens = 1 + acceptance
    both = copy.decode(size, context, 2).seconds + copy.draft(size, context, tokens).seconds
    return both / tokens


def _seconds(copy: _Copy, context: float, acceptance: float | None) -> Callable[[float], float]:
    """Seconds from a token of a sequence to its next, for a batch: without guesses, or with them where that is faster."""

    def seconds(size: float) -> float:
        plain = copy.decode(size, context).seconds
        return plain if acceptance is None else min(plain, _guessing(copy, size, context, acceptance))

    return seconds


def _largest(fits: int, seconds: Callable[[float], float], target: float | None) -> int:
    """Batch, at most `fits`, that gives each user `target` tokens/s; 0 where none does. Steps grow with the batch."""
    if target is None or (fits and seconds(fits) <= 1 / target):
        return fits
    low, high = 0, fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= 1 / target else (low, middle)
    return low


def _copies(
    model: Architecture,
    machine: Machine,
    weights: str,
    cache: str,
    devices: int | None,
    parallel: str | None,
    mtp: bool,
) -> Iterator[_Copy]:
    """Ways to lay a copy over devices: powers of two in a node, then whole nodes, then all."""
    inside = {2**k for k in range(10) if 2**k < machine.per_node}
    nodes = {machine.per_node * 2**k for k in range(12)}
    sizes = {n for n in inside | nodes if n <= machine.count} | {machine.count}
    for n in [devices] if devices else sorted(sizes):
        experts = min((b.feed_forward.experts for _, b in model.blocks if b.feed_forward.experts), default=0)
        ways = ["expert", "tensor"] if n <= experts else ["tensor"]
        for way in ["one"] if n == 1 else [parallel] if parallel else ways:
            copy = _Copy(model, machine, n, way, weights, cache, mtp)
            if n == 1 or copy.link:
                yield copy


def _per_million(hourly: Estimate, rate: Estimate) -> Estimate:
    """Money for a million tokens: cheapest where the price is low and the rate high."""
    ends = ((hourly.low, rate.high), (hourly.typical, rate.typical), (hourly.high, rate.low))
    return Estimate(*(price / (3600 * tokens) * 1e6 for price, tokens in ends))


# ---------------------------------------------------------------------------------------------- what cannot be


def _check(
    model: Architecture,
    machine: Machine,
    weights: str,
    cache: str,
    utilization: float,
    acceptance: float | None,
    cached_share: float,
    prompt_tokens: float,
    output_tokens: float,
    target: float | None,
    devices: int | None,
    parallel: str | None,
) -> None:
    if not machine.device.flops:
        raise UserError(
            f"what {machine.device.name} computes is not known (serving). measure it: minga plan --calibrate"
        )
    if devices is not None and not 1 <= devices <= machine.count:
        raise UserError(f"a copy over {devices} devices (serving). the machine has {machine.count}")
    if parallel not in (None, "tensor", "expert"):
        raise UserError(f"parallel {parallel!r} is not known (serving). known: tensor, expert")
    if target is not None and not 0 < target < math.inf:
        raise UserError(f"target is {target} tokens/s (serving). it is above 0")
    for name, value, known in (("weights", weights, PRODUCTS), ("cache", cache, CACHED)):
        if value not in known:
            raise UserError(f"{name} {value!r} is no number format (serving). known: {', '.join(known)}")
    if weights not in machine.device.flops and weights == "fp4":
        raise UserError(
            f"{machine.device.name} multiplies no fp4 (serving). take int4: four bits stored, bf16 multiplied"
        )
    if not 0 < utilization <= 1:
        raise UserError(f"utilization is {utilization} (serving). it is above 0 and at most 1")
    if not 0 <= cached_share < 1:
        raise UserError(f"cached_share is {cached_share} (serving). it is 0 or more and below 1")
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise UserError(f"acceptance is {acceptance} (serving). it is between 0 and 1")
    if acceptance is not None and not model.mtp:
        raise UserError("the model has no multi-token prediction module (serving). leave out acceptance")
    if not (prompt_tokens >= 1 and output_tokens >= 1 and math.isfinite(prompt_tokens + output_tokens)):
        raise UserError(f"{prompt_tokens} prompt and {output_tokens} output tokens (serving). each is 1 or more")


def _why(copies: list[_Copy], tokens: float, target: float | None, batch: int | None) -> str:
    """Why nothing serves."""
    if not copies:
        return "the network between nodes is of unknown speed (serving). take no more devices than a node has"
    best = max(copies, key=lambda copy: (copy.sequences(tokens), copy.devices))
    fits = best.sequences(tokens)
    have = size_words(best.machine.device.memory)
    if not fits:
        return (
            f"one sequence does not fit (serving): {size_words(best.held)} of weights on each of {best.devices} devices "
            f"of {have}, and {size_words(best.cache(tokens, mtp=best.guesses))} of cache. more devices, or weights of fewer bits"
        )
    if batch is not None and batch > fits:
        return f"{batch} sequences do not fit, {fits} do (serving). a smaller batch, or a cache of fewer bits"
    return f"no batch gives {target:g} tokens/s to a user (serving). lower the target, or take faster memory"
