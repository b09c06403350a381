"""Devices and machines: what they compute, hold and move, as their makers say.

    find_device("NVIDIA A100-SXM4-80GB"), find_device("4090"), find_device("Apple M2 Max 64GB")
    machine("2048xH800"), machine("2x8xH100"), machine("4090")

The table is `hardware.json`, each figure with its source and date; where sources differ its `note` says how, and the lower
figure is used. One that is not known, or on which they differ by far, is absent. Rates are dense (never the doubled ones of
2:4 sparsity) and those that accumulate in float32 where that makes a difference. Processors are measured, not looked up.
Units: FLOP/s, bytes, bytes a second, watts. Memory is what the maker prints, in GiB, or what the driver reports where that
is published; a driver keeps up to 1 % of it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from minga.errors import UserError

MOST_DEVICES = 1_000_000
HOST_LINK = 12e9  # bytes/s between devices of a node whose link is not known: through the host, PCIe 3.0 x16 or 4.0 x8
_LONGEST = 100  # characters that name a machine
_EXAMPLES = "such as H100, A100-40GB, RTX-4090, MI300X or M2-Max"
# What names say beside the model: makers, families, packages, kinds of memory.
_FAMILIES = re.compile(
    "^(?:nvidia|amd|intel|google|huawei|apple|geforce|rtx|gtx|rx|tesla|radeon|instinct|ascend|arc|tpu|gpu|hgx|dgx)+"
)
_NOISE = re.compile("graphics|card|accelerator|generation|edition|workstation|server|blackwell|oam|hbm[23]e?|gi?b")
_BEFORE = re.compile(r"([0-9]{1,7})\s*[x×*]\s*(?:([0-9]{1,7})\s*[x×*]\s*)?(.+)", re.IGNORECASE)
_BEHIND = re.compile(r"(.+?)\s*[x×*]\s*([0-9]{1,7})", re.IGNORECASE)
_FALLBACKS = {"fp8": ("fp8", "bf16", "fp16"), "int8": ("int8", "bf16", "fp16"), "bf16": ("bf16", "fp16")}


@dataclass(frozen=True)
class Device:
    """One accelerator, or the processors of a machine without one."""

    name: str  # "H100-SXM", as in the table
    kind: str  # "data-centre" | "workstation" | "consumer" | "apple" | "cpu"
    flops: Mapping[str, float]  # by "float32", "bf16", "fp16", "fp8", "int8", "fp4"; matrix units, dense; may be empty
    memory: float
    bandwidth: float  # of that memory
    link: float | None = None  # to the other devices of the same node, per direction
    per_node: int = 8  # as it is usually sold
    network: float | None = None  # of a node of `per_node`, per direction: all its network cards together
    watts: float | None = None  # power limit
    achievable: Mapping[str, float] = field(default_factory=dict)  # share of `flops` of the fastest matrix product
    sources: Mapping[str, str] = field(default_factory=dict)  # field -> where its figure is from, with the date
    note: str = ""  # conflicts of the sources, and what to know

    def rate(self, precision: str) -> float:
        """FLOP/s of matrix products in that precision, or in the `nearest`."""
        return self.flops[self.nearest(precision)]

    def nearest(self, precision: str) -> str:
        """The precision that the device computes it in: fp8 and int8 fall back to bf16, bf16 to fp16, all to float32.
        Raises `UserError` where the rate of none of them is known.
        """
        for name in (*_FALLBACKS.get(precision, (precision,)), "float32"):
            if name in self.flops:
                return name
        raise UserError(
            f"how fast {self.name} multiplies matrices in {precision} is not known (machine). on the machine itself "
            "`minga plan --calibrate` measures it"
        )


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


@cache
def devices() -> Mapping[str, Device]:
    """All devices of the table by name. The first of several with one short name is what that name means: A100 is the SXM
    module with 80 GB, H100 the SXM one, V100 the one with 16 GB, M2-Max the one with the least memory sold.
    """
    return {row["name"]: _device(row, _table()["sources"]) for row in _table()["devices"]}


def find_device(name: str) -> Device:
    """The device that a person, a shop or `nvidia-smi` means by `name`; case, spaces, dashes and makers do not matter.

    A size of memory chooses among variants ("A100 40GB", "A100-80"). Raises `UserError` with the nearest names.
    """
    words = _words(name)
    found, variants = _lookup(words)
    if found:
        return found
    if variants:
        sizes = " or ".join(f"{size} GB" for size in dict.fromkeys(row["memory_gb"] for row in variants))
        raise UserError(f"{name!r} does not come with that memory (machine). it has {sizes}")
    near = difflib.get_close_matches("".join(words)[:40], _names(), n=5, cutoff=0.6)
    nearest = list(dict.fromkeys(_names()[key][0]["name"] for key in near))[:3]
    hint = f"the nearest: {', '.join(nearest)}" if nearest else _EXAMPLES
    raise UserError(f"{name!r} is not in the table of devices (machine). {hint}")


def machine(text: str) -> Machine:
    """`H100`, `8xH100`, `8 * H100`, `H100x8`, or `2x8xH100`: two nodes of eight. Without a number of nodes, as many
    devices to a node as it is usually sold with. Raises `UserError`.
    """
    if "+" in text:
        raise UserError(
            f"{text!r} mixes devices (machine). plan each kind on its own: in one run all wait for the slowest"
        )
    text = text.strip()
    if len(text) > _LONGEST:
        raise _no_machine(f"{text[:_LONGEST]}...")
    before, behind = _BEFORE.fullmatch(text), _BEHIND.fullmatch(text)
    if _is_known(text):  # before anything is split: RX 7900 XTX
        outer, inner, name = "1", None, text
    elif behind and _is_known(behind[1]):  # 4090x4
        outer, inner, name = behind[2], None, behind[1]
    elif before:
        outer, inner, name = before.groups()
    elif text[:1].isalpha():
        outer, inner, name = "1", None, text
    else:
        raise _no_machine(text)
    count = int(outer) * int(inner or 1)
    if not 1 <= count <= MOST_DEVICES:
        raise _no_machine(text)
    return of_devices(find_device(name), count, int(inner) if inner else None)


def of_devices(device: Device, count: int, per_node: int | None = None) -> Machine:
    """So many devices; in each node as many as it is usually sold with, unless it is said."""
    per_node = per_node or min(count, device.per_node)
    return Machine(device, count, per_node, device.network if count > per_node else None)


def __getattr__(name: str) -> Any:
    if name == "DEVICES":  # read only when someone asks
        return devices()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _no_machine(text: str) -> UserError:
    return UserError(
        f"{text!r} is no machine (machine). a count of 1 to {MOST_DEVICES:,} and a device, such as 8xH100, or nodes, devices "
        "in each and a device, such as 2x8xH100"
    )


def _words(name: str) -> list[str]:
    """ "NVIDIA A100-SXM4-80GB" -> ["a100", "sxm", "80"]."""
    words = [_FAMILIES.sub("", word) for word in re.findall("[a-z0-9]+", name.lower())]
    words = [re.sub("^([0-9]+)(?:g|gb|gib)$", r"\1", re.sub("^sxm[0-9]$", "sxm", word)) for word in words]
    return [word for word in words if word and not _NOISE.fullmatch(word)]


def _lookup(words: list[str]) -> tuple[Device | None, list[dict[str, Any]]]:
    """The device of these words, or else the variants with other memory than they say."""
    if rows := _names().get("".join(words)):
        return devices()[rows[0]["name"]], []
    for at, word in enumerate(words[1:], 1):
        if re.fullmatch("[0-9]{1,3}", word) and (rows := _names().get("".join(words[:at] + words[at + 1 :]), [])):
            fitting = [row for row in rows if row["memory_gb"] == int(word)]
            return (devices()[fitting[0]["name"]] if fitting else None), rows
    return None, []


def _is_known(name: str) -> bool:
    return _lookup(_words(name))[0] is not None


@cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "hardware.json").read_text(encoding="utf-8"))


@cache
def _names() -> dict[str, list[dict[str, Any]]]:
    """Rows of the table by each of their names, the default first."""
    names: dict[str, list[dict[str, Any]]] = {}
    for row in _table()["devices"]:
        for name in (row["name"], *row.get("names", ())):
            names.setdefault("".join(_words(name)), []).append(row)
    return names


def _device(row: Mapping[str, Any], titles: Mapping[str, Mapping[str, str]]) -> Device:
    def amount(key: str, unit: float) -> float | None:
        return row[key] * unit if key in row else None

    flops = {name: rate * 1e12 for name, rate in row.get("tflops", {}).items()}
    figures = {
        "flops": flops,
        "memory": row["memory_mib"] * 2**20 if "memory_mib" in row else row["memory_gb"] * 2**30,
        "bandwidth": row["bandwidth_gbs"] * 1e9,
        "link": amount("link_gbs", 1e9),
        "network": amount("network_gbs", 1e9),
        "watts": amount("watts", 1),
        "achievable": {name: rate * 1e12 / flops[name] for name, rate in row.get("achieved_tflops", {}).items()},
    }
    sources = {}
    for name in figures:
        if figures[name]:
            source = titles[row.get("sources", {}).get(name, row["source"])]
            sources[name] = f"{source['title']}, {source['url']}, {source['date']}"
    return Device(
        name=row["name"],
        kind=row["kind"],
        **figures,
        per_node=row.get("per_node", 8),
        sources=sources,
        note=row.get("note", ""),
    )
