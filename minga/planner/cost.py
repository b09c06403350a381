"""What serving costs: energy and money, from the seconds that models were busy.

    rates = Rates(watts=estimate_watts(cores=8))
    rates.kwh(3600), rates.money(3600), rates.price_per_million_tokens(3600, 1_000_000)      # each low and high

Only busy time is counted. What the machine draws while it waits, and would also draw without this server, is not: for a
machine that does nothing else, measure at the wall and divide by the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minga.errors import UserError

# A core at full load. Low: mean over the servers of a cloud, whole machine, from SPECpower: 3.5 (AWS), 3.8 (Azure), 4.3 (GCP) W
# a virtual core, cloudcarbonfootprint.org/docs/methodology. High: a desktop chip, 142 W (AMD's socket limit of its 105 W
# parts) for 8 cores.
WATTS_PER_CORE = (3.5, 18.0)
# Of its power limit a chip draws: all of it in prefill, far less in decoding, which waits for memory; on GPUs: Patel et al.
# 2023 (2308.12908). The low end is our own conservative reading of their figures.
LIMIT_SHARE = (0.5, 1.0)
# Power supply (80 PLUS Gold: 87 to 92 % efficient), memory, board, disks and fans, for each watt of the chips. An assumption.
OVERHEAD = (1.1, 1.5)
# World means of March 2024: 0.162 for households, 0.181 for businesses (globalpetrolprices.com). USD.
PRICE_PER_KWH = 0.17
# A machine in a room that nobody cools for it. Data centres: 1.56 (mean of Uptime Institute's survey of 2024).
PUE = 1.0


@dataclass(frozen=True)
class Range:
    """A number that is known to lie between two."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        """By a number of 0 or more."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Rates:
    """What an hour of work costs.

    watts: drawn at the wall by the busy machine. pue: what the room draws for each watt of the machine. machine_price_per_hour:
    rent, or price over lifetime, for each busy hour; 0 is a machine that is there anyway. Prices are in `currency`.
    Raises `UserError` for what is no price or no power.
    """

    watts: Range
    price_per_kwh: float = PRICE_PER_KWH
    machine_price_per_hour: float = 0.0
    pue: float = PUE
    currency: str = "USD"

    def __post_init__(self) -> None:
        numbers = (self.watts.low, self.watts.high, self.price_per_kwh, self.machine_price_per_hour)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or self.watts.low > self.watts.high:
            raise UserError("a rate is negative or no number (cost). watts and prices are 0 or more, the low one first")
        if not 1 <= self.pue < math.inf:
            raise UserError(f"pue is {self.pue} (cost). it is 1 or more: 1 for a machine in a room that is not cooled")

    def kwh(self, busy_seconds: float) -> Range:
        return self.watts * (self.pue * busy_seconds / 3.6e6)

    def money(self, busy_seconds: float) -> Range:
        machine = self.machine_price_per_hour * busy_seconds / 3600
        return self.kwh(busy_seconds) * self.price_per_kwh + Range(machine, machine)

    def price_per_million_tokens(self, busy_seconds: float, num_tokens: int) -> Range | None:
        """Of prompt and completion together; None where there were none."""
        return self.money(busy_seconds) * (1e6 / num_tokens) if num_tokens else None


def estimate_watts(
    *, cores: int, host_cores: int | None = None, cpu_limit: float | None = None, gpu_limit: float | None = None
) -> Range:
    """What a machine draws at the wall while it works, for one whose meter cannot be read.

    cores: that work. cpu_limit: power limit of all processors, in watts, for `host_cores` cores (`cores` if it is None);
    where it is not known, `WATTS_PER_CORE`. gpu_limit: power limit of all GPUs, None without.
    """
    if cpu_limit is None:
        low, high = WATTS_PER_CORE
        watts = Range(cores * low, cores * high * OVERHEAD[1])  # the low figure is of whole machines
    else:
        watts = _of_limit(cpu_limit * min(1.0, cores / (host_cores or cores)))
    return watts if gpu_limit is None else watts + _of_limit(gpu_limit)


def _of_limit(watts: float) -> Range:
    return Range(watts * LIMIT_SHARE[0] * OVERHEAD[0], watts * LIMIT_SHARE[1] * OVERHEAD[1])
