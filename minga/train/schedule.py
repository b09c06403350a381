"""What changes over a run, as pure functions of its progress (0 at the first step, 1 after the last).

The learning rate: a short rise, a plateau, a linear fall (warm-up, stable, decay; arXiv 2404.06395). Batch and sequence
length: small while gradients still agree and long contexts teach nothing yet, full later (batch: arXiv 1711.00489;
length: arXiv 2108.06084). Tokens a micro-batch stay equal: a window is cut into shorter rows.
"""

from __future__ import annotations

from minga.config import TrainConfig


def lr_scale(progress: float, config: TrainConfig) -> float:
    """Factor on every learning rate at `progress`."""
    if progress < config.warmup:
        return (progress + 1e-3) / (config.warmup + 1e-3)
    if progress > 1 - config.decay:
        remaining = max(0.0, 1 - progress) / config.decay
        return config.final_lr + (1 - config.final_lr) * remaining
    return 1.0


def momentum(step: int, config: TrainConfig) -> float:
    """Muon's momentum: short while the gradient still turns from step to step, long once it has a direction."""
    share = min(1.0, step / config.momentum_warm_steps) if config.momentum_warm_steps else 1.0
    return config.momentum_start + (config.momentum - config.momentum_start) * share


def num_micro_batches(progress: float, config: TrainConfig) -> int:
    """Micro-batches of a step: each number from 1 to `accumulate` for an equal share of `batch_warmup`."""
    if progress >= config.batch_warmup:
        return config.accumulate
    return min(config.accumulate, 1 + int(config.accumulate * progress / config.batch_warmup))


def sequence_length(progress: float, config: TrainConfig) -> int:
    """Tokens a row: a line from `seq_len_start` to `seq_len` over `seq_warmup`, rounded down to what divides `seq_len`.

    All lengths are multiples of 64, and a window of `seq_len` splits into whole rows, so no token is lost or read twice.
    """
    if progress >= config.seq_warmup:
        return config.seq_len
    wish = config.seq_len_start + (config.seq_len - config.seq_len_start) * progress / config.seq_warmup
    lengths = range(config.seq_len_start, config.seq_len + 1, 64)
    return max(length for length in lengths if length <= wish and config.seq_len % length == 0)
