"""Nothing lost: a training run that is killed, interrupted, robbed of its disk or damaged, at every moment.

All runs here are the same toy run of `STEPS` steps that saves after each, so that whatever a crashed and resumed run
leaves can be compared, byte for byte and step for step, with what the uninterrupted one left. Processes are forked
from `tests/crash_server.py`, which has imported torch once: a life of a run costs tenths of a second.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minga
from minga.checkpoint.durable import CHECKSUMS, find_problems
from minga.data.shards import build_shards
from minga.runtime.metrics import read_metrics
from minga.store import checkpoint_steps, latest_checkpoint

STEPS = 12
SETTINGS = {"batch_size": 1, "accumulate": 2, "seq_len": 64, "eval_every": 0, "checkpoint_every": 1, "mtp_from": 0.5}
# every part of the state that a step reads: batch and length warm-up, mean weights, guard, read-ahead
SETTINGS |= {"batch_warmup": 0.5, "ema_decay": 0.9, "spike_skip": 30, "router_z_loss": 0.001, "workers": 1}
MODEL = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}


class Server:
    def __init__(self) -> None:
        script = Path(__file__).parents[1] / "crash_server.py"
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: list[str], output: Path, **limits: int) -> int:
        pid: int = self.ask(run=arguments, output=str(output), **limits)["pid"]
        return pid

    def wait(self, pid: int) -> int:
        """Exit code, or minus the signal that ended it."""
        code: int = self.ask(wait=pid)["code"]
        return code

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little text, and hardly any held out: a life is to be training, not evaluation."""
    folder = tmp_path_factory.mktemp("text")
    dice = random.Random(0)
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(dice.choices(["kalo", "miru", "té", "nka"], k=200)))
    build_shards([folder], folder / "shards", vocab_size=270, val_fraction=0.03)
    return folder / "shards"


@pytest.fixture(scope="module")
def arguments(shards: Path) -> Callable[..., list[str]]:
    def arguments(out: Path, **changes: object) -> list[str]:
        settings = SETTINGS | {f"model.{key}": value for key, value in MODEL.items()} | changes
        flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return ["train", "--data", str(shards), "--out", str(out), "--preset", "tiny", "--steps", str(STEPS), *flags]

    return arguments


@pytest.fixture(scope="module")
def whole(server: Server, arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, with all of its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert server.wait(server.start(arguments(run, keep_checkpoints=STEPS), run.parent / "output")) == 0
    assert len(list(run.glob("checkpoint-*"))) == STEPS
    return run


@pytest.fixture
def live(server: Server, arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """(run, life, limits) -> exit code and lines of output of a life of `run`; `life(pid)` may do to it what it likes."""

    def live(run: Path, life: Callable[[int], object] = lambda pid: None, **limits: int) -> tuple[int, list[str]]:
        pid = server.start(arguments(run), tmp_path / "output", **limits)
        life(pid)
        code = server.wait(pid)
        return code, (tmp_path / "output").read_text().splitlines()

    return live


def contents(checkpoint: Path) -> dict[str, object]:
    """All that a resumed step reads: every file but the list of checksums, and of the state all but the clock."""
    files: dict[str, object] = {
        file.relative_to(checkpoint).as_posix(): file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()
    }
    del files[CHECKSUMS]
    state = json.loads((checkpoint / "training_state" / "state.json").read_bytes())
    del state["seconds"]
    return files | {"training_state/state.json": state}


def check(run: Path, whole: Path) -> int:
    """The newest checkpoint loads, and is that of the uninterrupted run bit for bit. Returns its step, 0 without one."""
    checkpoint = latest_checkpoint(run) if run.is_dir() else None
    if checkpoint is None:
        return 0
    minga.load(run)
    minga.load(checkpoint / "ema")
    assert contents(checkpoint) == contents(whole / checkpoint.name)
    return int(checkpoint.name[-6:])


def check_end(run: Path, whole: Path) -> None:
    """The run is finished, and every step that it tells of, some of them twice, went as in the uninterrupted run."""
    assert check(run, whole) == STEPS
    told = {entry["step"]: entry for entry in read_metrics(whole / "run.jsonl") if entry["kind"] == "step"}
    steps = [entry for entry in read_metrics(run / "run.jsonl") if entry["kind"] == "step"]
    assert {entry["step"] for entry in steps} == set(range(1, STEPS + 1))
    for entry in steps:
        for key in ("loss", "mtp_loss", "grad_norm", "lr", "tokens"):
            assert entry[key] == told[entry["step"]][key], (entry["step"], key)
    assert (run / "report.html").is_file()


# ---------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("num_kills", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_random_instants(
    live: Callable[..., tuple[int, list[str]]], whole: Path, tmp_path: Path, num_kills: int
) -> None:
    """kill -9 (what the system's memory killer sends too). A run that comes to its end is followed by a new one."""
    dice = random.Random(num_kills)
    told = read_metrics(whole / "run.jsonl")
    seconds = (whole / "report.html").stat().st_mtime - told[0]["time"]  # of a life, on this machine, as busy as it is
    lives: list[int] = []
    kills = finished = reached = hit_a_save = 0
    while kills < num_kills:
        run = tmp_path / f"run-{finished}"

        def kill(pid: int, run: Path = run) -> None:
            if dice.random() < 0.5:
                time.sleep(dice.uniform(0.0, 0.7 * seconds))
            else:  # a save is a small part of a life: half of the kills come from the beginning of one on
                wait_for(lambda: is_saving(run, pid) or (run / "report.html").is_file())
                time.sleep(dice.uniform(0.0, 0.1 * seconds))
            os.kill(pid, signal.SIGKILL)
            lives.append(pid)

        code, lines = live(run, kill)
        assert code in (0, -signal.SIGKILL), lines
        kills += code != 0
        hit_a_save += is_saving(run, lives[-1])
        step = check(run, whole)
        assert step >= reached, "a checkpoint was lost"
        reached = step
        if step == STEPS:
            assert live(run)[0] == 0
            check_end(run, whole)
            shutil.rmtree(run)
            finished, reached = finished + 1, 0
    run = tmp_path / f"run-{finished}"
    assert live(run)[0] == 0
    check_end(run, whole)
    assert hit_a_save > num_kills / 10, "the kills hardly ever hit a save"


def is_saving(run: Path, pid: int) -> bool:
    return run.is_dir() and any(entry.name.endswith(f".partial-{pid}") for entry in run.iterdir())


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_each_system_call_of_a_save(
    server: Server, shards: Path, tmp_path: Path, every: int, replaces: bool
) -> None:
    """Before the k-th system call of a save, for each k: what was there loads, or the new one does; never neither."""
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    request: dict[str, Any] = {"data": str(shards), "keep": 2}
    forever = 10**9
    for step in (1, 2):
        assert not server.ask(save=str(start), step=step, mark="old", kill_at=forever, **request)["killed"]
    step = 2 if replaces else 3  # a new checkpoint, which also removes the oldest; or one that was there
    marks, kill_at = [], 1
    while True:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)
        killed = server.ask(save=str(run), step=step, mark="new", kill_at=kill_at, **request)["killed"]
        checkpoint = latest_checkpoint(run)
        assert checkpoint is not None, f"nothing loads after a kill at system call {kill_at}"
        minga.load(run)
        marks.append(json.loads((checkpoint / "training_state" / "state.json").read_bytes())["loader"]["mark"])
        assert checkpoint.name == f"checkpoint-{step if marks[-1] == 'new' else 2:06d}"
        if kill_at % 10 == 1:  # and the next save removes what the dead one left
            assert not server.ask(save=str(run), step=step, mark="newer", kill_at=forever, **request)["killed"]
            names = sorted(entry.name for entry in run.iterdir())
            assert names == [f"checkpoint-{kept:06d}" for kept in ((1, 2) if replaces else (2, 3))]
            assert not any(find_problems(run / name) for name in names)
        if not killed:
            break
        kill_at += every
    assert marks == sorted(marks, reverse=True)  # "old", then "new" from one instant on
    assert {"old", "new"} == set(marks) and len(marks) > 300 / every


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_good_order(
    live: Callable[..., tuple[int, list[str]]], whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    for attempt in range(5):  # on a busy machine the run may be over before the signal comes
        run = tmp_path / f"run-{attempt}"

        def stop(pid: int, run: Path = run) -> None:
            wait_for(lambda: has_saved(run))
            os.kill(pid, number)

        code, lines = live(run, stop)
        assert code == 0
        if "everything is saved" in lines[-1]:
            break
    assert 2 <= check(run, whole) < STEPS
    assert live(run)[0] == 0
    check_end(run, whole)


def test_a_second_ctrl_c_ends_at_once(live: Callable[..., tuple[int, list[str]]], whole: Path, tmp_path: Path) -> None:
    """Wherever it finds the run: in a step, in a save, in what follows. The way back is the same command."""
    dice = random.Random(0)
    codes = []
    for number in range(12):  # until the second one has found a run still at work
        if number >= 4 and {130, -signal.SIGINT} & set(codes):
            break
        run = tmp_path / f"run-{number}"

        def stop_twice(pid: int, run: Path = run) -> None:
            wait_for(lambda: has_saved(run))
            for _ in range(2):
                os.kill(pid, signal.SIGINT)
                time.sleep(dice.uniform(0.002, 0.03))

        code, lines = live(run, stop_twice)
        codes.append(code)
        # Once all is saved and said, Python itself may still be interrupted, or killed, while it tidies up.
        said = next((n for n, line in enumerate(lines) if line.startswith("stopped at step")), len(lines))
        assert code in (0, 130) or (code == -signal.SIGINT and said < len(lines)), lines
        assert not any("Traceback" in line for line in lines[:said]), lines
        assert check(run, whole) >= 2
    assert {130, -signal.SIGINT} & set(codes)
    assert live(run)[0] == 0
    check_end(run, whole)


def has_saved(run: Path) -> bool:
    """Whether the second step is saved."""
    return run.is_dir() and max(checkpoint_steps(run), default=0) >= 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------- damage


def test_one_flipped_byte_in_each_file(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint before is used instead, and a line says so."""
    run = tmp_path / "run"
    for step in (3, 4):
        shutil.copytree(whole / f"checkpoint-{step:06d}", run / f"checkpoint-{step:06d}")
    before = contents(run / "checkpoint-000003")
    dice = random.Random(0)
    files = [file for file in (run / "checkpoint-000004").rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        good = file.read_bytes()
        for offset in {0, len(good) // 2, len(good) - 1, *(dice.randrange(len(good)) for _ in range(4))}:
            bad = bytearray(good)
            bad[offset] ^= 1 << dice.randrange(8)
            if file.name == CHECKSUMS and same_json(good, bytes(bad)):
                continue  # white space for white space
            file.write_bytes(bad)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="minga"):
                used = latest_checkpoint(run)
            assert used == run / "checkpoint-000003", f"{file.name}, byte {offset}"
            named = file.name in caplog.text or file.name == CHECKSUMS  # a flipped sum accuses the file that it is of
            assert named and "passed over" in caplog.text and "checkpoint-000003" in caplog.text
        file.write_bytes(good)
    assert contents(run / "checkpoint-000003") == before
    assert latest_checkpoint(run) == run / "checkpoint-000004"


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_run_goes_on_from_before_the_damage(
    live: Callable[..., tuple[int, list[str]]], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "run.jsonl", "checkpoint-000003", "checkpoint-000004"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, run / name)
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(settings | {"keep_checkpoints": 2}))
    weights = run / "checkpoint-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    code, lines = live(run)
    assert code == 0
    assert lines[0].startswith("damaged checkpoint passed over: model.safetensors does not match its checksum")
    assert lines[1].startswith("resuming at step 3 of 12")
    check_end(run, whole)


def test_the_checkpoint_just_written_is_never_the_one_pruned(server: Server, shards: Path, tmp_path: Path) -> None:
    """A damaged later one stays where it is, and does not count."""
    request: dict[str, Any] = {"data": str(shards), "keep": 1, "kill_at": 10**9, "mark": ""}
    for step in (5, 9):
        server.ask(save=str(tmp_path), step=step, **{**request, "keep": 2})
    (tmp_path / "checkpoint-000009" / "model.safetensors").write_bytes(b"")
    server.ask(save=str(tmp_path), step=7, **request)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-000007", "checkpoint-000009"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-000007"


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """(bytes) -> a disk of that size; called again, the same disk with another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or not mount or not umount:
        pytest.skip("needs root to mount a small disk")
    if subprocess.run([mount, "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting")

    def resize(size: int) -> Path:
        subprocess.run([mount, "-o", f"remount,size={size}", place], check=True)
        return place

    yield resize
    subprocess.run([umount, place], check=True)


@pytest.mark.parametrize("points", [3, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_disk_that_fills_anywhere(
    live: Callable[..., tuple[int, list[str]]], whole: Path, disk: Callable[[int], Path], points: int
) -> None:
    """From room for the settings alone to room for almost all: one line, what is there loads, and with room it goes on."""
    size = sum(file.stat().st_size for file in (whole / "checkpoint-000012").rglob("*") if file.is_file())
    reached = []
    for point in range(points):
        run = disk(2**30) / "run"
        shutil.rmtree(run, ignore_errors=True)
        disk(4096 * (1 + int(3.0 * size / 4096 * point / points)))
        code, lines = live(run)
        assert code == 2, lines
        assert [line for line in lines if line.startswith("error: ")] == [lines[-1]]
        assert "no space left on" in lines[-1].lower()
        assert not any("Traceback" in line or "ignored" in line for line in lines), lines
        reached.append(check(run, whole))
        if points < 10 or point % 6 == 0:
            disk(2**30)
            assert live(run)[0] == 0
            check_end(run, whole)
    assert reached == sorted(reached)
    assert {0, 1} < set(reached) | {2}


def test_a_limit_on_the_size_of_files(live: Callable[..., tuple[int, list[str]]], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    largest = max(file.stat().st_size for file in (whole / "checkpoint-000012").rglob("*") if file.is_file())
    code, lines = live(run, max_file_bytes=largest - 1)
    assert code == 2
    assert lines[-1].startswith("error: a file would be larger than is allowed there")
    assert not any("Traceback" in line for line in lines)
    assert live(run)[0] == 0
    check_end(run, whole)
