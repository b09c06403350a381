"""Minga: plan, train, adapt and serve DeepSeek-class language models on the machines you already have.

    import minga

    llm = minga.LLM("runs/shakespeare")
    print(llm.generate("To be, or", minga.SamplingParams(max_tokens=64))[0].text)

    model = minga.load("SmolLM2.gguf")      # a torch module
    minga.save(model, "folder")             # in the public format

    print(minga.plan("v3", "2048xH800", tokens=14.8e12, precision="fp8").money)

The names below come from their modules at first use (PEP 562): `import minga` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minga.config import ModelConfig
    from minga.engine.llm import LLM
    from minga.engine.sampler import SamplingParams
    from minga.errors import UserError
    from minga.planner.plan import plan
    from minga.store import load, save

    __version__: str

__all__ = ["LLM", "ModelConfig", "SamplingParams", "UserError", "__version__", "load", "plan", "save"]

_HOMES = {
    "LLM": "minga.engine.llm",
    "ModelConfig": "minga.config",
    "SamplingParams": "minga.engine.sampler",
    "UserError": "minga.errors",
    "load": "minga.store",
    "plan": "minga.planner.plan",
    "save": "minga.store",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The version in pyproject.toml: as installed, else of the checkout that this file lies in."""
    import tomllib
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("minga")
    except metadata.PackageNotFoundError:
        text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return str(tomllib.loads(text)["project"]["version"])
