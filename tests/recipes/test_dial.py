"""The calibration really times steps, and the planner's bytes are those that a step takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minga.data.shards import open_shards
from minga.planner.dial import Budget, Corpus, MachineSpeed, choose
from minga.recipes import dial
from minga.recipes.dial import calibrate, plan_run
from minga.recipes.pretrain import Pace

MEASURE = """
import resource, sys
from minga.config import TrainConfig
from minga.data.shards import open_shards
from minga.planner.dial import architecture
from minga.recipes.pretrain import measure
model = architecture(192, 384)
config = TrainConfig(data=sys.argv[1], model=model, steps=1, batch_size=8, seq_len=256, mtp_from=0.0)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
measure(config, open_shards(sys.argv[1]), seconds=0.0)
print(peak() - before)
"""


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "PROBE_WIDTHS", (64, 128))


def test_calibration_times_both_probes(shards: Path, small_probes: None) -> None:
    speed = calibrate(open_shards(shards), seconds=600.0 / 3600)
    assert speed.probes[0][0] == 64
    assert all(1e6 < rate < 1e15 for _, rate in speed.probes)
    assert speed.memory is None or speed.memory > 10**8


def test_a_slow_machine_is_probed_once(shards: Path, small_probes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def measure(config, shards, *, seconds):
        timed.append(config.model.hidden_size)
        return Pace(step=seconds, evaluated_token=0.0)

    monkeypatch.setattr(dial, "measure", measure)
    assert len(calibrate(open_shards(shards), seconds=10.0).probes) == 1
    assert timed == [64]


def test_the_corpus_is_described_to_the_planner(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = MachineSpeed(((128, 3e9),), memory=None)
    monkeypatch.setattr(dial, "calibrate", lambda shards, seconds: speed)
    made = plan_run(open_shards(shards), tokens=10**6)
    train = open_shards(shards).manifest.splits["train"]
    corpus = Corpus(train.num_tokens, 384, train.num_tokens / train.num_documents)  # 350 pieces, rounded up to 64
    assert list(made.choices) == choose(Budget(tokens=10**6), speed, corpus)
    assert made.seconds >= 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
def test_the_planned_bytes_are_those_of_a_step(shards: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(shards)], capture_output=True, text=True, check=True)
    corpus = Corpus(10**8, 384, 1e4)
    budget = Budget(tokens=500_000, size=2_000_000)  # makes a batch of 8 x 256 and this width
    (planned,) = [c.value for c in choose(budget, MachineSpeed(((128, 1e9),)), corpus) if c.name == "memory"]
    assert 0.5 < int(done.stdout) / (float(planned.split()[0]) * 1e9) < 1.05
