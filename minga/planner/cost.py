"""What work costs: energy, money and carbon.

Of a server, from the seconds that its models were busy:

    rates = Rates(watts=estimate_watts(cores=8))
    rates.kwh(3600), rates.money(3600), rates.price_per_million_tokens(3600, 1_000_000)      # each an estimate

Only busy time is counted. What the machine draws while it waits, and would also draw without this server, is not: for a
machine that does nothing else, measure at the wall and divide by the tokens.

Of a run, from its device-hours:

    kwh = energy(hours, training_watts(700), overhead=NODE_OVERHEAD, pue=DATA_CENTRE_PUE)
    rent(hours, price), owned(hours, kwh, ...), carbon(kwh, 475), with_development(kwh)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minga.errors import UserError
from minga.planner.estimate import Estimate

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

# What a device draws while it trains, of its power limit. Typical: 624 and 649 W an H100-hour of 700 W (OLMo 3 7B and 32B: 146
# MWh in 234,000 h, 681 MWh in 1.05 million). Low: the top of the swing that was measured within runs, 15 to 85 % (2503.05804).
# High: the limit itself, which BLOOM (400 W an A100, 2211.02001) and the Llama cards count.
TRAINING_SHARE = Estimate(0.85, 0.91, 1.0)
# Processors, memory, network and fans, for each watt of the devices. Low: counted in the device's figure already. High: the 1.74
# that OLMo 3 counts for everything beside GPUs (2605.01158), over a PUE of 1.2. Typical: an assumption between.
NODE_OVERHEAD = Estimate(1.0, 1.1, 1.45)
# What the building draws for each watt of its machines. Low: large clouds, 1.1. Typical: BLOOM's 1.2. High: mean of Uptime
# Institute's survey of 2024, 1.56.
DATA_CENTRE_PUE = Estimate(1.1, 1.2, 1.56)
# All work of a project for each unit of its final run. Low: OLMo 2's development "amounted to 50 % of that of training"
# (2503.05804), here read as half of all; as half of the training it is 1.5. High: 82.2 % of OLMo 3's compute was not the final
# runs (2605.01158).
DEVELOPMENT = Estimate.between(2.0, 1 / (1 - 0.822))

MOST_RATE = 1e12  # watts or money an hour: a grid of a continent
_NO_RATE = f"a rate is negative, no number, or absurd (cost). watts and prices are 0 or more, and at most {MOST_RATE:g}"


@dataclass(frozen=True)
class Rates:
    """What an hour of work costs.

    watts: drawn at the wall by the busy machine. pue: what the room draws for each watt of the machine. machine_price_per_hour:
    rent, or price over lifetime, for each busy hour; 0 is a machine that is there anyway. Prices are in `currency`.
    Raises `UserError` for what is no price or no power.
    """

    watts: Estimate
    price_per_kwh: float = PRICE_PER_KWH
    machine_price_per_hour: float = 0.0
    pue: float = PUE
    currency: str = "USD"

    def __post_init__(self) -> None:
        numbers = (self.watts.low, self.watts.high, self.price_per_kwh, self.machine_price_per_hour)
        if not all(0 <= number <= MOST_RATE for number in numbers):
            raise UserError(_NO_RATE)
        if not 1 <= self.pue < math.inf:
            raise UserError(f"pue is {self.pue} (cost). it is 1 or more: 1 for a machine in a room that is not cooled")

    def kwh(self, busy_seconds: float) -> Estimate:
        return self.watts * (self.pue * busy_seconds / 3.6e6)

    def money(self, busy_seconds: float) -> Estimate:
        machine = self.machine_price_per_hour * busy_seconds / 3600
        return self.kwh(busy_seconds) * self.price_per_kwh + Estimate.exactly(machine)

    def price_per_million_tokens(self, busy_seconds: float, num_tokens: int) -> Estimate | None:
        """Of prompt and completion together; None where there were none."""
        return self.money(busy_seconds) * (1e6 / num_tokens) if num_tokens else None


def measured_watts(watts: float) -> Estimate:
    """What a meter says."""
    if not 0 <= watts <= MOST_RATE:
        raise UserError(_NO_RATE)
    return Estimate.exactly(watts)


def estimate_watts(
    *, cores: int, host_cores: int | None = None, cpu_limit: float | None = None, gpu_limit: float | None = None
) -> Estimate:
    """What a machine draws at the wall while it works, for one whose meter cannot be read.

    cores: that work. cpu_limit: power limit of all processors, in watts, for `host_cores` cores (`cores` if it is None);
    where it is not known, `WATTS_PER_CORE`. gpu_limit: power limit of all GPUs, None without.
    """
    if cpu_limit is None:
        low, high = WATTS_PER_CORE
        watts = Estimate.between(cores * low, cores * high * OVERHEAD[1])  # the low figure is of whole machines
    else:
        watts = _of_limit(cpu_limit * min(1.0, cores / (host_cores or cores)))
    return watts if gpu_limit is None else watts + _of_limit(gpu_limit)


def _of_limit(watts: float) -> Estimate:
    return Estimate.between(watts * LIMIT_SHARE[0] * OVERHEAD[0], watts * LIMIT_SHARE[1] * OVERHEAD[1])


# ---------------------------------------------------------------------------------------------- of a run


def training_watts(limit: float) -> Estimate:
    """What a device with this power limit draws while it trains."""
    return TRAINING_SHARE * limit


def energy(
    device_hours: Estimate,
    watts: float | Estimate,
    *,
    overhead: Estimate = NODE_OVERHEAD,
    pue: Estimate = DATA_CENTRE_PUE,
) -> Estimate:
    """kWh at the meter. watts: of a device."""
    return device_hours * watts * overhead * pue / 1000


def carbon(kwh: Estimate, grams_per_kwh: float) -> Estimate:
    """Kilograms of CO2 equivalent. Of electricity alone: making the machines is not in it (BLOOM: 11.2 of 50.5 t)."""
    return kwh * (grams_per_kwh / 1000)


def rent(device_hours: Estimate, price_per_hour: Estimate) -> Estimate:
    """Money for devices that are rented by the hour."""
    return device_hours * price_per_hour


def with_development(final_run: Estimate) -> Estimate:
    """The whole project's hours, kWh or money, experiments and failures included, from those of its final run."""
    return final_run * DEVELOPMENT
