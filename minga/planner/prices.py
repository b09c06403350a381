"""What devices and electricity cost: dated ranges with their sources, from `prices.json` or a catalogue fetched later.

    rental(find_device("H100")).value          # USD of a device-hour, low, typical and high
    purchase(find_device("RTX 3090"))          # USD of a device; .per_hour(years=4, busy=0.5)
    electricity("Mexico"), electricity()       # USD of a kWh; the world's mean without a place
    refresh(date.today())                      # newer rents by way of gpuhunt, kept in the user's cache

Offers for one device differ by up to 18 times, so a price is a range: low is the cheapest offer on demand that the sources
list, high the dearest, typical their median or what most ask. Spot prices and contracts are left out where the sources tell
them apart. What nobody publishes is absent.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from minga.config.hardware import Device, find_device
from minga.errors import UserError
from minga.planner.estimate import Estimate
from minga.planner.grids import find_grid

OLD_DAYS = 365
HOURS_PER_YEAR = 8766
_REGIONS = ("world", "Africa", "Asia", "Europe", "North America", "South America", "Oceania")
_FEWEST_PROVIDERS = 2  # below, an offer is no market


@dataclass(frozen=True)
class Price:
    """A range of prices as of a day."""

    value: Estimate
    unit: str  # what it pays for: "device-hour" | "device" | "kWh"
    as_of: date  # when the sources looked; the first day, where they give a month or a year
    sources: tuple[str, ...]
    note: str = ""
    currency: str = "USD"

    def is_old(self, today: date) -> bool:
        """Older than a year: to be said wherever it is used."""
        return (today - self.as_of).days > OLD_DAYS

    def per_hour(self, *, years: float, busy: float) -> Estimate:
        """Of a device that is bought: its price over `years`, in each hour of the share `busy` of them in which it works."""
        if not (years > 0 and 0 < busy <= 1):
            raise UserError(
                f"a life of {years} years, busy {busy} of it (price). years above 0, and a share above 0, at most 1"
            )
        return self.value / (years * HOURS_PER_YEAR * busy)


def rental(device: Device) -> Price | None:
    """Rent of a device-hour, from the fetched catalogue where that is newer; None where no price is known."""
    shipped, fetched = _price("rental", device.name, _shipped()), _price("rental", device.name, _fetched())
    return max((price for price in (shipped, fetched) if price), key=lambda price: price.as_of, default=None)


def purchase(device: Device) -> Price | None:
    """Price of the device alone, without the machine around it; None where it is not known."""
    return _price("purchase", device.name, _shipped())


def electricity(place: str | None = None) -> Price | None:
    """Of a country (as `find_grid` takes it), a continent or, without a place, the world; None for a country whose price is
    not in the table.
    """
    regions = {region.lower(): region for region in _REGIONS}
    key = regions.get((place or "world").strip().lower()) or find_grid(place).code
    return _price("electricity", key, _shipped())


def refresh(today: date) -> Path:
    """Fetch what providers ask today through gpuhunt, and keep it in the user's cache folder; returns the file.

    For each device and provider the median of its offers on demand, for each GPU of an offer; of these the lowest, the
    median and the highest. gpuhunt does not tell SXM from PCIe. Raises `UserError` without gpuhunt or a network.
    """
    try:
        gpuhunt = importlib.import_module("gpuhunt")
    except ImportError:
        raise UserError("gpuhunt is not installed (prices). pip install gpuhunt, or use the prices that ship") from None
    # It prints a traceback for each provider that does not answer.
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)
    try:
        catalogue = gpuhunt.Catalog(auto_reload=False)
        catalogue.load()
        offers = catalogue.query(min_gpu_count=1, spot=False)
    except (OSError, gpuhunt.GPUHuntError) as error:
        raise UserError(
            f"the catalogue cannot be fetched: {error} (prices). try later, or use the prices that ship"
        ) from None
    asked: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for offer in offers:
        if offer.price > 0 and (device := _offered(offer)):
            asked[device.name][offer.provider].append(offer.price / offer.gpu_count)
    rows = {}
    for name, providers in sorted(asked.items()):
        prices = [statistics.median(offers) for offers in providers.values()]
        if len(prices) >= _FEWEST_PROVIDERS:
            rows[name] = {
                "low": min(prices),
                "typical": statistics.median(prices),
                "high": max(prices),
                "date": today.isoformat(),
                "sources": ["gpuhunt"],
                "note": f"{len(prices)} providers",
            }
    if not rows:
        raise UserError("the catalogue has no offers (prices). try later, or use the prices that ship")
    title = {
        "title": "dstackai/gpuhunt, on demand, SXM and PCIe not told apart",
        "url": "https://github.com/dstackai/gpuhunt",
        "date": today.isoformat(),
    }
    path = _fetched_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({"currency": "USD", "sources": {"gpuhunt": title}, "rental": rows}, file, indent=1)
    os.replace(file.name, path)
    _fetched.cache_clear()
    return path


def _offered(offer: Any) -> Device | None:
    if not offer.gpu_name or offer.gpu_vendor == "google":  # whose offers are slices of several chips
        return None
    for name in (f"{offer.gpu_name} {offer.gpu_memory or 0:g}GB", offer.gpu_name):
        try:
            return find_device(name)
        except UserError:
            pass
    return None


def _price(kind: str, key: str, table: dict[str, Any]) -> Price | None:
    row = table.get(kind, {}).get(key)
    if row is None:
        return None
    value = Estimate.between(row["low"], row["high"])
    if "typical" in row:
        value = Estimate(row["low"], row["typical"], row["high"])
    sources = (table["sources"][name] for name in row["sources"])
    return Price(
        value,
        {"rental": "device-hour", "purchase": "device", "electricity": "kWh"}[kind],
        _first_day(row["date"]),
        tuple(f"{source['title']}, {source['url']}, {source['date']}" for source in sources),
        row.get("note", ""),
        table["currency"],
    )


def _first_day(text: str) -> date:
    """Of a day, a month or a year in ISO form."""
    return date.fromisoformat((text + "-01-01")[:10])


@cache
def _shipped() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "prices.json").read_text(encoding="utf-8"))


@cache
def _fetched() -> dict[str, Any]:
    path = _fetched_path()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for name in table["rental"]:
            _price("rental", name, table)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"the fetched prices cannot be read (prices, {path}). delete that file, or fetch them again"
        ) from None
    return table


def _fetched_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minga" / "prices.json"
