"""One dial: from an amount of time (or tokens, or a size) to every number of a training run, each with its reason.

`choose` is a pure function of the budget, of how fast this machine ran two small models, and of the corpus. Laws from
public scaling studies give the exponents; where they were fitted a thousand times above what one machine trains, our own
measurements (docs/log.md) give the constant, and the source says so. The order of the decisions:

    time -> operations -> width (tokens seen per parameter) -> depth, heads, latents, experts -> batch -> context -> rates

The matrix products of a step are counted exactly (`counts`), Muon's among them: at small batches they are a third of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from minga.config.model import ModelConfig
from minga.config.presets import laptop
from minga.config.train import TrainConfig
from minga.errors import UserError
from minga.planner.counts import count_parameters, forward_flops, matmul_parameters, muon_flops
from minga.planner.memory import GREEN, RULE_SOURCE
from minga.planner.own_memory import own_training_memory
from minga.planner.words import count, duration, size

DEFAULTS = TrainConfig(steps=1)
WIDTHS = range(64, 2049, 64)
PRESET_WIDTH = 192  # of `laptop`, for which learning rates and batch were measured
TOKENS_PER_PARAMETER = 20.0  # at our scale too fewer is worse: widths 192, 128, 64 in equal CPU time, docs/log.md
BATCH_TOKENS, BATCH_HORIZON, BATCH_EXPONENT = 2048, 5e5, 0.383
MICRO_TOKENS = 8192  # a micro-batch above gains no speed on a CPU and costs memory
FREE_EPOCHS = 4
EVALUATIONS, EVALUATION_SHARE = 10, 0.02
LOST_SECONDS = 300
WIDEST_RATIO = math.sqrt(2)  # how far from the asked size the nearest width may lie before it is said

CHINCHILLA = "Hoffmann et al. 2022 (2203.15556), replicated by Besiroglu et al. 2024 (2404.10102)"
POWER_LINES = "exponent: Bergsma et al. 2025 (2505.13738); constant: measured, docs/log.md"
LAPTOP_SMALL = "the measured presets laptop and small"


@dataclass(frozen=True)
class Budget:
    """What the user gave: `seconds` of training or `tokens` to read, and maybe a size or a whole architecture."""

    seconds: float | None = None
    tokens: int | None = None
    size: int | None = None  # parameters active for a token, embedding and head included
    model: ModelConfig | None = None


@dataclass(frozen=True)
class MachineSpeed:
    """`probes`: (model width, FLOP/s of whole optimizer steps at that width), narrowest first. `memory`: free bytes.

    `precision`: what the products of the probes were computed in, the fastest that this machine has.
    """

    probes: tuple[tuple[int, float], ...]
    memory: int | None = None
    precision: str = "float32"

    def at(self, width: int) -> float:
        """FLOP/s at a width: a straight line in logarithms between two probes, their own value outside."""
        (w0, r0), (w1, r1) = self.probes[0], self.probes[-1]
        if width <= w0 or w0 == w1:
            return r0
        share = min(1.0, math.log(width / w0) / math.log(w1 / w0))
        return float(r0 * (r1 / r0) ** share)


@dataclass(frozen=True)
class Corpus:
    """The training split."""

    tokens: int
    vocab_size: int
    tokens_per_document: float


@dataclass(frozen=True)
class Choice:
    """One decided number. `name` is a field of `TrainConfig`, `model.` and one of `ModelConfig`, or a fact in words."""

    name: str
    value: Any
    formula: str
    source: str


@dataclass(frozen=True)
class Decisions:
    """What the command line hands to a run: the decisions, what they were made from, and the seconds that took."""

    asked: dict[str, Any]
    choices: tuple[Choice, ...]
    seconds: float = 0.0

    def values(self, prefix: str = "") -> dict[str, Any]:
        """The settings among the choices: of the run, or with prefix "model." of the model."""
        names = {f"{prefix}{f.name}" for f in fields(ModelConfig if prefix else TrainConfig)}
        return {choice.name.removeprefix(prefix): choice.value for choice in self.choices if choice.name in names}


def choose(budget: Budget, speed: MachineSpeed, corpus: Corpus) -> list[Choice]:
    """Every number of a run. Raises `UserError` for a budget that makes none."""
    check_budget(budget)
    _check_size(budget, corpus)
    run = _best(budget, speed, corpus)
    wanted, free = run, speed.memory
    while free is not None and run.memory > GREEN * free:
        smaller = run.smaller()
        if smaller is None:
            raise UserError(
                f"the smallest run needs {size(run.memory)} and {size(free)} of memory are free (train). "
                "close other programs, or take a smaller --preset"
            )
        run = smaller
    return list(_explain(run, wanted, speed))


@dataclass(frozen=True)
class _Run:
    """One candidate: an architecture with the horizon, batch and context that follow from it."""

    model: ModelConfig
    budget: Budget
    speed: MachineSpeed
    corpus: Corpus
    micro_tokens: int = MICRO_TOKENS

    @cached_property
    def tokens(self) -> float:
        """Tokens read in the whole run. The batch follows from them, and with time given they from the batch."""
        if self.budget.tokens is not None:
            return self.budget.tokens
        tokens, seconds = 1e6, self.budget.seconds or 0.0
        for _ in range(12):  # a contraction: the batch grows with a small power of the tokens
            batch = _batch_tokens(tokens, self.corpus)
            tokens = seconds / self.step_seconds(batch, _context(batch, self.corpus)) * batch
        return tokens

    def step_seconds(self, batch: float, context: int) -> float:
        return self.step_flops(batch, context) / self.speed.at(self.model.hidden_size)

    def step_flops(self, batch: float, context: int) -> float:
        """Forward and backward (three times the forward) and the optimizer; MTP for the share of the run it trains in."""
        half, mtp = (context + 1) // 2, (1 - DEFAULTS.mtp_from) if self.model.num_nextn_predict_layers else 0.0
        each = [
            3 * batch * forward_flops(self.model, half, mtp=on) + muon_flops(self.model, mtp=on) for on in (False, True)
        ]
        return (1 - mtp) * each[0] + mtp * each[1]

    @property
    def seq_len(self) -> int:
        return min(_context(_batch_tokens(self.tokens, self.corpus), self.corpus), self.model.max_position_embeddings)

    @property
    def batch(self) -> tuple[int, int]:
        """(sequences a micro-batch, micro-batches a step)."""
        sequences = max(1, round(_batch_tokens(self.tokens, self.corpus) / self.seq_len))
        accumulate = -(-sequences // max(1, self.micro_tokens // self.seq_len))
        return max(1, round(sequences / accumulate)), accumulate

    @property
    def step_tokens(self) -> int:
        return math.prod(self.batch) * self.seq_len

    @property
    def memory(self) -> float:
        """Bytes beyond those of the process, which are there already (minga/planner/own_memory.py)."""
        batch_size, accumulate = self.batch
        sizes: dict[str, Any] = {"batch_size": batch_size, "accumulate": accumulate, "seq_len": self.seq_len}
        needed = own_training_memory(TrainConfig(steps=1, model=self.model, precision=self.speed.precision, **sizes))
        return needed.total - needed.runtime

    def smaller(self) -> _Run | None:
        """The same run in less memory: half the micro-batch down to one sequence, then the next narrower model."""
        if self.batch[0] > 1:
            return _Run(self.model, self.budget, self.speed, self.corpus, self.batch[0] // 2 * self.seq_len)
        width = self.model.hidden_size - 64
        if self.budget.model is not None or width < WIDTHS[0]:
            return None
        return _Run(
            architecture(width, self.corpus.vocab_size), self.budget, self.speed, self.corpus, self.micro_tokens
        )


def architecture(width: int, vocab_size: int) -> ModelConfig:
    """Everything of a model that follows from its width, a multiple of 64. At 192 it is `laptop`."""
    wide = width >= 512
    return laptop().replace(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=width // 64 + 1,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        qk_nope_head_dim=64 if wide else 32,
        q_lora_rank=_round64(width / 2) if wide else None,
        kv_lora_rank=_round64(width / 3),
        intermediate_size=_round64(width * 8 / 3),
        n_routed_experts=32 if wide else 8,
        num_experts_per_tok=4 if wide else 2,
        moe_intermediate_size=_round64(width / 2) if wide else width,
    )


def _best(budget: Budget, speed: MachineSpeed, corpus: Corpus) -> _Run:
    if budget.model is not None:
        return _Run(budget.model.replace(vocab_size=corpus.vocab_size), budget, speed, corpus)
    runs = [_Run(architecture(width, corpus.vocab_size), budget, speed, corpus) for width in WIDTHS]
    if budget.size is not None:
        deeper = [
            _Run(run.model.replace(num_hidden_layers=layers), budget, speed, corpus)
            for run in runs
            for layers in range(run.model.num_hidden_layers, round(1.5 * run.model.num_hidden_layers) + 1)
        ]
        return min(deeper, key=lambda run: abs(math.log(count_parameters(run.model).active / (budget.size or 1))))
    return min(runs, key=lambda run: abs(math.log(run.tokens / matmul_parameters(run.model) / TOKENS_PER_PARAMETER)))


def usual_batch(tokens: float) -> float:
    """Tokens of a step of a run over so many."""
    return BATCH_TOKENS * (tokens / BATCH_HORIZON) ** BATCH_EXPONENT


def _batch_tokens(tokens: float, corpus: Corpus) -> float:
    return max(128.0, min(usual_batch(tokens), corpus.tokens / 8, tokens))


def _context(batch: float, corpus: Corpus) -> int:
    longest = max(128.0, min(batch / 8, corpus.tokens_per_document, 1024))
    return int(2 ** math.floor(math.log2(min(longest, max(16.0, corpus.tokens / 16)))))


# ---------------------------------------------------------------------------------------------- the reasons


def _explain(run: _Run, wanted: _Run, speed: MachineSpeed) -> Iterator[Choice]:
    budget, corpus, c = run.budget, run.corpus, run.model
    counts, rate = count_parameters(c), speed.at(c.hidden_size)
    measured = "measured: " + ", ".join(f"{value / 1e9:.3g} GFLOP/s at width {width}" for width, value in speed.probes)
    steps = max(1, round(run.tokens / run.step_tokens))
    tokens, matmul = steps * run.step_tokens, matmul_parameters(run.model)
    seconds = steps * run.step_seconds(run.step_tokens, run.seq_len)
    yield Choice("speed", f"{rate / 1e9:.3g} GFLOP/s", f"whole steps, at width {c.hidden_size}", measured)
    ratio = f"{tokens / matmul:.3g} tokens a multiplied parameter, of {count(matmul)}"
    if run.model is not wanted.model:
        ratio = f"width {wanted.model.hidden_size} needs {size(wanted.memory)}, too much: the widest that fits"
        why = f"{size(speed.memory or 0)} of memory are free"
    elif budget.model is not None:
        why = "given (--preset)"
    elif budget.size is not None:
        ratio, why = f"width and depth whose active parameters come nearest to {count(budget.size)}", "given (--size)"
    else:
        ratio += f"; {TOKENS_PER_PARAMETER:g} is best for its compute"
        why = CHINCHILLA
    yield Choice(
        "active parameters",
        count(counts.active),
        f"of {count(counts.total)}, and {count(counts.mtp)} of MTP",
        "exact count",
    )
    if budget.model is not None:
        yield Choice("model.hidden_size", c.hidden_size, ratio, why)
    else:
        yield from _explain_model(c, ratio, why)
    batch, accumulate = run.batch
    formula = f"{BATCH_TOKENS} (tokens / {BATCH_HORIZON:g})^{BATCH_EXPONENT}"
    formula += f" = {_batch_tokens(run.tokens, corpus):,.0f} tokens a step, in sequences"
    yield Choice(
        "seq_len", run.seq_len, "2^n up to an eighth of the batch, a document's mean, 1024", "measured, docs/log.md"
    )
    yield Choice("batch_size", batch, formula, POWER_LINES)
    fits = f"micro-batches of at most {run.micro_tokens} tokens"
    if run.micro_tokens < MICRO_TOKENS:
        fits += " (more does not fit in memory)"
    yield Choice("accumulate", accumulate, fits, "what is multiplied at once fits in the caches")
    why = "the compiled kernels are there" if speed.precision == "int8" else "there are no compiled kernels here"
    loss = "int8 trains to the same loss (-0.18 % in 2,000 steps), docs/log.md"
    yield Choice("precision", speed.precision, f"of matrix products: {why}", loss)
    shape = "independent of width: an update is orthogonal, times sqrt(rows / columns)"
    yield Choice("lr_matrix", DEFAULTS.lr_matrix, shape, "Jordan et al. 2024; 0.006 to 0.04 tried, docs/log.md")
    for name in ("lr_embedding", "lr_other"):
        value = getattr(DEFAULTS, name) * (PRESET_WIDTH / c.hidden_size) ** 0.5
        formula = f"{getattr(DEFAULTS, name)} ({PRESET_WIDTH} / width)^0.5"
        yield Choice(name, float(f"{value:.3g}"), formula, "exponent: nanochat; constant: measured, docs/log.md")
    yield Choice("eval_every", max(1, steps // EVALUATIONS), f"{EVALUATIONS} evaluations", "a curve to look at")
    held = max(1024, min(DEFAULTS.eval_tokens, int(EVALUATION_SHARE * 3 * tokens / EVALUATIONS)))
    formula = f"{EVALUATION_SHARE:.0%} of the time: a token costs a third of what it does in training"
    yield Choice("eval_tokens", held, formula, "count of operations")
    saved = max(1, round(LOST_SECONDS * steps / seconds))
    yield Choice("checkpoint_every", saved, f"no more than {LOST_SECONDS / 60:g} minutes are ever lost", measured)
    if budget.tokens is not None:
        yield Choice("steps", steps, f"{count(tokens)} tokens / {run.step_tokens:,} a step", "given (--tokens)")
    else:
        yield Choice("steps expected", steps, "timed again with this model before the first step", measured)
    yield Choice("time", duration(seconds), f"{steps} x {seconds / steps:.3g} s of training", measured)
    epochs = tokens / corpus.tokens
    said = (
        "each token about once"
        if epochs <= 1.05
        else f"repeating up to {FREE_EPOCHS} times is nearly as good as new text"
    )
    if epochs > FREE_EPOCHS:
        said = f"beyond {FREE_EPOCHS} epochs repeated text teaches less and less: more text would help"
    yield Choice(
        "epochs",
        round(epochs, 2),
        f"{count(tokens)} of {count(corpus.tokens)} tokens; {said}",
        "Muennighoff et al. 2023 (2305.16264)",
    )
    memory = "weights, gradients, moments, one micro-batch and what lies between them, estimated"
    share = "" if speed.memory is None else f"; at most {GREEN:.0%} of {size(speed.memory)} free"
    yield Choice("memory", size(run.memory), memory + share, RULE_SOURCE)


def _explain_model(c: ModelConfig, ratio: str, why: str) -> Iterator[Choice]:
    wide = c.hidden_size >= 512
    chosen = {
        "hidden_size": (ratio, why),
        "num_hidden_layers": (
            "width / 64, and a dense first one; for --size up to half more",
            "nanochat's ratio; Kaplan et al. 2020 (2001.08361): shape matters little",
        ),
        "num_attention_heads": ("width / 64", LAPTOP_SMALL),
        "num_key_value_heads": ("as many: they share one latent", "DeepSeek-V2 (2405.04434), section 2.1"),
        "qk_nope_head_dim": ("64 from width 512 on, 32 below", LAPTOP_SMALL),
        "q_lora_rank": ("width / 2 from width 512 on, none below", LAPTOP_SMALL),
        "kv_lora_rank": ("width / 3, in steps of 64", LAPTOP_SMALL),
        "intermediate_size": (
            "8/3 width, in steps of 64",
            "SwiGLU with the parameters of 4 width (Shazeer 2020, 2002.05202)",
        ),
        "n_routed_experts": (
            "32 from width 512 on, 8 below: with more of them each product has fewer tokens",
            LAPTOP_SMALL,
        ),
        "num_experts_per_tok": (
            "an eighth of 32, a quarter of 8",
            "Tian et al. 2025 (2507.17702) would choose fewer; kept high for small batches",
        ),
        "n_shared_experts": ("one", "DeepSeek-V3 (2412.19437), section 4.2"),
        "moe_intermediate_size": (
            "width / 2 with four experts, width with two: active as wide as a dense layer",
            LAPTOP_SMALL,
        ),
        "num_nextn_predict_layers": (
            f"one, trained from {DEFAULTS.mtp_from:.0%} of the run on",
            "DeepSeek-V3, section 2.2; share: measured, docs/log.md",
        ),
    }
    for name, (formula, source) in chosen.items():
        if name != "q_lora_rank" or wide:
            yield Choice(f"model.{name}", getattr(c, name), formula, source)


def check_budget(budget: Budget) -> None:
    """Raises `UserError` for what is no amount of time, tokens or parameters."""
    if budget.seconds is not None and not (math.isfinite(budget.seconds) and budget.seconds > 0):
        raise UserError("there is no time to train in (--hours). give more than the calibration takes, such as 0.1")
    for name, value in (("tokens", budget.tokens), ("size", budget.size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value} (--{name}). it must be a positive number, such as 10m")
    if (budget.seconds is None) == (budget.tokens is None):
        raise UserError("give either time or tokens (train): --hours H or --tokens N")


def _check_size(budget: Budget, corpus: Corpus) -> None:
    smallest = count_parameters(architecture(WIDTHS[0], corpus.vocab_size)).active
    largest = count_parameters(architecture(WIDTHS[-1], corpus.vocab_size)).active
    if budget.size is not None and not smallest / WIDEST_RATIO <= budget.size <= largest * WIDEST_RATIO:
        raise UserError(
            f"no model of ours has about {count(budget.size)} active parameters with {corpus.vocab_size} tokens of "
            f"vocabulary (--size). give {count(smallest)} to {count(largest)}, or pin a --preset"
        )


def _round64(value: float) -> int:
    return max(64, round(value / 64) * 64)
