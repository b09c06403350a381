"""What a training step sends: bytes that leave a process, by collective, from the config alone.

    sent = step_bytes(config, dp=2, ep=2, with_mtp=True)         # sent.all_gather, .reduce_scatter, ..., .total

Each line of the sums below stands beside what it counts in `minga.train.sharding` and `dispatch`; tests compare with the
bytes counted in real and pretended runs. The means over all processes are given; how evenly tokens are routed does not
change them, only their spread, as long as every process reads text of the same kind. A ring's traffic is assumed: of S bytes,
gathering or reduce-scattering sends S (P - 1) / P, all-reducing twice that.

A vector counts as a matrix of one column, a stack of experts as one of as many rows as experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from minga.config import TrainConfig
from minga.planner.architecture import Block, Shape, architecture_of


@dataclass(frozen=True)
class CommBytes:
    """Bytes that a process sends in an optimizer step."""

    all_gather: float  # parameters, for forward and again for backward (FSDP)
    reduce_scatter: float  # gradients (FSDP)
    experts: float  # all-to-all: tokens to their experts and back, and so their gradients
    matrices: float  # all-to-all: gradients of matrices to their owners, new weights back (Muon)
    all_reduce: float  # token counts, metrics, the gradient's norm, CPU time, the wish to stop

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def step_bytes(config: TrainConfig, *, dp: int, ep: int = 1, with_mtp: bool = False, width: int = 4) -> CommBytes:
    """Mean over the dp · ep processes. `width`: bytes of a parameter, a gradient, an activation."""
    c, processes = config.model, dp * ep
    arch = architecture_of(c)
    modules = arch.mtp if with_mtp else ()
    blocks = [*arch.blocks, *((1, block) for block in modules)]
    moe = sum(count for count, block in blocks if block.feed_forward.experts)

    matrices = [
        (count, shape) for count, block in blocks for shape in block.attention.matrices + block.feed_forward.matrices
    ]
    matrices.append((len(modules), arch.mtp_join))
    inside = matrices + [(count, shape) for count, block in blocks for shape in _others(block)]
    inside.append((3 * len(modules), (c.hidden_size, 1)))  # the modules' norms
    table, norm = (1, (c.vocab_size, c.hidden_size)), (1, (c.hidden_size, 1))
    head = [] if arch.tied else [table]
    stacks = [(moe, (c.n_routed_experts // ep, 3 * c.hidden_size * c.moe_intermediate_size))]

    # A block is gathered for forward and for backward. Embedding, last norm and head stay whole between the two.
    wholes = [*((2 * count, shape) for count, shape in inside), table, norm, *head]
    sums = [*inside, table, norm, *head]
    gathered = width * (_share(processes) * _padded(wholes, processes) + _share(dp) * 2 * _padded(stacks, dp))
    reduced = width * (_share(processes) * _padded(sums, processes) + _share(dp) * _padded(stacks, dp))
    tokens = config.batch_size * config.seq_len / processes
    rows = 4 * tokens * c.num_experts_per_tok * c.hidden_size * width  # there and back, values and gradients
    routed = moe * _share(ep) * (rows + 8 * c.n_routed_experts)  # and how many rows are coming
    owned = 2 * width * _share(processes) * sum(n * r * columns for n, (r, columns) in matrices) / processes

    depths = 1 + len(arch.mtp)
    routers = sum(count for count, block in arch.blocks if block.feed_forward.experts)
    routers += len(arch.mtp) * bool(c.n_routed_experts)
    counted = 2 * c.n_routed_experts + 1  # of a router: choices and scores of each expert, and the scores' squares
    numbers = config.accumulate * depths + 3 + routers * counted + 2
    small = 2 * _share(processes) * (8 * numbers + 4)
    return CommBytes(
        config.accumulate * gathered, config.accumulate * reduced, config.accumulate * routed, owned, small
    )


def _share(processes: int) -> float:
    """Of what is spread over processes, the part that is elsewhere."""
    return (processes - 1) / processes


def _padded(shapes: Iterable[tuple[int, Shape]], processes: int) -> int:
    """Numbers in all, rows filled up to a multiple of the processes, as FSDP lays them out."""
    return sum(count * -(-rows // processes) * processes * columns for count, (rows, columns) in shapes)


def _others(block: Block) -> Iterator[Shape]:
    """A block's router, norms and biases."""
    yield from block.feed_forward.router
    for size in block.norms + block.attention.vectors + block.feed_forward.vectors:
        yield size, 1
