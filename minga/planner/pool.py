"""Training over the Internet: what a peer sends, the link it needs, the time it loses; and what no such link can carry.

    pool = pool_estimate(model, peers=20, step_seconds=10, up=2.5e6, down=12.5e6, method="sparseloco")
    pool.bytes_up, pool.lost, pool.needed_up
    split_over_link(v3(), "expert", link=12.5e6, latency=0.02, rate=400e12).sentence

Peers hold the whole model and meet at a hub: each sends its update, takes the sum of all. Plain data parallel does that every
step with the gradient; DiLoCo and its heirs every H steps, with the way that the weights have gone, of fewer bits. What splits
a model over peers instead (experts, tensors, stages) sends activations for each token, which no compression of updates helps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from minga.errors import UserError
from minga.planner import words
from minga.planner.architecture import Model, architecture_of
from minga.planner.counts import count_parameters, forward_flops


@dataclass(frozen=True)
class Method:
    """How peers agree. number: bytes that a parameter is sent as."""

    name: str
    every: int  # steps between two meetings
    number: float
    source: str

    @property
    def reduction(self) -> float:
        """Times fewer bytes than float32 gradients in every step."""
        return 4 * self.every / self.number


METHODS = {
    method.name: method
    for method in (
        Method("data-parallel", 1, 4.0, "float32 gradients"),
        Method("diloco", 500, 4.0, "2311.08105: H = 500, float32"),
        Method("intellect-1", 100, 1.0, "2412.01152: H = 100, int8; 400 times less"),
        # Four bits, and two bytes for 256 numbers; with error feedback. Our run: 197,250 bytes for 388,416 parameters.
        Method("muloco", 30, 4 / 8 + 2 / 256, "2505.23725: H = 30, 2 to 4 bits with error feedback"),
        # Of each 4,096 numbers 64, an index of 12 bits and two bits of value each; 1.56 % of the entries.
        Method(
            "sparseloco",
            30,
            64 * (12 + 2) / 8 / 4096,
            "2508.15706, Covenant-72B's settings: 64 of 4,096, 2 bits, H = 30",
        ),
    )
}


@dataclass(frozen=True)
class Pool:
    """What a peer of a pool sends and waits for."""

    method: Method
    bytes_up: float  # of a meeting
    bytes_down: float
    step_up: float  # bytes, mean over steps
    meeting_seconds: float
    lost: float  # share of the time that goes into waiting
    needed_up: float  # bytes/s at which no more than `allowed` is lost, if the downlink does not hold it back
    needed_down: float


def pool_estimate(
    model: Model,
    *,
    peers: int,
    step_seconds: float,
    up: float,
    down: float,
    method: str | Method = "muloco",
    every: int | None = None,
    summed: bool = True,
    overlap: float = 0.0,
    allowed: float = 0.05,
    mtp: bool = False,
) -> Pool:
    """Each peer needs `step_seconds` for a step and has links of `up` and `down` bytes/s.

    every: another H. summed: the hub sends the sum of the updates, as long as one of them (of sparse ones nobody has published
    that it can be); else each peer fetches those of all others, as in Covenant-72B. overlap: of a round's computing, the share
    that the meeting of the round before may take without anyone waiting. mtp: the MTP modules are trained too.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise UserError(f"method {method!r} is not known (pool). known: {', '.join(METHODS)}")
        method = METHODS[method]
    if every is not None:
        method = replace(method, every=every)
    numbers = {"peers": peers, "step_seconds": step_seconds, "up": up, "down": down, "every": method.every}
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value} (pool). it is above 0")
    if not (0 <= overlap <= 1 and 0 < allowed < 1):
        raise UserError(f"overlap is {overlap}, allowed {allowed} (pool). both are shares, between 0 and 1")
    counts = count_parameters(model)
    update = (counts.total_with_mtp if mtp else counts.total) * method.number
    taken = 0.0 if peers == 1 else update if summed else (peers - 1) * update
    sent = update if peers > 1 else 0.0
    computing = method.every * step_seconds
    meeting = sent / up + taken / down
    waiting = max(0.0, meeting - overlap * computing)
    hidden = (overlap + allowed / (1 - allowed)) * computing  # seconds that a meeting may take
    half = hidden / 2  # for each direction
    return Pool(
        method=method,
        bytes_up=sent,
        bytes_down=taken,
        step_up=sent / method.every,
        meeting_seconds=meeting,
        lost=waiting / (waiting + computing),
        needed_up=sent / half,
        needed_down=taken / half,
    )


# ---------------------------------------------------------------------------------------------- a model split over a link

HOPELESS = 4.0  # times that the link takes longer than the computing: three quarters of the time is waiting, even if both overlap


@dataclass(frozen=True)
class Split:
    """A model that is split over a link, for each token."""

    way: str
    bytes: float  # that a device sends for a token, forward and backward
    link_seconds: float
    compute_seconds: float
    needed: float  # bytes/s at which the link keeps up with the device
    decode_ceiling: float  # tokens/s that one user can get at most: every token waits for so many journeys
    sentence: str

    @property
    def ratio(self) -> float:
        return self.link_seconds / self.compute_seconds

    @property
    def hopeless(self) -> bool:
        return self.ratio > HOPELESS


def split_over_link(
    model: Model, way: str, *, link: float, latency: float, rate: float, parts: int = 8, context: float = 2048
) -> Split:
    """Whether a model can be trained with `parts` of it at ends of a link of `link` bytes/s and `latency` seconds one way.

    way: "expert", "tensor" or "pipeline". rate: FLOP/s that each device reaches. In a layer, a token goes to its experts (a byte
    a number) and comes back (two), or is summed twice over all parts (two bytes); between stages it goes once. Backward sends as
    much again, and computes twice as much.
    """
    a = architecture_of(model)
    D, layers = a.hidden_size, a.num_layers
    if way == "expert":
        experts = [(count, b.feed_forward) for count, b in a.blocks if b.feed_forward.experts]
        if not experts:
            raise UserError("the model has no experts (pool). split it by tensor or pipeline")
        forward = sum(count * f.chosen * D * 3 for count, f in experts) * (parts - 1) / parts
        journeys = 2 * sum(count for count, _ in experts)
    elif way == "tensor":
        forward, journeys = 2 * layers * 2 * (parts - 1) / parts * D * 2, 2 * layers
    elif way == "pipeline":
        forward, journeys = D * 2, parts
    else:
        raise UserError(f"way {way!r} is not known (pool). known: expert, tensor, pipeline")
    # With experts each device computes whole tokens' worth; cut in parts, each does its part of every token.
    share = 1.0 if way == "expert" else 1 / parts
    computing = share * 3 * forward_flops(model, context / 2) / rate
    sent = 2.0 * forward
    waiting, ceiling = sent / link, 1 / (journeys * latency) if latency > 0 else math.inf
    ratio = waiting / computing
    verdict = "hopeless" if ratio > HOPELESS else "slow" if ratio > 1 else "possible, if hidden behind computing"
    sentence = (
        f"{way} parallelism over {words.link(link)} is {verdict}: a token sends {words.size(sent)} in "
        f"{words.duration(waiting)} and computes for {words.duration(computing)}; a link of {words.link(sent / computing)} "
        f"would keep up. decoding over it, one user gets at most {words.number(ceiling)} tokens/s"
    )
    return Split(way, sent, waiting, computing, sent / computing, ceiling, sentence)
