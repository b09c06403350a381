"""Compiled kernels for training on a CPU. `load` first; `available` says whether the functions may be called."""

from minga.kernels.cpu.build import available, load
from minga.kernels.cpu.functions import (
    PRECISIONS,
    Experts,
    LatentAttention,
    Linear,
    RMSNorm,
    cross_entropy_in_place,
    linear_backward,
    muon_step,
)

__all__ = [
    "PRECISIONS",
    "Experts",
    "LatentAttention",
    "Linear",
    "RMSNorm",
    "available",
    "cross_entropy_in_place",
    "linear_backward",
    "load",
    "muon_step",
]
