"""Every test of the engine runs twice: over the compiled forward pass, and over torch where there is no compiler."""

from __future__ import annotations

import pytest

from minga.engine import compiled
from minga.kernels import cpu


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def forward_pass(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(compiled.cpu, "load", lambda note, **_: False)
    elif not cpu.load():
        pytest.skip("there is no C++ compiler")
    return str(request.param)
