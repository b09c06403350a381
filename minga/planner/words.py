"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable

from minga.config.hardware import Machine
from minga.planner.estimate import Estimate

_COUNTS = ((1e15, " P"), (1e12, " T"), (1e9, " B"), (1e6, " M"))
_SIZES = ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"))


def number(value: float, digits: int = 3) -> str:
    """So many digits that count: 12,345 or 1.23 or 0.0012."""
    if value == 0 or abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(value: float, digits: int = 3) -> str:
    """Parameters, tokens, operations: 37.6 B."""
    return _scaled(value, _COUNTS, "", digits)


def size(value: float, digits: int = 3) -> str:
    """Bytes: 61.2 GB, which is 61.2e9."""
    return _scaled(value, _SIZES, " B", digits)


def link(rate: float) -> str:
    """Bytes/s as links are sold: 100 Mbit/s."""
    return _scaled(8 * rate, ((1e9, " Gbit/s"), (1e6, " Mbit/s"), (1e3, " kbit/s")), " bit/s", 3)


def duration(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{number(seconds / unit)} {name}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"


def _scaled(value: float, units: tuple[tuple[float, str], ...], bare: str, digits: int) -> str:
    for scale, unit in units:
        if abs(value) >= scale:
            return number(value / scale, digits) + unit
    return number(value, digits) + bare


def money(value: float, currency: str = "USD") -> str:
    """Whole units; of little money cents, and of less two digits that count."""
    if 0 < value < 0.1:
        decimals = 1 - math.floor(math.log10(value))
        return f"{currency} {value:.{decimals}f}" if decimals <= 9 else f"{currency} {value:.2g}"
    return f"{currency} {count(value) if value >= 1e6 else f'{value:,.2f}' if value < 10 else f'{value:,.0f}'}"


def _operations(value: float) -> str:
    return _scaled(value, tuple((10.0 ** (3 * n), f" {'kMGTPEZY'[n - 1]}FLOP") for n in range(8, 0, -1)), " FLOP", 3)


_WORDS: dict[str, Callable[[float], str]] = {
    "": count,
    "bytes": size,
    "bytes/s": lambda value: size(value) + "/s",
    "FLOP": _operations,
    "FLOP/s": lambda value: _operations(value) + "/s",
    "s": duration,
    "h": lambda value: duration(3600 * value),
    "days": lambda value: duration(86400 * value),
    "share": lambda value: f"{100 * value:.3g} %",
    "USD": money,
    "kWh": lambda value: _scaled(1000 * value, ((1e9, " GWh"), (1e6, " MWh"), (1e3, " kWh")), " Wh", 3),
    "kg": lambda value: _scaled(1000 * value, ((1e12, " Mt"), (1e6, " t"), (1e3, " kg")), " g", 3),
}


def in_unit(value: float, unit: str) -> str:
    """With its unit behind it, scaled as that unit is read."""
    return _WORDS[unit](value) if unit in _WORDS else f"{count(value)} {unit}"


def rounded(value: float, unit: str) -> float:
    """Of an estimate, the digits that count: 137,000 and not 136,514. Of time no unit goes with a thousand."""
    return value if unit in ("s", "h", "days") else float(f"{value:.3g}")


def between(low: float, high: float, unit: str) -> str:
    """Two numbers with what they share said once: 1.36 - 3.63 M tokens/s, USD 5.8 M - 29 M."""
    a, b = in_unit(rounded(low, unit), unit), in_unit(rounded(high, unit), unit)
    first, last = a.partition(" "), b.partition(" ")
    if first[0] == last[0] and not first[0][0].isdigit():  # a currency
        b = last[2]
    elif first[2] == last[2]:
        a = first[0]
    return f"{a} - {b}"


def spread(value: Estimate, unit: str = "") -> str:
    """The typical value, and in brackets the range, where there is one."""
    if value.low == value.high:
        return in_unit(value.typical, unit)
    return f"{in_unit(rounded(value.typical, unit), unit)} ({between(value.low, value.high, unit)})"


def batches(number: int, sequences: int, tokens: int) -> str:
    return f"{number:,} micro-batch{'' if number == 1 else 'es'} of {sequences:,} x {tokens:,}"


def machine_words(machine: Machine) -> str:
    name = machine.device.name
    if machine.count == 1:
        return name
    nodes = f" ({machine.nodes:,} nodes of {machine.per_node})" if machine.nodes > 1 else ""
    return f"{machine.count:,} x {name}{nodes}"
