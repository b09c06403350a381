"""Devices and machines: what they compute, hold and move, as their makers say.

Rates are dense (never the doubled ones of 2:4 sparsity) and those that accumulate in float32 where that makes a difference.
A figure that is not known is absent. Units: FLOP/s, bytes, bytes a second, watts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """One accelerator, or the processors of a machine without one."""

    name: str  # "H100-SXM", as in the table
    kind: str  # "data-centre" | "workstation" | "consumer" | "apple" | "cpu"
    flops: Mapping[str, float]  # by "float32", "bf16", "fp16", "fp8", "int8", "fp4"; matrix units, dense
    memory: float
    bandwidth: float  # of that memory
    link: float | None = None  # to another device of the same node, per direction
    per_node: int = 8  # as it is usually sold
    network: float | None = (
        None  # of a whole node with `per_node` devices, per direction: all its network cards together
    )
    watts: float | None = None  # power limit
    achievable: Mapping[str, float] = field(
        default_factory=dict
    )  # share of `flops` that the best matrix product reaches
    sources: Mapping[str, str] = field(default_factory=dict)  # field -> where its figure is from, with the date

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products, or of the nearest precision that the device has: fp8 falls back to bf16, bf16 to fp16."""
        for name in {"fp8": ("fp8", "bf16", "fp16"), "bf16": ("bf16", "fp16")}.get(precision, (precision,)):
            if name in self.flops:
                return self.flops[name]
        return self.flops["float32"]


@dataclass(frozen=True)
class Machine:
    """`count` equal devices, `per_node` of them in a node."""

    device: Device
    count: int = 1
    per_node: int = 1
    network: float | None = None  # bytes/s of a node, per direction; None with one node, or where it is not known

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)
