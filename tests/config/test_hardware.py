"""pytest tests/config/test_hardware.py"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minga.config.hardware
from minga.config.hardware import DEVICES, MOST_DEVICES, Machine, devices, find_device, machine
from minga.errors import UserError

TABLE = json.loads(Path(minga.config.hardware.__file__).with_name("hardware.json").read_text(encoding="utf-8"))
ROWS = {row["name"]: row for row in TABLE["devices"]}
GEFORCE = tuple(name for name in ROWS if name.startswith(("RTX-20", "RTX-30", "RTX-40", "RTX-50")))
OTHER_MAKERS = ("MI", "RX-", "Arc", "Gaudi", "TPU", "Ascend")
NVIDIA = [name for name, row in ROWS.items() if row["kind"] != "apple" and not name.startswith(OTHER_MAKERS)]


def half_rate(flops: dict[str, float]) -> float:
    return flops.get("bf16", flops.get("fp16", 0.0))


def test_published_figures() -> None:
    h100, h800, a100 = find_device("H100"), find_device("H800"), find_device("A100")
    assert h100.flops["bf16"] == pytest.approx(989e12, rel=1e-3)
    assert h100.rate("fp8") == pytest.approx(1979e12, rel=1e-3)
    assert (h100.bandwidth, h100.link, h100.network, h100.watts) == (3.35e12, 450e9, 400e9, 700)
    assert h800.flops == h100.flops and h800.link == 200e9
    assert a100.flops["bf16"] == 312e12 and a100.network == 200e9 and "fp8" not in a100.flops
    assert a100.achievable["bf16"] == pytest.approx(0.869, abs=5e-4)  # ml-engineering: 86.9 %
    assert find_device("RTX 3090").flops["bf16"] == pytest.approx(71.2e12, rel=1e-3)
    assert find_device("RTX 4090").flops["bf16"] == pytest.approx(165.2e12, rel=1e-3)
    assert find_device("RTX 5090").flops["bf16"] == pytest.approx(209.5e12, rel=1e-3)
    assert find_device("H20").flops["bf16"] == 148e12
    assert find_device("MI300X").memory == 192 * 2**30


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "chip" in row])
def test_rates_follow_from_the_chip(name: str) -> None:
    chip = ROWS[name]["chip"]
    expected = chip["multiprocessors"] * chip["boost_mhz"] * chip["operations_a_clock"] / 1e6
    assert half_rate(ROWS[name]["tflops"]) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("name", NVIDIA)
def test_no_rate_is_the_doubled_one_of_sparsity(name: str) -> None:
    flops = ROWS[name].get("tflops", {})
    if "fp8" in flops:
        assert flops["fp8"] / half_rate(flops) == pytest.approx(2, rel=0.02)
    if "int8" in flops:
        assert flops["int8"] / half_rate(flops) == pytest.approx(4 if name in GEFORCE else 2, rel=0.02)
    if {"bf16", "fp16"} <= flops.keys():
        assert flops["bf16"] == flops["fp16"]


def test_figures_are_plausible_and_have_dated_sources() -> None:
    used = set()
    for name, row in ROWS.items():
        device = DEVICES[name]
        amounts = [device.memory, device.bandwidth, device.link, device.network, device.watts, *device.flops.values()]
        assert all(amount is None or amount > 0 for amount in amounts)
        assert all(0.4 < share < 1 for share in device.achievable.values())
        known = {key for key in ("link", "network", "watts") if getattr(device, key) is not None}
        known |= {key for key in ("flops", "achievable") if getattr(device, key)}
        assert set(device.sources) == known | {"memory", "bandwidth"}
        assert set(row.get("sources", {})) <= set(device.sources), name
        used |= {row["source"], *row.get("sources", {}).values()}
    assert used == set(TABLE["sources"])
    for source in TABLE["sources"].values():
        assert source["url"].startswith("https://") and date.fromisoformat((source["date"] + "-01-01")[:10])


def test_every_name_finds_its_device() -> None:
    assert len(devices()) == len(TABLE["devices"])
    for name, row in ROWS.items():
        assert find_device(name).name == name
        for other in row.get("names", ()):
            sized = other if "GB" in other else f"{other} {row['memory_gb']}GB"
            assert find_device(sized).name == name


@pytest.mark.parametrize(
    "text, name",
    [
        ("a100", "A100-SXM-80GB"),
        ("A100-SXM4-80GB", "A100-SXM-80GB"),
        ("A100-80", "A100-SXM-80GB"),
        ("A100_80G", "A100-SXM-80GB"),
        ("a100 40 GB", "A100-SXM-40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("h100", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("GB200 NVL72", "GB200"),
        ("Tesla V100-SXM2-32GB", "V100-SXM-32GB"),
        ("RTX 4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3060", "RTX-3060-12GB"),
        ("RTX4060Ti", "RTX-4060-Ti-16GB"),
        ("4060 ti 8", "RTX-4060-Ti-8GB"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("Quadro RTX 6000", "Quadro-RTX-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("mi300x", "MI300X"),
        ("AMD Radeon RX 7900 XTX", "RX-7900-XTX"),
        ("TPUv4", "TPU-v4"),
        ("Gaudi2", "Gaudi-2"),
        ("Apple M2 Max", "M2-Max-32GB"),
        ("m2 max 64GB", "M2-Max-64GB"),
        ("Ascend 910B", "Ascend-910B"),
    ],
)
def test_names_that_people_and_drivers_use(text: str, name: str) -> None:
    assert find_device(text).name == name


@pytest.mark.parametrize(
    "text, message",
    [
        ("H1000", "nearest: H100-SXM"),
        ("RTX 4091", "nearest: RTX-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "not in the table"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "not in the table"),
        ("A100 60GB", "it has 80 GB or 40 GB"),
        ("", "such as H100"),
        ("🦙", "such as H100"),
        ("x" * 10**6, "such as H100"),
    ],
)
def test_unknown_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_device(text)


@pytest.mark.parametrize(
    "text, name, count, per_node, network",
    [
        ("H100", "H100-SXM", 1, 1, None),
        ("4xH100", "H100-SXM", 4, 4, None),
        ("8 x H100", "H100-SXM", 8, 8, None),
        ("8*H100", "H100-SXM", 8, 8, None),
        ("8×H100", "H100-SXM", 8, 8, None),
        ("H100x8", "H100-SXM", 8, 8, None),
        ("2x8xH100", "H100-SXM", 16, 8, 400e9),
        ("4x4xH100", "H100-SXM", 16, 4, 400e9),
        ("2048xH800", "H800", 2048, 8, 400e9),
        ("16xA100-40GB", "A100-SXM-40GB", 16, 8, 200e9),
        ("4090", "RTX-4090", 1, 1, None),
        ("4x4090", "RTX-4090", 4, 4, None),
        ("4090x4", "RTX-4090", 4, 4, None),
        ("2 x RX 7900 XTX", "RX-7900-XTX", 2, 2, None),
        ("RX 7900 XTX", "RX-7900-XTX", 1, 1, None),
        ("8xMI300X", "MI300X", 8, 8, None),
        ("MI300Xx8", "MI300X", 8, 8, None),
        ("144xGB200", "GB200", 144, 72, 3600e9),
        ("2xM2 Max", "M2-Max-32GB", 2, 1, None),
    ],
)
def test_machines(text: str, name: str, count: int, per_node: int, network: float | None) -> None:
    assert machine(text) == Machine(DEVICES[name], count, per_node, network)


@pytest.mark.parametrize(
    "text",
    [
        *("0xH100", "-8xH100", "1.5xH100", "1e6xH100", "infxH100", "9999999xH100", f"{10**30}xH100", "1000x1001xH100"),
        *("0x8xH100", "8x0xH100", "H100x0", "", "  ", "8x", "x", "xH100", "8 H100", "8xH1000", "2x2x2xH100", "H100x"),
        *("4x3090+2x4090", "8xH100@8", "8" * 10**5, "8x" * 10**5, "x" * 10**5, " " * 10**5 + "x", "٨xH100"),
    ],
)
def test_machines_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="(machine)") as error:
        machine(text)
    assert "\n" not in str(error.value)


@given(st.integers(1, MOST_DEVICES), st.sampled_from(sorted(ROWS)))
def test_a_count_and_a_device_in_either_order(count: int, name: str) -> None:
    parsed = machine(f"{count}x{name}")
    assert parsed == machine(f"{name} x {count}")
    assert parsed.device is DEVICES[name] and parsed.count == count
    assert parsed.per_node == min(count, parsed.device.per_node)
    assert (parsed.nodes - 1) * parsed.per_node < count <= parsed.nodes * parsed.per_node


@given(st.text(max_size=30))
def test_any_text_is_a_machine_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        assert machine(text).count >= 1


def test_rates_fall_back_to_what_the_device_has() -> None:
    assert find_device("A100").rate("fp8") == find_device("A100").rate("bf16") == 312e12
    assert find_device("T4").rate("bf16") == find_device("T4").flops["fp16"]
    assert find_device("V100").rate("int8") == find_device("V100").flops["fp16"]
    assert find_device("GTX 1080 Ti").rate("fp8") == find_device("GTX 1080 Ti").flops["float32"]
    for unknown in ("M2 Max", "H100 NVL"):
        with pytest.raises(UserError, match="calibrate"):
            find_device(unknown).rate("bf16")


def test_nothing_is_read_before_it_is_asked_for() -> None:
    code = "import minga.config.hardware as h; assert not h._table.cache_info().misses; assert len(h.DEVICES) > 100"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
