"""Each benchmark runs, and ends with the one line that programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minga.config import TrainConfig
from minga.recipes.pretrain import pretrain


def test_speculation(make_config: Callable[..., TrainConfig]) -> None:
    run = pretrain(make_config(steps=2)).run
    script = Path(__file__).parents[1] / "benchmarks" / "speculation.py"
    command = [sys.executable, str(script), str(run), "--runs", "1", "--tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document) == {"bench", "machine", "versions", "commit", "rows"}
    (row,) = document["rows"]
    assert set(row) == {"id", "ours", "theirs", "peer", "unit", "ratio", "runs", "spread"}
    assert row["runs"] == 4
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
