"""Several processes on this machine, over gloo, and sixty-four that are pretended."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.shards import open_shards
from minga.errors import UserError
from minga.planner.comm import step_bytes
from minga.recipes import pretrain as recipe
from minga.recipes.pretrain import pretrain
from minga.runtime.metrics import read_metrics
from minga.runtime.wire import WireCounter
from minga.train.balance import LoadCounter
from minga.train.parallel import check, processes
from minga.train.step import train_step

Make = Callable[..., TrainConfig]


def _enter(rank: int, world: int, port: int, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    action(*arguments)


def run_processes(world: int, action: Callable[..., None], *arguments: Any) -> None:
    """Runs `action` in `world` processes with the environment that torchrun would set; raises what one of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_enter, (world, port, action, arguments), nprocs=world, start_method="fork")


def _steps(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run / "run.jsonl") if entry["kind"] == "step"]


def _assert_same_run(ours: Path, theirs: Path, *, tolerance: float = 1e-4) -> None:
    ours_steps, theirs_steps = _steps(ours), _steps(theirs)
    assert [step["step"] for step in ours_steps] == [step["step"] for step in theirs_steps]
    for mine, other in zip(ours_steps, theirs_steps, strict=True):
        for key in ("loss", "mtp_loss", "grad_norm", "expert_max_over_mean", "tokens", "lr"):
            expected = None if other[key] is None else pytest.approx(other[key], rel=tolerance)
            assert mine[key] == expected, (mine["step"], key)
    last = [[e for e in read_metrics(run / "run.jsonl") if e["kind"] == "eval"][-1] for run in (ours, theirs)]
    assert last[0]["bits_per_byte"] == pytest.approx(last[1]["bits_per_byte"], rel=tolerance)


def test_two_processes_train_as_one_does(make_config: Make, tmp_path: Path) -> None:
    """Two expert-parallel processes: losses, gradient norms, MTP, balance and evaluation as in one."""
    config = make_config(steps=6, mtp_from=0.5, out=str(tmp_path / "one"))
    pretrain(config)
    run_processes(2, pretrain, dataclasses.replace(config, ep=2, out=str(tmp_path / "two")))
    _assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_four_processes_train_as_one_does_for_fifty_steps(make_config: Make, tmp_path: Path) -> None:
    """2 x FSDP, 2 x EP."""
    config = make_config(steps=50, batch_size=4, out=str(tmp_path / "one"))
    pretrain(config)
    run_processes(4, pretrain, dataclasses.replace(config, dp=2, ep=2, out=str(tmp_path / "four")))
    _assert_same_run(tmp_path / "four", tmp_path / "one")


# ---------------------------------------------------------------------------------------------- bytes on the wire


def _count(config: TrainConfig, out: Path, steps: int) -> None:
    """Writes what this process sent in `steps` steps, by collective."""
    with processes(config) as parallel:
        model, optimizer = recipe._build(config, parallel)
        loader = recipe._loader(open_shards(config.data), config, parallel)
        counter = LoadCounter(model.moe_layers())
        with WireCounter() as wire:
            for _ in range(steps):
                assert not parallel.any(False)
                batches = [next(loader) for _ in range(config.accumulate)]
                rates = [0.0] * len(counter.layers)
                train_step(
                    model, batches, optimizer, config, counter, with_mtp=True, balance_rates=rates, parallel=parallel
                )
        sent = [[collective, size, num] for (collective, size), num in wire.sent.items()]
        (out / f"{parallel.rank}.json").write_text(json.dumps(sent))


def _mean_sent(folder: Path, steps: int) -> Counter[tuple[str, int]]:
    """Bytes a step, mean over the processes."""
    files = list(folder.glob("*.json"))
    sent: Counter[tuple[str, int]] = Counter()
    for file in files:
        for collective, size, num in json.loads(file.read_text()):
            sent[collective, size] += num
    return Counter({key: num / (steps * len(files)) for key, num in sent.items()})  # type: ignore[misc]


@pytest.mark.parametrize(("dp", "ep"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_counted_bytes_are_the_planned_ones(make_config: Make, tmp_path: Path, dp: int, ep: int) -> None:
    config = make_config(steps=4, batch_size=4, seq_len=64, dp=dp, ep=ep)
    config = recipe._fit_to_tokenizer(config, open_shards(config.data))
    run_processes(dp * ep, _count, config, tmp_path, 4)
    sent = _mean_sent(tmp_path, 4)
    planned = step_bytes(config, dp=dp, ep=ep, with_mtp=True)
    world = dp * ep
    collectives = {name: sum(n for (kind, _), n in sent.items() if kind == name) for name, _ in sent}
    assert collectives["all_gather"] == pytest.approx(planned.all_gather, rel=1e-6)
    assert collectives["reduce_scatter"] == pytest.approx(planned.reduce_scatter, rel=1e-6)
    assert collectives["all_reduce"] == pytest.approx(planned.all_reduce, rel=1e-6)
    assert sent["all_to_all", world] == pytest.approx(planned.matrices, rel=0.02)
    if ep > 1:
        assert sent["all_to_all", ep] == pytest.approx(planned.experts, rel=0.02)
    assert sum(sent.values()) == pytest.approx(planned.total, rel=0.02)
