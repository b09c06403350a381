"""The learning rate over a run: a short rise, a plateau, a linear fall (warm-up, stable, decay; arXiv 2404.06395)."""

from __future__ import annotations

from minga.config import TrainConfig


def lr_scale(progress: float, config: TrainConfig) -> float:
    """Factor on every learning rate at `progress` (0 at the first step, 1 after the last)."""
    if progress < config.warmup:
        return (progress + 1e-3) / (config.warmup + 1e-3)
    if progress > 1 - config.decay:
        remaining = max(0.0, 1 - progress) / config.decay
        return config.final_lr + (1 - config.final_lr) * remaining
    return 1.0
