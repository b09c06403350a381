"""Several processes on this machine, over gloo, and sixty-four that are pretended."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.packing import pack
from minga.data.shards import open_shards
from minga.errors import UserError
from minga.kernels import cpu
from minga.planner.comm import step_bytes
from minga.recipes import pretrain as recipe
from minga.recipes.pretrain import pretrain
from minga.runtime.metrics import read_metrics
from minga.runtime.wire import WireCounter
from minga.train.balance import LoadCounter
from minga.train.checkpoint import save_checkpoint
from minga.train.parallel import Parallel, check, processes
from minga.train.sharding import ShardedOptimizer, gather, piece, restore
from minga.train.step import train_step

Make = Callable[..., TrainConfig]
# At the default rates a made-up language of 200 words is soon known, and its tokens nearly tie between experts: there one
# process that reads a batch's rows in another order is 4e-3 away by step 21, for a choice that flips is no small change.
GENTLE: dict[str, Any] = {"lr_matrix": 0.002, "lr_embedding": 0.001, "lr_other": 0.0005}
ALL = ("loss", "mtp_loss", "grad_norm", "expert_max_over_mean", "tokens", "lr")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own float32 operations."""
    monkeypatch.setattr(cpu, "load", lambda note, **_: False)
    monkeypatch.setattr(cpu, "available", lambda: False)


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


def _assert_same_run(ours: Path, theirs: Path, *, tolerance: float = 1e-4, keys: tuple[str, ...] = ALL) -> None:
    ours_steps, theirs_steps = _steps(ours), _steps(theirs)
    assert [step["step"] for step in ours_steps] == [step["step"] for step in theirs_steps]
    for mine, other in zip(ours_steps, theirs_steps, strict=True):
        for key in keys:
            expected = None if other[key] is None else pytest.approx(other[key], rel=tolerance)
            assert mine[key] == expected, (mine["step"], key)
    last = [[e for e in read_metrics(run / "run.jsonl") if e["kind"] == "eval"][-1] for run in (ours, theirs)]
    assert last[0]["bits_per_byte"] == pytest.approx(last[1]["bits_per_byte"], rel=tolerance)


@pytest.mark.usefixtures("exact")
def test_two_processes_train_as_one_does(make_config: Make, tmp_path: Path) -> None:
    """Two expert-parallel processes: losses, gradient norms, MTP, balance and evaluation as in one."""
    config = make_config(steps=6, mtp_from=0.5, out=str(tmp_path / "one"))
    pretrain(config)
    run_processes(2, pretrain, dataclasses.replace(config, ep=2, out=str(tmp_path / "two")))
    _assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("exact")
def test_four_processes_train_as_one_does_for_fifty_steps(make_config: Make, tmp_path: Path) -> None:
    """2 x FSDP, 2 x EP."""
    config = make_config(steps=50, batch_size=4, out=str(tmp_path / "one"), **GENTLE)
    pretrain(config)
    run_processes(4, pretrain, dataclasses.replace(config, dp=2, ep=2, out=str(tmp_path / "four")))
    _assert_same_run(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_train_as_one_does_with_compiled_kernels(make_config: Make, tmp_path: Path) -> None:
    """The losses, for fifty steps, float32 throughout."""
    config = make_config(steps=50, batch_size=4, out=str(tmp_path / "one"), **GENTLE)
    pretrain(config)
    run_processes(4, pretrain, dataclasses.replace(config, dp=2, ep=2, out=str(tmp_path / "four")))
    one, four = (_steps(tmp_path / name) for name in ("one", "four"))
    print("largest relative gap", max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(four, one, strict=True)))
    _assert_same_run(tmp_path / "four", tmp_path / "one", keys=("loss", "tokens", "lr"))


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
                parallel.total(0.0)
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
    config = recipe.fit_to_tokenizer(config, open_shards(config.data))
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


@pytest.fixture
def pretended() -> Iterator[Parallel]:
    """Process 0 of 64 that do not exist: every message comes back as it was sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    mesh = init_device_mesh("cpu", (1, 8, 8), mesh_dim_names=("pp", "dp", "ep"))
    meshes = {axis: mesh[axis] for axis in ("pp", "dp", "ep")} | {"data": mesh["dp", "ep"]._flatten("data")}
    yield Parallel(0, dp=8, ep=8, meshes=meshes)
    dist.destroy_process_group()


def test_bytes_of_sixty_four_processes_are_the_planned_ones(make_config: Make, pretended: Parallel) -> None:
    """64 experts over 8 x 8. What is owned differs from process to process, so matrices are compared as a sum of all."""
    model_config = tiny().replace(n_routed_experts=64, vocab_size=384)
    config = make_config(model=model_config, batch_size=64, accumulate=1, seq_len=64)
    model, optimizer = recipe._build(config, pretended)
    assert isinstance(optimizer, ShardedOptimizer)
    rows = torch.arange(66)[None]
    counter = LoadCounter(model.moe_layers())
    batch = pack(rows, eos_id=0, num_extra=2)
    with WireCounter() as wire:
        pretended.any(False)
        pretended.total(0.0)
        rates = [0.0] * len(counter.layers)
        train_step(model, [batch], optimizer, config, counter, with_mtp=True, balance_rates=rates, parallel=pretended)
    planned = step_bytes(config, dp=8, ep=8, with_mtp=True)
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        counted = sum(num for (collective, _), num in wire.sent.items() if collective == name)
        assert counted == pytest.approx(getattr(planned, name), rel=1e-6), name
    # every process routes as this one does: on the mean an eighth stays
    routed = 3 * 4 * 64 * 2 * 64 * 4
    assert planned.experts == pytest.approx(7 / 8 * (routed + 3 * 8 * 64))
    assert wire.sent["all_to_all", 8] == pytest.approx(planned.experts, rel=0.2)
    sent = 0
    for name, owner in optimizer.owners.items():
        height, width = model.get_parameter(name).shape
        own = piece(name, height, owner, pretended)
        sent += 2 * 4 * width * (height - (own.stop - own.start))  # to the owner, and back from it
    assert sent / 64 == pytest.approx(planned.matrices, rel=0.02)


# ---------------------------------------------------------------------------------------------- the guard


def _diverges(config: TrainConfig, out: Path) -> None:
    try:
        pretrain(config)
    except UserError as error:
        (out / os.environ["RANK"]).write_text(str(error))


def test_all_processes_stop_a_run_that_diverges(make_config: Make, tmp_path: Path) -> None:
    """One line, the same on each, with the step and the place, which all looked for together."""
    config = make_config(steps=4, lr_embedding=1e20, warmup=0.0, ep=2)
    run_processes(2, _diverges, config, tmp_path)
    lines = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert lines[0] == lines[1]
    assert re.match(r"training diverged at step \d: loss .*, gradient norm .*, .*no checkpoint yet", lines[0])
    assert read_metrics(Path(config.out) / "run.jsonl")[-1]["reason"] in lines[0]


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_warmups_eight_bits_router_loss_and_guard_as_in_one_process(make_config: Make, tmp_path: Path) -> None:
    """Four of them recompute, too. Stopped after half of the steps and resumed by another number of processes, besides."""
    settings: dict[str, Any] = {"steps": 8, "batch_size": 4, "seq_len": 128, "batch_warmup": 0.5, "seq_warmup": 0.5}
    settings |= {"router_z_loss": 1e-3, "optimizer_bits": 8, "spike_skip": 30.0, "mtp_from": 0.5, "workers": 1}
    config = make_config(out=str(tmp_path / "one"), checkpoint_every=4, **settings)
    pretrain(config)
    run_processes(4, pretrain, dataclasses.replace(config, dp=2, ep=2, recompute=True, out=str(tmp_path / "four")))
    _assert_same_run(tmp_path / "four", tmp_path / "one")
    shutil.copytree(tmp_path / "four", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-000008")
    run_processes(2, pretrain, dataclasses.replace(config, out=str(tmp_path / "two")))
    resumed, whole = _steps(tmp_path / "two")[8:], _steps(tmp_path / "one")[4:]
    assert [step["step"] for step in resumed] == [5, 6, 7, 8]
    for mine, other in zip(resumed, whole, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


# ---------------------------------------------------------------------------------------------- pipeline


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.usefixtures("exact")
def test_a_pipeline_trains_as_one_process_does(make_config: Make, tmp_path: Path, replicas: int) -> None:
    """Zero-bubble schedule, MTP switched on midway, the routers' losses; and with two replicas of every stage."""
    sizes: dict[str, Any] = {"steps": 6, "batch_size": 2, "accumulate": 4, "mtp_from": 0.5, "sequence_loss": 0.01}
    sizes["router_z_loss"] = 0.001
    config = make_config(out=str(tmp_path / "one"), checkpoint_every=3, **sizes)
    pretrain(config)
    piped = dataclasses.replace(config, pp=2, recompute=replicas == 2, out=str(tmp_path / "piped"))
    run_processes(2 * replicas, pretrain, piped)
    _assert_same_run(tmp_path / "piped", tmp_path / "one")


# ---------------------------------------------------------------------------------------------- elastic


def _equal_weights(ours: Path, theirs: Path, *, tolerance: float) -> None:
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        mine, other = load_file(ours / file), load_file(theirs / file)
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], atol=tolerance, rtol=tolerance, msg=name)


def _copy(config: TrainConfig, source: Path, target: Path) -> None:
    """Loads a checkpoint into these processes and saves it again."""
    with processes(config) as parallel:
        model, optimizer = recipe._build(config, parallel)
        state = restore(source, model, optimizer, parallel)
        whole = gather(model, optimizer, parallel)
        if whole is not None:
            save_checkpoint(target, state, *whole, open_shards(config.data).tokenizer, keep=1)


def test_a_checkpoint_is_the_same_from_any_number_of_processes(make_config: Make, tmp_path: Path) -> None:
    """One process writes it, two (expert parallel) read and write it, bit for bit."""
    result = pretrain(make_config(steps=3, mtp_from=0.0))
    config = recipe.fit_to_tokenizer(make_config(steps=3, ep=2), open_shards(make_config().data))
    copies = tmp_path / "copies"
    copies.mkdir()
    run_processes(2, _copy, config, result.model, copies)
    _equal_weights(copies / "checkpoint-000003", result.model, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "world"), [({"dp": 2, "ep": 2}, 4), ({"dp": 3}, 3), ({"pp": 2}, 2)])
def test_every_division_reads_and_writes_the_same_checkpoint(
    make_config: Make, tmp_path: Path, sizes: dict[str, int], world: int
) -> None:
    result = pretrain(make_config(steps=3, mtp_from=0.0, batch_size=12, accumulate=3))
    config = make_config(steps=3, batch_size=12, accumulate=3, **sizes)
    copies = tmp_path / "copies"
    copies.mkdir()
    run_processes(world, _copy, recipe.fit_to_tokenizer(config, open_shards(config.data)), result.model, copies)
    _equal_weights(copies / "checkpoint-000003", result.model, tolerance=0.0)


def _torchrun(config: TrainConfig, num_processes: int, *flags: str) -> subprocess.Popen[bytes]:
    settings = {"batch_size": 4, "accumulate": 2, "seq_len": 32, "eval_every": 0, "checkpoint_every": 4, "ep": 2}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        *flags,
    ]
    command += ["-m", "minga", "train", "--data", config.data, "--out", config.out, "--preset", "tiny"]
    command += ["--steps", str(config.steps), *(f"--set={key}={value}" for key, value in settings.items())]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def _wait_for(happened: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def _workers(launcher: int) -> list[int]:
    """Processes that torchrun has started, lowest rank first."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"minga" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_process_costs_no_more_than_the_steps_since_the_checkpoint(make_config: Make, tmp_path: Path) -> None:
    """kill -9 one of four: torchrun starts them again and the run goes on; then two finish what four began."""
    whole = make_config(steps=24, batch_size=4, checkpoint_every=4, out=str(tmp_path / "whole"))
    pretrain(whole)
    config = dataclasses.replace(whole, out=str(tmp_path / "killed"))
    run = Path(config.out)

    def last_step() -> int:
        return max((step["step"] for step in _steps(run)), default=0) if (run / "run.jsonl").exists() else 0

    began = time.monotonic()
    launcher = _torchrun(config, 4, "--max-restarts=1")
    try:
        _wait_for(lambda: last_step() >= 1)
        to_start = time.monotonic() - began
        _wait_for(lambda: last_step() >= 6)
        os.kill(_workers(launcher.pid)[2], signal.SIGKILL)
        began = time.monotonic()
        starts = _wait_for(lambda: [e for e in read_metrics(run / "run.jsonl") if e["kind"] == "start"][1:])
        resumed = starts[0]["step"]
        assert resumed >= 4
        _wait_for(lambda: len([s for s in _steps(run) if s["step"] == resumed + 1]) > 0 and last_step() > resumed)
        seconds = time.monotonic() - began
        _wait_for(lambda: last_step() >= resumed + 3)
        launcher.send_signal(signal.SIGTERM)  # all of them stop, with a checkpoint
        launcher.wait(120)
    finally:
        launcher.kill()
    print(f"first step after {to_start:.1f} s; training went on {seconds:.1f} s after the kill", file=sys.stderr)
    assert seconds < max(30, 2 * to_start)  # on a busy machine a start alone may take that long
    assert _torchrun(config, 2).wait(120) == 0
    assert last_step() == 24
    losses = {step["step"]: step["loss"] for step in _steps(run)}  # a step taken again counts the second time
    for step in _steps(Path(whole.out)):
        assert losses[step["step"]] == pytest.approx(step["loss"], rel=1e-4), step["step"]  # four, then two processes


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"dp": 2, "ep": 2}, 3, r"dp x ep x pp asks for 2 x 2 x 1 = 4 processes and there are 3 .*torchrun"),
        ({"ep": 2}, 3, r"a multiple of 2 x 1 = 2 processes and there are 3"),
        ({"ep": 2}, 1, r"there are 1"),
        ({"ep": 3, "batch_size": 6}, 3, r"8 experts a layer do not divide among ep 3"),
        ({"batch_size": 6}, 4, r"batch_size 6 does not divide by dp 4 x ep 1"),
        ({"pp": 3, "batch_size": 6}, 3, r"pp 3 cuts a model into 6 stages and this one has 3 layers .* at most pp 2"),
        ({"pp": 2, "accumulate": 2}, 2, r"accumulate 2 micro-batches do not fill a pipeline of pp 2 .* 3 or more"),
        ({"pp": 2, "ep": 2, "accumulate": 4}, 4, r"pp 2 and ep 2 do not go together"),
        ({"pp": 2, "accumulate": 4, "batch_warmup": 0.5}, 2, r"batch_warmup 0.5 and pp 2 do not go together"),
        (
            {"pp": 2, "accumulate": 4, "seq_len": 64, "seq_warmup": 0.5},
            2,
            r"seq_warmup 0.5 and pp 2 do not go together",
        ),
        ({"ema_decay": 0.9}, 2, r"ema_decay 0.9 is for one process and there are 2"),
        (
            {"weight_dtype": "bf16"},
            2,
            r"weight_dtype bf16 is for one process and there are 2 .* set weight_dtype to float32",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    make_config: Make, changes: dict[str, int], world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(make_config(**changes), world)
    assert "\n" not in str(caught.value)


def test_sizes_follow_from_what_is_there(make_config: Make) -> None:
    assert check(make_config(), 1) == (1, 1, 1)
    assert check(make_config(batch_size=4), 4) == (4, 1, 1)
    assert check(make_config(batch_size=4, ep=2), 4) == (2, 2, 1)
    with pytest.raises(UserError, match="ep is 0"):
        make_config(ep=0)


def test_a_message_of_the_first_process_is_everyones_error() -> None:
    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        Parallel().on_main(fail)
    run_processes(2, _fails_together)


def _fails_together() -> None:
    with processes(TrainConfig(steps=1, batch_size=2)) as parallel:
        seen: list[int] = []

        def fail() -> None:
            seen.append(parallel.rank)
            raise UserError("only the first looked")

        with pytest.raises(UserError, match="only the first looked"):
            parallel.on_main(fail)
        assert seen == [0] * parallel.is_main
        assert parallel.any(parallel.rank == 1)
        assert not parallel.any(False)
