"""This machine as the planner sees it: what it was measured to do (`minga plan --calibrate`), else what can be found out at once.

    machine, coefficients = this_machine()        # coefficients: None without a calibration

No torch: `minga plan` answers in half a second.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minga.config.hardware import Device, Machine, find_device
from minga.errors import UserError
from minga.planner.time import BOUNDS, Coefficients
from minga.runtime import machine as runtime
from minga.runtime.files import write_whole

_GEMM, _COPY, _REPEATS = 768, 2**26, 4  # a tenth of a second in all


def calibration_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home) / "minga" / "machine.json"


def this_machine() -> tuple[Machine, Coefficients | None]:
    """Its card, if the table has it, else its processors."""
    card, name = runtime.nvidia_card(), runtime.cpu()[0] or ""
    known = card or (name if name.startswith("Apple") else None)
    try:
        if known is not None:
            return Machine(find_device(known)), None
    except UserError:  # not in the table
        pass
    found, coefficients = this_processor()
    if card is None:
        return found, coefficients
    note = f"{card:.60} is not in the table of devices: this is of the processors alone. {found.device.note}"
    return replace(found, device=replace(found.device, note=note.rstrip())), coefficients


def this_processor() -> tuple[Machine, Coefficients | None]:
    """What `minga train` and `minga serve` run on: the calibration, if there is one of this processor, else its cores timed
    briefly.
    """
    name, cores = runtime.cpu()[0] or "CPU", runtime.cores()
    return _stored(name, cores) or (Machine(probe(name, cores)), None)


def probe(name: str, cores: int) -> Device:
    """The processors of this machine, by one product and one copy with numpy."""
    import numpy as np

    try:
        a = np.ones((_GEMM, _GEMM), np.float32)
        flops = 2 * _GEMM**3 / _best(lambda: a @ a)
        source, target = np.zeros(_COPY, np.uint8), np.zeros(_COPY, np.uint8)
        bandwidth = 2 * _COPY / _best(lambda: np.copyto(target, source))
    except MemoryError:
        raise UserError(
            f"{2 * _COPY >> 20} MiB to measure this machine are not free (machine). close other programs, or give --machine"
        ) from None
    return cpu_device(name, cores, {"float32": flops}, bandwidth, "one product and one copy by numpy, just now")


def cpu_device(name: str, cores: int, flops: Mapping[str, float], bandwidth: float, source: str) -> Device:
    sources, simd = dict.fromkeys(("flops", "bandwidth"), source), runtime.cpu()[1]
    limit = runtime.cpu_power_limit()
    share = min(1.0, cores / (os.cpu_count() or cores))
    return Device(
        name=f"{name}, {cores} cores" if cores > 1 else name,
        kind="cpu",
        flops=flops,
        memory=float(runtime.memory()[0] or 0),
        bandwidth=bandwidth,
        per_node=1,
        watts=None if limit is None else limit * share,
        achievable=dict.fromkeys(flops, 1.0),  # they were reached
        sources=sources,
        note=", ".join(simd) if simd else "",
    )


def check_writable() -> Path:
    """Where a calibration goes. Raises `UserError` where it could not: to be known before two minutes are spent."""
    path = calibration_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} (--calibrate). check its permissions, or set XDG_CONFIG_HOME"
        ) from None
    return path


def store(name: str, cores: int, device: Device, coefficients: Coefficients) -> Path:
    """Keeps a calibration for `this_processor`."""
    path = check_writable()
    document = {"name": name, "cores": cores, "date": time.strftime("%Y-%m-%d")}
    text = json.dumps({**document, "device": asdict(device), "coefficients": asdict(coefficients)}, indent=1)
    write_whole(path, text + "\n")
    return path


def _stored(name: str, cores: int) -> tuple[Machine, Coefficients] | None:
    """What `store` wrote, if it was measured on such a processor with so many cores."""
    path = calibration_path()
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (found["name"], found["cores"]) != (name, cores):
            return None
        known = found["coefficients"]
        assert known["terms"].keys() == BOUNDS.keys()
        known |= {"dense": tuple(known["dense"]), "sparse": tuple(known["sparse"])}
        return Machine(Device(**found["device"])), Coefficients(**known)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} is no calibration of this version: {error!r}. measure again: minga plan --calibrate"
        ) from None


def _best(work: Any) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
