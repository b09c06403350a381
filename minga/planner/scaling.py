"""Which model, for how much: scaling laws with source and doubt, and the searches that use them.

    best_for_compute(1e20)                       # parameters, tokens, loss of the best run of so many operations
    for_loss(2.5)                                # operations that a loss takes
    best_within(seconds_of=..., limit_seconds=3600 * 24, memory_of=..., limit_bytes=8e9)

A law was fitted to the losses of one text under one tokenizer: its loss says which of two plans is better, not what another
text will show. Inside the runs that it was fitted to we give it the doubt by which two fits of the same runs differ; outside,
more with each factor of distance, and every fact says how far outside it is. Compute C is 6 N D operations, as laws count it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

from minga.config.model import ModelConfig
from minga.config.presets import laptop
from minga.errors import UserError
from minga.planner.counts import count_parameters
from minga.planner.dial import WIDTHS, architecture
from minga.planner.estimate import Estimate, Fact
from minga.planner.words import count, size

# Of the loss above its floor: two fits of the same runs (CHINCHILLA, EPOCH) differ by 9 % at most within them, at 20 tokens a
# parameter. A test holds it to that.
DOUBT = 0.10
# Standard errors of EPOCH's exponents and of its floor: 0.02 and 0.03 (2404.10102, table 1); 1.645 of them each way hold nine
# cases of ten. Other laws print none and are given the same.
EXPONENT_DOUBT, FLOOR_DOUBT = 1.645 * 0.02, 1.645 * 0.03
# A text read D / U times teaches as much as U (1 + R (1 - exp(-(D / U - 1) / R))) fresh tokens: Muennighoff et al. 2023
# (2305.16264), equation 5 and appendix A
REPETITION = 15.387756
PETAFLOP_DAY = 1e15 * 86400
MOST_FLOPS = 1e32
SEARCH_STEPS = 64


@dataclass(frozen=True)
class Law:
    """What a study found: its coefficients by their names in `form`, the runs they were fitted to, and of what text.

    runs: by "parameters", "tokens" or "flops", the smallest and largest that were fitted.
    """

    name: str
    form: str
    coefficients: Mapping[str, float]
    runs: Mapping[str, tuple[float, float]]
    text: str
    source: str
    doubt: float = DOUBT

    def beyond(self, **point: float) -> float:
        """By what factor a point lies outside the fitted runs, all its numbers together; 1 inside."""
        return math.prod(self._distance(name, value)[0] for name, value in point.items() if name in self.runs)

    def cite(self, **point: float) -> str:
        """The source, of what text its loss is, and how far outside the fitted runs this point lies."""
        said = [f"{self.source}; loss of {self.text}" if self.text else self.source]
        for name, value in point.items():
            factor, side = self._distance(name, value) if name in self.runs else (1.0, "")
            if factor > 1.01:
                said.append(f"extrapolated: {name} {factor:.3g} times {side} that was fitted")
        return "; ".join(said)

    def _distance(self, name: str, value: float) -> tuple[float, str]:
        low, high = self.runs[name]
        return (value / high, "the largest") if value > high else (max(1.0, low / value), "less than the smallest")


@dataclass(frozen=True)
class Surface(Law):
    """Loss as E + A / N^alpha + B / D^beta of N active parameters and D tokens.

    With "a" to "zeta" among the coefficients A, alpha, B and beta follow from the number of experts (`terms`).
    """

    def terms(self, experts: float = 1.0) -> tuple[float, float, float, float, float]:
        """E, A, alpha, B, beta. experts: how many times the experts that a token passes the layer has (`expansion`)."""
        c = self.coefficients
        if "zeta" not in c:
            return c["E"], c["A"], c["alpha"], c["B"], c["beta"]
        start = 1 / (1 / c["E_start"] - 1 / c["E_max"])
        seen = 1 / (1 / (experts - 1 + start) + 1 / c["E_max"])  # 2502.05172, equation 5
        log = math.log(seen)
        A, B = c["a"] * seen ** c["delta"], c["b"] * seen ** c["omega"]
        return c["c"], A, -c["alpha"] - c["gamma"] * log, B, -c["beta"] - c["zeta"] * log

    def loss(self, parameters: float, tokens: float, *, experts: float = 1.0, unique: float | None = None) -> Estimate:
        """unique: tokens of the text where it is read more than once."""
        E, A, alpha, B, beta = self.terms(experts)
        of_size, of_text = A / parameters**alpha, B / effective_tokens(tokens, unique) ** beta
        outside = self.beyond(parameters=parameters, tokens=tokens)
        floor = FLOOR_DOUBT * (1 - 1 / outside)  # a wrong floor is made up for by the other terms, within the runs only
        more = (1 + self.doubt) * outside**EXPONENT_DOUBT
        above = of_size + of_text
        return Estimate(max(0.0, E - floor) + above / more, E + above, E + floor + above * more)

    def tokens_for(self, loss: float, parameters: float, *, experts: float = 1.0, unique: float | None = None) -> float:
        """Tokens after which a model of that size reaches the loss; infinite where it never does."""
        E, A, alpha, B, beta = self.terms(experts)
        left = loss - E - A / parameters**alpha
        return math.inf if left <= 0 else tokens_read((B / left) ** (1 / beta), unique)

    def best_tokens(self, parameters: float, *, experts: float = 1.0) -> float:
        """Tokens for which a model of that size is the best of its compute: where both terms fall equally fast."""
        _, A, alpha, B, beta = self.terms(experts)
        return float((beta * B * parameters**alpha / (alpha * A)) ** (1 / beta))


@dataclass(frozen=True)
class Powers(Law):
    """Each number of the best run as a power of its compute: `coefficients` has NAME and NAME_exponent."""

    def at(self, name: str, flops: float) -> float:
        return float(self.coefficients[name] * flops ** self.coefficients[f"{name}_exponent"])

    def loss(self, flops: float) -> Estimate | None:
        """None where the study prints no law of it."""
        if "loss" not in self.coefficients:
            return None
        typical = self.at("loss", flops / PETAFLOP_DAY)
        more = (1 + self.doubt) ** 0.5 * self.beyond(flops=flops) ** (
            EXPONENT_DOUBT / 2
        )  # no floor: all of it is above
        return Estimate(typical / more, typical, typical * more)


_SURFACE = "E + A / N^alpha + B / D^beta"
_CHINCHILLA_TEXT = "MassiveText (English), a SentencePiece vocabulary of 32,000"
_CHINCHILLA_RUNS = {"parameters": (5.7e7, 1.6e10), "tokens": (5e9, 5e11)}
CHINCHILLA = Surface(
    "chinchilla",
    _SURFACE,
    {"E": 1.6934, "A": 406.4, "alpha": 0.3392, "B": 410.7, "beta": 0.2849},
    _CHINCHILLA_RUNS,
    _CHINCHILLA_TEXT,
    "Hoffmann et al. 2022 (2203.15556), approach 3, with the digits of its TeX source",
)
EPOCH = Surface(
    "epoch",
    _SURFACE,
    {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658},
    _CHINCHILLA_RUNS,
    _CHINCHILLA_TEXT,
    "Besiroglu et al. 2024 (2404.10102), table 1: Chinchilla's runs fitted again",
)
MUENNIGHOFF = Surface(
    "muennighoff",
    _SURFACE,
    {
        "E": math.exp(0.6254804),
        "A": math.exp(6.255414),
        "alpha": 0.3526596,
        "B": math.exp(7.3049974),
        "beta": 0.3526596,
    },
    {"parameters": (7e6, 8.7e9), "tokens": (1e8, 9e11)},
    "C4 (English), GPT-2's tokenizer",
    "Muennighoff et al. 2023 (2305.16264), appendix A",
)
# The signs are those with which its table 4 (each number of experts on its own) follows from its table 3.
JOINT = Surface(
    "joint",
    "c + a Ê^delta N^(alpha + gamma ln Ê) + b Ê^omega D^(beta + zeta ln Ê)",
    {
        "a": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098, "b": 35.98, "beta": -0.1775, "omega": 0.5529,
        "zeta": -0.0259, "E_start": 2.0732, "E_max": 290.4521, "c": 1.3637,
    },
    {"parameters": (7.9e7, 2.7e9), "tokens": (5e8, 8e10)},
    "FineWeb-Edu (English), GPT-2's tokenizer",
    "Ludziejewski et al. 2025 (2502.05172), equation 6 and table 3: 1 to 32 experts, one of them chosen",
)  # fmt: skip
DEEPSEEK = Powers(
    "deepseek",
    "model_flops = 0.1715 C^0.5243 (of a token, forward and backward), tokens = 5.8316 C^0.4757",
    {
        "model_flops": 0.1715, "model_flops_exponent": 0.5243, "tokens": 5.8316, "tokens_exponent": 0.4757,
        "learning_rate": 0.3118, "learning_rate_exponent": -0.1250, "batch_tokens": 0.2920, "batch_tokens_exponent": 0.3271,
    },
    {"flops": (1e17, 3e20)},
    "",
    "DeepSeek-AI 2024 (2401.02954), equations 1 and 4, of dense models; the rate and the batch up to 2e19 operations",
)  # fmt: skip
_MOONLIGHT = {
    "parameters": 0.0483359, "parameters_exponent": 0.5112684, "tokens": 3.4480927, "tokens_exponent": 0.4887316,
    "learning_rate": 0.0127339, "learning_rate_exponent": -0.0574752, "batch_tokens": 0.0065202,
    "batch_tokens_exponent": 0.4137915,
}  # fmt: skip
_MOONLIGHT_RUNS = {"flops": (6 * 399e6 * 8.92e9, 6 * 1.5e9 * 38.91e9)}
_MOONLIGHT_DOUBT = 0.3 * DOUBT  # its laws have no floor; three tenths of the loss lie above EPOCH's at their compute
_MOONLIGHT_TEXT = "Moonshot's own, unpublished text at 8,192 tokens of context"
_MOONLIGHT_SOURCE = "Liu et al. 2025 (2502.16982), tables 3 and 9, of dense models without their embedding"
MUON = Powers(
    "muon",
    "loss = 2.506 (C / PFLOP/s-day)^-0.052, N = 0.0483359 C^0.5112684, D = 3.4480927 C^0.4887316",
    {**_MOONLIGHT, "loss": 2.506, "loss_exponent": -0.052},
    _MOONLIGHT_RUNS,
    _MOONLIGHT_TEXT,
    _MOONLIGHT_SOURCE,
    _MOONLIGHT_DOUBT,
)
ADAMW = Powers(
    "adamw",
    "loss = 2.608 (C / PFLOP/s-day)^-0.054, N = 0.0483359 C^0.5112684, D = 3.4480927 C^0.4887316",
    {**_MOONLIGHT, "loss": 2.608, "loss_exponent": -0.054},
    _MOONLIGHT_RUNS,
    _MOONLIGHT_TEXT,
    _MOONLIGHT_SOURCE,
    _MOONLIGHT_DOUBT,
)
LAWS: Mapping[str, Surface | Powers] = {
    law.name: law for law in (CHINCHILLA, EPOCH, MUENNIGHOFF, JOINT, DEEPSEEK, MUON, ADAMW)
}


def law_for(experts: float) -> Surface:
    """The one that counts experts where there are any, else the one whose errors are published."""
    return JOINT if experts > 1 else EPOCH


def expansion(model: ModelConfig) -> float:
    """Experts of a layer for each that a token passes, shared ones among both: 257 / 9 for V3, 1 without experts."""
    if not model.n_routed_experts:
        return 1.0
    return (model.n_routed_experts + model.n_shared_experts) / (model.num_experts_per_tok + model.n_shared_experts)


def effective_tokens(tokens: float, unique: float | None) -> float:
    """How many fresh tokens teach as much as `tokens` of a text that has `unique` ones."""
    if unique is None or tokens <= unique:
        return tokens
    return unique * (1 + REPETITION * (1 - math.exp(-(tokens / unique - 1) / REPETITION)))


def tokens_read(effective: float, unique: float | None) -> float:
    """The other way round; infinite where no repetition teaches so much."""
    if unique is None or effective <= unique:
        return effective
    left = 1 - (effective / unique - 1) / REPETITION
    return math.inf if left <= 0 else unique * (1 - REPETITION * math.log(left))


# ---------------------------------------------------------------------------------------------- a run's size


_LABELS = {
    "parameters": "active parameters",
    "tokens": "tokens",
    "epochs": "times the text is read",
    "loss": "loss on the text of its law",
    "flops": "operations of training",
    "learning_rate": "learning rate",
    "batch_tokens": "batch",
}


class Optimum(NamedTuple):
    """A run: `parameters` are those active for a token, `loss` is None where its law has none."""

    parameters: float
    tokens: float
    loss: Estimate | None
    facts: tuple[Fact, ...]


class Needed(NamedTuple):
    """What a loss takes. `flops.high` is infinite where the law's floor may well lie above that loss."""

    parameters: float
    tokens: float
    flops: Estimate
    facts: tuple[Fact, ...]


def best_for_compute(
    flops: float,
    *,
    law: Surface | Powers | None = None,
    experts: float = 1.0,
    tokens_per_parameter: float | None = None,
    unique: float | None = None,
) -> Optimum:
    """The split of a compute into size and tokens that ends lowest.

    tokens_per_parameter: this ratio instead, above the best one for a model that is cheaper to serve. unique: tokens that
    there are, read again where more are wanted.
    """
    for name, value in (("compute", flops), ("tokens per parameter", tokens_per_parameter), ("unique tokens", unique)):
        _check(name, value)
    law = law or law_for(experts)
    if isinstance(law, Powers):
        return _best_by_powers(flops, law)
    N, D = _split(flops, law, experts, tokens_per_parameter, unique)
    loss = law.loss(N, D, experts=experts, unique=unique)
    return Optimum(N, D, loss, (*_sizes(law, N, D, unique), _loss_fact(law, loss, N, D)))


def for_loss(
    loss: float,
    *,
    law: Surface | None = None,
    experts: float = 1.0,
    tokens_per_parameter: float | None = None,
    unique: float | None = None,
    served: float = 0.0,
) -> Needed:
    """The least compute with which a law ends at `loss`.

    served: tokens that the model will write and read in its life. Then it is the least of training and serving together,
    6 N D + 2 N served: smaller and longer trained (Sardana et al. 2024, 2401.00448). `flops` is of the training alone.
    """
    _check("tokens per parameter", tokens_per_parameter)
    _check("unique tokens", unique)
    _check("tokens served", served or None)
    law = law or law_for(experts)
    floor = law.terms(experts)[0]
    if not floor < loss < math.inf:
        raise UserError(f"loss {loss:g} is out of reach (--loss). by {law.source} it lies above {floor:.3g}, in nats")
    if loss >= 20:
        raise UserError(
            f"a loss of {loss:g} needs no training (--loss). it is in nats a token: give one above {floor:.3g}"
        )
    if served and tokens_per_parameter:
        raise UserError("tokens per parameter follow from what is served (plan). give one of the two")

    def split(flops: float) -> tuple[float, float]:
        return _split(flops, law, experts, tokens_per_parameter, unique)

    def reached(bound: Callable[[Estimate], float]) -> float:
        """The least compute whose loss, or that end of its range, is no more than what is asked."""
        return _first(lambda flops: bound(law.loss(*split(flops), experts=experts, unique=unique)) <= loss)

    typical = reached(lambda estimate: estimate.typical)
    if math.isinf(typical):
        raise UserError(f"loss {loss:g} is out of reach with {unique:.3g} tokens of text (--loss). get more text")
    low, high = reached(lambda estimate: estimate.low), reached(lambda estimate: estimate.high)
    N, D = split(typical)
    if served:
        N, D = _for_service(loss, law, experts, unique, served, N)
        low, typical, high = low * 6 * N * D / typical, 6 * N * D, high * 6 * N * D / typical
    flops = Estimate(min(low, typical), typical, max(high, typical))
    formula = f"6 N D with which {law.form} is {loss:g}" + (
        f", least with {served:.3g} tokens served" if served else ""
    )
    cited = law.cite(parameters=N, tokens=D)
    needed = Fact("scaling.flops", flops, "FLOP", _LABELS["flops"], formula, {"loss": loss}, cited)
    return Needed(N, D, flops, (*_sizes(law, N, D, unique), needed))


def _split(
    flops: float, law: Surface, experts: float, tokens_per_parameter: float | None, unique: float | None
) -> tuple[float, float]:
    """Parameters and tokens, 6 N D = flops."""
    if tokens_per_parameter is not None:
        N = math.sqrt(flops / 6 / tokens_per_parameter)
        return N, tokens_per_parameter * N
    _, A, alpha, B, beta = law.terms(experts)
    scale = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    N = scale * (flops / 6) ** (beta / (alpha + beta))  # Hoffmann et al. 2022, equation 4
    if unique is not None and flops / 6 / N > unique:  # then more of it into size: repeated tokens teach less
        N = _lowest(lambda n: law.loss(n, flops / 6 / n, experts=experts, unique=unique).typical, N, flops / 6 / unique)
    return N, flops / 6 / N


def _best_by_powers(flops: float, law: Powers) -> Optimum:
    D = law.at("tokens", flops)
    N = law.at("parameters", flops) if "parameters" in law.coefficients else law.at("model_flops", flops) / 6
    loss, given, cited = law.loss(flops), {"flops": flops}, law.cite(flops=flops)
    found: list[tuple[str, float | Estimate, str]] = [("parameters", N, ""), ("tokens", D, "")]
    found += [(name, law.at(name, flops), unit) for name, unit in (("learning_rate", ""), ("batch_tokens", "tokens"))]
    found += [] if loss is None else [("loss", loss, "nats")]
    facts = [Fact(f"scaling.{name}", value, unit, _LABELS[name], law.form, given, cited) for name, value, unit in found]
    return Optimum(N, D, loss, tuple(facts))


def _for_service(
    loss: float, law: Surface, experts: float, unique: float | None, served: float, best: float
) -> tuple[float, float]:
    def operations(N: float) -> float:
        return N * (6 * law.tokens_for(loss, N, experts=experts, unique=unique) + 2 * served)

    E, A, alpha, _, _ = law.terms(experts)
    smallest = (A / (loss - E)) ** (1 / alpha)  # no text brings a smaller model there
    N = _lowest(operations, smallest, best)
    return N, law.tokens_for(loss, N, experts=experts, unique=unique)


def _sizes(law: Surface, N: float, D: float, unique: float | None) -> Iterator[Fact]:
    def fact(name: str, value: float, formula: str, source: str = law.cite(parameters=N, tokens=D)) -> Fact:
        return Fact(f"scaling.{name}", value, "", _LABELS[name], formula, {"parameters": N, "tokens": D}, source)

    yield fact("parameters", N, f"active for a token; loss is {law.form}")
    yield fact("tokens", D, f"{D / N:.3g} a parameter")
    if unique is not None and unique < D:
        worth = f"{unique:.3g} tokens read so often, worth {effective_tokens(D, unique):.3g} fresh ones"
        yield fact("epochs", D / unique, worth, "Muennighoff et al. 2023 (2305.16264), equation 5")


def _loss_fact(law: Surface, loss: Estimate, N: float, D: float) -> Fact:
    inputs, cited = {"parameters": N, "tokens": D}, law.cite(parameters=N, tokens=D)
    return Fact("scaling.loss", loss, "nats", _LABELS["loss"], law.form, inputs, cited)


def _lowest(of: Callable[[float], float], one: float, other: float) -> float:
    """Where a function with one valley is lowest between two positive numbers: golden section in logarithms."""
    low, high = sorted((math.log(one), math.log(other)))
    step = (math.sqrt(5) - 1) / 2
    for _ in range(SEARCH_STEPS):
        a, b = high - step * (high - low), low + step * (high - low)
        low, high = (low, b) if of(math.exp(a)) < of(math.exp(b)) else (a, high)  # to the right where both are infinite
    return math.exp((low + high) / 2)


def _first(holds: Callable[[float], bool]) -> float:
    """The least compute for which something holds, infinite where it never does: steps of 2, then halves of one."""
    flops = 1.0
    while not holds(flops):
        flops *= 2
        if flops > MOST_FLOPS:
            return math.inf
    low, high = math.log(flops / 2), math.log(flops)
    for _ in range(SEARCH_STEPS // 2):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(math.exp(middle)) else (middle, high)
    return math.exp(high)


# ---------------------------------------------------------------------------------------------- models of every size

FAMILIES = ("deepseek_v3", "llama", "qwen3")  # latent attention, with experts or without; grouped queries, dense
# From width 2048 on the numbers lie between those of published models, in the logarithm of the width: DeepSeek-V2-Lite and V2
# (2405.04434, section 3.1.2 and appendix B) and V3 (2412.19437, section 4.2). Moonlight-16B-A3B (2502.16982) is V2-Lite's
# shape. What all of them share is in `_published`.
_PUBLISHED = {
    "width": (2048, 5120, 7168),
    "num_hidden_layers": (27, 60, 61),
    "num_attention_heads": (16, 128, 128),
    "intermediate_size": (10944, 12288, 18432),
    "n_routed_experts": (64, 160, 256),
    "num_experts_per_tok": (6, 6, 8),
    "n_shared_experts": (2, 2, 1),
    "moe_intermediate_size": (1408, 1536, 2048),
    "first_k_dense_replace": (1, 1, 3),
}
# So that heads and experts divide among devices; counts of a few stay as they are.
_STEPS = {"num_attention_heads": 16, "intermediate_size": 64, "n_routed_experts": 32, "moe_intermediate_size": 128}


def model_for(
    parameters: float, *, experts: bool = True, vocab_size: int = 129280, family: str = "deepseek_v3"
) -> ModelConfig:
    """The model whose parameters active for a token, embedding and head among them, come nearest to a wanted number.

    Up to width 2048 it is `dial.architecture`, above it lies between DeepSeek's published models; families `llama` and
    `qwen3` have Llama 3's ratios. A model may be up to half deeper than that. Raises `UserError` for what none comes near.
    """
    _check("size", parameters)
    grid = models(experts=experts, vocab_size=vocab_size, family=family)
    smallest, largest = (count_parameters(model).active for model in (grid[0], grid[-1]))
    if not smallest / math.sqrt(2) <= parameters <= largest * math.sqrt(2):
        raise UserError(
            f"no model of ours has about {count(parameters)} active parameters with {vocab_size} tokens of vocabulary (plan). "
            f"they have {count(smallest)} to {count(largest)}"
        )

    def distance(model: ModelConfig) -> float:
        return abs(math.log(count_parameters(model).active / parameters))

    near = sorted(grid, key=distance)[:3]
    deeper = [
        model.replace(num_hidden_layers=layers)
        for model in near
        for layers in range(model.num_hidden_layers, round(1.5 * model.num_hidden_layers) + 1)
    ]
    return min(deeper, key=distance)


@lru_cache(maxsize=16)
def models(*, experts: bool = True, vocab_size: int = 129280, family: str = "deepseek_v3") -> tuple[ModelConfig, ...]:
    """One model of each size, by active parameters."""
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is not known (plan). known: {', '.join(FAMILIES)}")
    if experts and family != "deepseek_v3":
        raise UserError(f"models of family {family} have no experts (plan). take deepseek_v3, or leave experts out")
    if family == "deepseek_v3":
        grid = [architecture(width, vocab_size) for width in WIDTHS]
        grid += [_published(width, vocab_size) for width in range(2048, 7169, 256)]
        grid = grid if experts else [_without_experts(model) for model in grid]
    else:
        widths = (*range(64, 1024, 64), *range(1024, 4096, 128), *range(4096, 16385, 512))
        grid = [_grouped(width, vocab_size, family) for width in widths]
    return tuple(sorted(grid, key=lambda model: count_parameters(model).active))


def _published(width: int, vocab_size: int) -> ModelConfig:
    sizes = {name: _between(width, name) for name in _PUBLISHED if name != "width"}
    return laptop().replace(
        vocab_size=vocab_size,
        hidden_size=width,
        num_key_value_heads=sizes["num_attention_heads"],
        max_position_embeddings=4096,  # the context that all three were trained with
        # V2-Lite has no query latent; V2's is 0.3 of its width, and V3's as large
        q_lora_rank=None if width == 2048 else min(1536, round(0.3 * width / 64) * 64),
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        routed_scaling_factor=2.5,  # V3's
        **sizes,
    )


def _between(width: int, name: str) -> int:
    """A number of `_PUBLISHED` at a width, linear in the width's logarithm."""
    widths, values = _PUBLISHED["width"], _PUBLISHED[name]
    left = 0 if width < widths[1] else 1
    share = math.log(width / widths[left]) / math.log(widths[left + 1] / widths[left])
    value, step = values[left] + share * (values[left + 1] - values[left]), _STEPS.get(name, 1)
    return round(value / step) * step


def _without_experts(model: ModelConfig) -> ModelConfig:
    """With the MLP of 8/3 width that has the parameters of Vaswani's 4 width (Shazeer 2020, 2002.05202)."""
    return model.replace(
        n_routed_experts=0,
        n_shared_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        first_k_dense_replace=0,
        intermediate_size=max(64, round(model.hidden_size * 8 / 3 / 64) * 64),
    )


def _grouped(width: int, vocab_size: int, family: str) -> ModelConfig:
    """Llama 3's ratios (2407.21783, table 3: 8 B, 70 B, 405 B): an MLP of 3.5 widths, a layer for each 128 of width, heads of
    128, at least four of which share a key, 8 keys at most. Below width 4096 deeper: a layer for each 64 of width, up to 32.
    """
    head = 128 if width >= 1024 else 64
    heads = width // head
    keys = next(count for count in range(max(1, min(8, heads // 4)), 0, -1) if heads % count == 0)
    return ModelConfig(
        model_type=family,
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=round(3.5 * width / 64) * 64,
        num_hidden_layers=max(min(width // 64 + 1, 32), width // 128),
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head,
        rope_interleave=False,
    )


# ---------------------------------------------------------------------------------------------- within limits


@dataclass(frozen=True)
class Option:
    """A model and how much text it reads. `memory` in bytes and `seconds` are None where nobody asked for them."""

    model: ModelConfig
    parameters: int  # active for a token
    tokens: float
    loss: Estimate
    seconds: Estimate | None = None
    memory: float | None = None


class Within(NamedTuple):
    """`best` ends lowest. `options`: every size that fits, with the tokens that there is time for. `front`: those of them, and
    of each size stopped at its best number of tokens, than which none is both quicker and better, quickest first."""

    best: Option
    options: tuple[Option, ...]
    front: tuple[Option, ...]
    facts: tuple[Fact, ...]


def best_within(
    *,
    seconds_of: Callable[[ModelConfig, float], Estimate],
    limit_seconds: float,
    memory_of: Callable[[ModelConfig], float] | None = None,
    limit_bytes: float | None = None,
    law: Surface | None = None,
    candidates: Iterable[ModelConfig] | None = None,
    unique: float | None = None,
) -> Within:
    """The model that ends lowest of those that can be trained in so much time (typically) and memory.

    seconds_of: a training of so many tokens, longer with more of them. memory_of: bytes of a device that it takes.
    candidates: `models()` if there are none. unique: tokens of text that there are. Money is time: hand in `limit_seconds`
    that the money buys.
    """
    _check("time", limit_seconds)
    _check("memory", limit_bytes)
    options, sooner = [], []
    for model in _that_fit(models() if candidates is None else tuple(candidates), memory_of, limit_bytes):
        tokens = _tokens_in(limit_seconds, partial(seconds_of, model))
        if tokens < 1:
            continue
        option = _option(model, tokens, law, unique, memory_of)
        options.append(replace(option, seconds=seconds_of(model, tokens)))
        experts = expansion(model)
        enough = (law or law_for(experts)).best_tokens(option.parameters, experts=experts)
        if enough < tokens:
            loss = (law or law_for(experts)).loss(option.parameters, enough, experts=experts, unique=unique)
            sooner.append(replace(option, tokens=enough, loss=loss, seconds=seconds_of(model, enough)))
    if not options:
        raise UserError("there is no time to train any model in (plan). give more hours, money or machines")
    best = min(options, key=lambda option: option.loss.typical)
    return Within(best, tuple(options), tuple(_front(options + sooner)), facts_of(best, law, unique))


def _that_fit(
    candidates: tuple[ModelConfig, ...], memory_of: Callable[[ModelConfig], float] | None, limit: float | None
) -> list[ModelConfig]:
    if memory_of is None or limit is None:
        return list(candidates)
    needed = [memory_of(model) for model in candidates]
    fitting = [model for model, bytes_of in zip(candidates, needed, strict=True) if bytes_of <= limit]
    if not fitting:
        raise UserError(f"no model of ours fits {size(limit)} (--memory). the smallest takes {size(min(needed))}")
    return fitting


def _tokens_in(limit: float, seconds_of: Callable[[float], Estimate]) -> float:
    """Tokens that take `limit` seconds: exact at once where time is proportional, else each guess corrects the last."""
    tokens = 1e9
    for _ in range(12):
        taken = seconds_of(tokens).typical
        if not taken > 0 or abs(taken / limit - 1) < 1e-3:
            break
        tokens *= limit / taken
        if tokens < 1:
            return 0.0
    return tokens


def _option(
    model: ModelConfig,
    tokens: float,
    law: Surface | None,
    unique: float | None,
    memory_of: Callable[[ModelConfig], float] | None,
) -> Option:
    active, experts = count_parameters(model).active, expansion(model)
    loss = (law or law_for(experts)).loss(active, tokens, experts=experts, unique=unique)
    return Option(model, active, tokens, loss, memory=None if memory_of is None else memory_of(model))


def _front(options: list[Option]) -> Iterator[Option]:
    ordered = sorted(options, key=lambda option: (_typical(option.seconds), option.loss.typical))
    lowest, kept = math.inf, None
    for option in ordered:
        if option.loss.typical >= lowest:
            continue
        if kept is not None and _typical(option.seconds) > 1.001 * _typical(kept.seconds):  # else as quick, and better
            yield kept
        lowest, kept = option.loss.typical, option
    if kept is not None:
        yield kept


def _typical(seconds: Estimate | None) -> float:
    return seconds.typical if seconds is not None else 0.0


def facts_of(best: Option, law: Surface | None = None, unique: float | None = None) -> tuple[Fact, ...]:
    """Size, tokens and loss of a model, with their law."""
    law = law or law_for(expansion(best.model))
    N, D = best.parameters, best.tokens
    return (*_sizes(law, N, D, unique), _loss_fact(law, best.loss, N, D))


def _check(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{name} is {value} (plan). it must be a positive number")
