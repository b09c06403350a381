"""Numbers that know their doubt, and where they come from: what every part of a plan is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number that most likely is `typical` and, in nine cases of ten, lies between `low` and `high`."""

    low: float
    typical: float
    high: float

    def __post_init__(self) -> None:
        assert self.low <= self.typical <= self.high, (self.low, self.typical, self.high)

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        return cls(value, value, value)

    @classmethod
    def between(cls, low: float, high: float) -> Estimate:
        """Nothing but its ends is known: the typical value is their geometric mean (half of `high` where `low` is 0)."""
        middle = math.sqrt(low) * math.sqrt(high) if low > 0 else high / 2
        return cls(low, min(max(middle, low), high), high)  # a rounding error may lie outside

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def __mul__(self, factor: float | Estimate) -> Estimate:
        """By something of 0 or more. Two estimates: as if the doubts of both went the same way, the widest case."""
        by = factor if isinstance(factor, Estimate) else Estimate.exactly(factor)
        return Estimate(self.low * by.low, self.typical * by.typical, self.high * by.high)

    def __truediv__(self, factor: float) -> Estimate:
        return self * (1 / factor)


@dataclass(frozen=True)
class Fact:
    """One number of a plan: `name` is its place in the JSON document, such as "train.gpu_hours".

    label: what it is, in the words of the table; a fact without one is in the document alone. unit: see `words.in_unit`.
    `formula` says in one line how it follows from `inputs`, `source` who says so: a paper, a data sheet, our own measurement.
    """

    name: str
    value: float | int | str | Estimate
    unit: str = ""
    label: str = ""
    formula: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
