"""Pre-training, from shards of text to a model folder: the whole story of one run, top to bottom.

    result = pretrain(TrainConfig(data="data", out="runs/mine", hours=0.1))

The run folder holds `run.json` (the resolved settings), `plan.json` (the one dial's reasons, if it was used),
`data-manifest.json` (what was read), `run.jsonl` (what happened), `report.html` and checkpoints. A run that was stopped
goes on from its newest whole checkpoint, bit for bit as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from minga.config import TrainConfig
from minga.data.loader import Loader, evaluation_batches
from minga.data.packing import Batch
from minga.data.shards import Shards, open_shards
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError
from minga.kernels import cpu
from minga.model.transformer import Transformer
from minga.planner.counts import count_parameters
from minga.planner.dial import Decisions
from minga.recipes.evaluate import Evaluation, evaluate
from minga.recipes.report import write_report
from minga.recipes.watch import SAMPLE_TOKENS, Watch, data_manifest
from minga.runtime.files import write_whole
from minga.runtime.machine import describe
from minga.runtime.metrics import MetricsLog
from minga.runtime.progress import ProgressBar
from minga.runtime.sinks import check_sinks, open_sinks
from minga.store import checkpoint_steps, latest_checkpoint
from minga.train.balance import LoadCounter, balance_rates
from minga.train.checkpoint import TrainingState, save_checkpoint
from minga.train.ema import Ema
from minga.train.guard import Diverged, Guard
from minga.train.optim import Optimizer
from minga.train.parallel import ALONE, Parallel, processes
from minga.train.pipeline import Pipeline, keep_stages
from minga.train.recompute import recompute
from minga.train.schedule import lr_scale, momentum, num_micro_batches, sequence_length
from minga.train.sharding import gather, gather_model, optimizer_of, restore, shard
from minga.train.step import forward_backward, train_step

RESERVE = 0.02  # of `hours`, kept for samples, checkpoints and the report
CALIBRATION_SECONDS, CALIBRATION_SHARE = 20.0, 0.04  # for timing steps when `hours` is given: at most, and of the hours


@dataclass(frozen=True)
class Result:
    """`evaluation` is None for a run that was stopped before its end."""

    run: Path
    model: Path  # the newest checkpoint
    step: int
    seconds: float
    evaluation: Evaluation | None

    @property
    def finished(self) -> bool:
        return self.evaluation is not None


def pretrain(
    config: TrainConfig,
    *,
    note: Callable[[str], None] = lambda line: None,
    plan: Decisions | None = None,
    sinks: Sequence[str] = (),
) -> Result:
    """Trains, evaluates, saves and reports. Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

    Under torchrun every process calls it, and they train one model together (minga/train/parallel.py).

    note: receives a line for each value that was derived and each thing that was decided. plan: where the settings come
    from, kept with the run; the seconds it took are part of `hours`. sinks: `minga.runtime.sinks.SINKS` that receive the
    numbers too. Raises `UserError`.
    """
    began = time.monotonic() - (plan.seconds if plan else 0.0)
    check_sinks(sinks)
    with processes(config) as parallel:
        if parallel.is_main:
            return _pretrain(config, parallel, began, note, plan, sinks)
        return _pretrain(config, parallel, began, lambda line: None, plan, ())  # only the first process speaks


def _pretrain(
    config: TrainConfig,
    parallel: Parallel,
    began_all: float,
    note: Callable[[str], None],
    plan: Decisions | None,
    sinks: Sequence[str],
) -> Result:
    shards = open_shards(config.data)
    tokenizer = shards.tokenizer
    tokenizer.chat_template = (
        None  # a base model has seen no conversations; a later tuning adds the template it teaches
    )
    config = fit_to_tokenizer(config, shards)
    loader = _loader(shards, config, parallel)  # before the run folder: too little text must leave nothing behind
    run = Path(config.out)
    checkpoint = parallel.on_main(lambda: _open_run(run, shards))
    config = _resolve(config, run, shards, note, began_all, parallel, resuming=checkpoint is not None)
    if checkpoint is None:
        parallel.on_main(lambda: _tell_origin(run, shards, plan))

    cpu.load(note)
    model, optimizer = _build(config, parallel)
    run_batches = forward_backward if parallel.pp == 1 else Pipeline(model, config, parallel)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    counter, guard = LoadCounter(model.moe_layers()), Guard(config)
    state = TrainingState(step=0, tokens=0, seconds=0.0, loader=loader.state_dict())
    if checkpoint is not None:
        state = restore(checkpoint, model, optimizer, parallel, ema=ema)
        loader.load_state_dict(state.loader)
        if state.guard:
            guard.load_state_dict(state.guard)
        note(f"resuming at step {state.step} of {config.steps} from {checkpoint}")

    log = MetricsLog(run / "run.jsonl" if parallel.is_main else Path(os.devnull))
    parameters = count_parameters(config.model)
    counts = {"total": parameters.total, "active": parameters.active, "mtp": parameters.mtp}
    outlets = open_sinks(sinks, run, as_dict(config), step=state.step)
    watch = Watch(config, shards.manifest, log, outlets, parallel.world)
    facts: dict[str, Any] = {
        "config": as_dict(config),
        "parameters": counts,
        "machine": {**describe(), "gemm_flops": watch.peak},
    }
    facts |= {"processes": parallel.world, "plan": parallel.on_main(lambda: _read_plan(run))}
    log.write("start", time=time.time(), **facts, step=state.step)
    began = time.monotonic() - state.seconds
    saved = state.step if checkpoint is not None else -1
    folder = checkpoint

    def save(state: TrainingState) -> Path:
        whole = gather(model, optimizer, parallel)  # on rank 0, which writes

        def write() -> Path:
            assert whole is not None
            return save_checkpoint(run, state, *whole, tokenizer, keep=config.keep_checkpoints, ema=ema)

        path = parallel.on_main(write)
        log.write("checkpoint", step=state.step, path=path.name)
        return path

    def sample(num_tokens: int) -> None:
        whole = gather_model(model, parallel)  # on rank 0, which writes
        if whole is not None:
            watch.sample(state, whole, tokenizer, num_tokens)

    model.train()
    bar = ProgressBar("training", config.steps, state.step, shown=parallel.is_main)
    name_place = _name_place(log, lambda: (state.step, folder))
    with _stop_requested() as stop, name_place, bar:
        while state.step < config.steps and not parallel.any(stop()):
            progress = state.step / config.steps
            optimizer.set_scale(lr_scale(progress, config))
            optimizer.set_momentum(momentum(state.step, config))
            with_mtp = bool(len(model.mtp)) and progress >= config.mtp_from
            began_step, began_cpu = time.monotonic(), time.process_time()
            metrics = train_step(
                model,
                _batches(loader, config, progress),
                optimizer,
                config,
                counter,
                with_mtp=with_mtp,
                balance_rates=balance_rates(config, state.step, counter.layers),
                guard=guard,
                parallel=parallel,
                run=run_batches,
            )
            if ema is not None and metrics.skipped is None:
                ema.update(model, state.step + 1)
            now = time.monotonic()
            tokens = state.tokens + metrics.tokens
            state = TrainingState(state.step + 1, tokens, now - began, loader.state_dict(), guard.state_dict())
            metrics.cpu_seconds = parallel.total(time.process_time() - began_cpu)
            watch.step(state, metrics, lr_scale(progress, config), now - began_step, bar)
            if metrics.skipped is not None:
                log.write("skip", step=state.step, reason=metrics.skipped)
                bar.note(f"step {state.step} was skipped: {metrics.skipped}")
            if state.step == config.steps:
                break
            if config.eval_every and state.step % config.eval_every == 0:
                evaluation = _evaluate(model, shards, config, parallel, max_tokens=config.eval_tokens)
                bar.note(watch.evaluation(state, evaluation))
                sample(SAMPLE_TOKENS)
            if config.checkpoint_every and state.step % config.checkpoint_every == 0 and guard.healthy:
                folder, saved = save(state), state.step
        if saved != state.step or folder is None:
            folder = save(state)  # before the evaluation, and while signals wait: nothing may come between
    evaluation_or_none: Evaluation | None = None
    if state.step >= config.steps:
        evaluation_or_none = _evaluate(model, shards, config, parallel, max_tokens=None)
        watch.evaluation(state, evaluation_or_none)
        if ema is not None:
            mean = _evaluate(ema.model, shards, config, parallel, max_tokens=None)
            watch.evaluation(state, mean, kind="eval_ema")
            note(f"mean of the weights: {mean.bits_per_byte:.3f} bits a byte on held-out text ({folder / 'ema'})")
    sample(3 * SAMPLE_TOKENS)
    log.write("end", reason="done" if evaluation_or_none else "stopped", seconds=state.seconds)
    watch.close()
    parallel.on_main(lambda: write_report(run))
    return Result(run, folder, state.step, state.seconds, evaluation_or_none)


# ---------------------------------------------------------------------------------------------- before the first step


def _make_run_folder(run: Path) -> None:
    """Raises `UserError` now if nothing can be written there, and not when the first checkpoint is due."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        what = "a file stands there" if run.is_file() else error.strerror
        raise UserError(f"cannot write the run folder: {what} ({run}). give another --out, or mend this one") from None


def _open_run(run: Path, shards: Shards) -> Path | None:
    """Makes the folder, or finds in it the checkpoint to go on from."""
    _make_run_folder(run)
    return _checkpoint_to_resume(run, shards)


def _tell_origin(run: Path, shards: Shards, plan: Decisions | None) -> None:
    """Keeps what a new run reads and where its settings come from."""
    write_whole(run / "data-manifest.json", data_manifest(shards))
    (run / "plan.json").unlink(missing_ok=True)  # of a run that had not come to its first checkpoint
    if plan is not None:
        write_whole(run / "plan.json", json.dumps(dataclasses.asdict(plan), indent=2) + "\n")


def _checkpoint_to_resume(run: Path, shards: Shards) -> Path | None:
    checkpoint = latest_checkpoint(run)
    if checkpoint is None and checkpoint_steps(run):
        raise UserError(f"no checkpoint of this run is whole ({run}). copy one from a backup, or give another --out")
    if checkpoint is not None and Tokenizer.from_folder(checkpoint).sha256 != shards.manifest.tokenizer_sha256:
        raise UserError(
            f"the run's tokenizer is not that of the data ({checkpoint}, {shards.path}). "
            "resume with the data that the run was begun with, or give another --out"
        )
    return checkpoint


def fit_to_tokenizer(config: TrainConfig, shards: Shards) -> TrainConfig:
    """The model gets the tokenizer's vocabulary (rounded up to 64, as matrix products like) and its end of text."""
    vocab_size = -(-shards.manifest.vocab_size // 64) * 64
    model = config.model.replace(vocab_size=vocab_size, eos_token_id=shards.manifest.eos_id)
    return dataclasses.replace(config, model=model)


def _resolve(
    config: TrainConfig,
    run: Path,
    shards: Shards,
    note: Callable[[str], None],
    began: float,
    parallel: Parallel,
    *,
    resuming: bool,
) -> TrainConfig:
    """Fills in `steps`, and keeps the settings in `run.json`. A resumed run must be the one that was begun.

    The steps are fixed here, once: the schedule of the learning rate, and with it a resumed run, must not depend on a
    clock. On a machine that slows down later the run takes longer by as much.
    """
    file = run / "run.json"
    if resuming:
        begun = parallel.on_main(lambda: _read_settings(file))
        ours = as_dict(config)
        free = {"hours", "out", "data", "workers", "recompute", "dp", "ep", "pp"} | (
            {"steps"} if config.hours else set()
        )
        changed = [key for key in ours if key not in free and begun.get(key) != json.loads(json.dumps(ours[key]))]
        if changed:
            raise UserError(
                f"this run was begun with another {', '.join(changed)} ({run}). use the same settings, or another --out"
            )
        return dataclasses.replace(config, steps=begun["steps"])
    if config.hours and not config.steps:
        whole = config.hours * 3600
        cpu.load(note)
        budget = min(CALIBRATION_SECONDS, CALIBRATION_SHARE * whole)
        pace = measure(config, shards, seconds=budget, parallel=parallel)
        evaluation = pace.evaluation(config)
        left = whole - (time.monotonic() - began) - pace.evaluated_token * shards.manifest.splits["val"].num_tokens
        steps = pace.steps(config, left)
        note(
            f"steps = {steps}: {whole / 60:.1f} minutes, {left / 60:.1f} of them for steps of {pace.step:.3g} s, "
            f"measured on this machine, and {evaluation / (pace.step + evaluation):.0%} of that for evaluation"
        )
        config = dataclasses.replace(config, steps=parallel.on_main(lambda: steps))
    parallel.on_main(lambda: write_whole(file, json.dumps(as_dict(config), indent=2) + "\n"))
    return config


def _read_settings(file: Path) -> dict[str, Any]:
    """`run.json` of a run that has a checkpoint. Raises `UserError` if it is missing or damaged."""
    try:
        begun = json.loads(file.read_bytes())
        if isinstance(begun, dict) and isinstance(begun.get("steps"), int):
            return begun
        problem = "it holds no settings of a run"
    except OSError as error:
        problem = str(error.strerror)
    except (ValueError, RecursionError):
        problem = "it is damaged"
    raise UserError(
        f"the run's settings cannot be read: {problem} ({file}). copy it from a backup, or give another --out"
    )


def _read_plan(run: Path) -> dict[str, Any] | None:
    file = run / "plan.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@dataclass(frozen=True)
class Pace:
    """Seconds that a step of the run takes on average, and a token of an evaluation."""

    step: float
    evaluated_token: float

    def evaluation(self, config: TrainConfig) -> float:
        """Seconds of evaluating that a step brings with it."""
        return self.evaluated_token * config.eval_tokens / config.eval_every if config.eval_every else 0.0

    def steps(self, config: TrainConfig, seconds: float) -> int:
        """That fit into so many seconds, less what is kept for samples, checkpoints and the report."""
        return max(1, int(seconds * (1 - RESERVE) / (self.step + self.evaluation(config))))


def measure(
    config: TrainConfig,
    shards: Shards,
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    parallel: Parallel = ALONE,
) -> Pace:
    """Times whole steps, optimizer included, of a throw-away copy of the run, for about `seconds`, and three at least.

    Medians after a first step that allocates; MTP counts for the share of the run that it is trained in. `clock`: what
    is counted, such as time.process_time.
    """
    model, optimizer = _build(config, parallel)
    counter, loader = LoadCounter(model.moe_layers()), _loader(shards, config, parallel)
    run_batches = forward_backward if parallel.pp == 1 else Pipeline(model, config, parallel)
    model.train()
    share = config.mtp_from if len(model.mtp) else 1.0  # of the run, without MTP

    def timed(with_mtp: bool, weight: float, num_batches: int = config.accumulate) -> float:
        """Seconds a step times `weight`; nothing is run for a share of zero."""
        times: list[float] = []
        end = time.monotonic() + seconds * weight
        while weight and (len(times) < 3 or (parallel.any(time.monotonic() < end) and len(times) < 50)):
            began = clock()
            batches = [next(loader) for _ in range(num_batches)]
            train_step(
                model,
                batches,
                optimizer,
                config,
                counter,
                with_mtp=with_mtp,
                balance_rates=[0.0] * len(counter.layers),
                parallel=parallel,
                run=run_batches,
            )
            times.append(clock() - began)
        return weight * median(times[1:]) if times else 0.0

    step = timed(False, share) + timed(True, 1 - share)
    if config.batch_warmup and config.accumulate > 1:
        # While the batch grows, half of the micro-batches are missing on average: each saves what it costs.
        step -= config.batch_warmup * max(0.0, (timed(False, 1.0) - timed(False, 1.0, 1)) / 2)
    began = clock()
    evaluation = _evaluate(model, shards, config, parallel, max_tokens=config.batch_size * config.seq_len)
    return Pace(step, (clock() - began) / evaluation.tokens)


def _build(config: TrainConfig, parallel: Parallel = ALONE) -> tuple[Transformer, Optimizer]:
    torch.manual_seed(config.seed)
    model = Transformer(config.model).init_weights(residual_scale=config.residual_init).set_precision(config.precision)
    if config.weight_dtype == "bf16":
        for p in model.parameters():  # not the buffers: the router's bias stays float32
            p.data = p.data.bfloat16()
    if config.recompute:
        recompute(model)
    if parallel.pp > 1:
        keep_stages(model, parallel)
    elif parallel.world > 1:
        shard(model, parallel)
    return model, optimizer_of(model, config, parallel)


def _loader(shards: Shards, config: TrainConfig, parallel: Parallel = ALONE) -> Loader:
    extra = 1 + config.model.num_nextn_predict_layers
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "seq_len": config.seq_len, "num_extra": extra}
    part = (parallel.data_rank, parallel.data_world)
    return Loader(shards, seed=config.seed, workers=config.workers, part=part, **sizes)


def _batches(loader: Loader, config: TrainConfig, progress: float) -> list[Batch]:
    """The micro-batches of the step at `progress`."""
    length = sequence_length(progress, config)
    return [loader.next_batch(length) for _ in range(num_micro_batches(progress, config))]


# ---------------------------------------------------------------------------------------------- along the way


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop; a second Ctrl-C ends the program at once."""
    wishes: list[int] = []
    previous: dict[int, Any] = {}

    def wish(number: int, frame: object) -> None:
        wishes.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, wish)
    except ValueError:
        previous = {}  # not the main thread: signals belong to whoever runs us
    try:
        yield lambda: bool(wishes)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


@contextmanager
def _name_place(log: MetricsLog, place: Callable[[], tuple[int, Path | None]]) -> Iterator[None]:
    """Adds to the news of a lost run at which step it was, and the checkpoint from before. `place`: steps done, and that."""
    try:
        yield
    except Diverged as error:
        step, folder = place()
        line = f"training diverged at step {step + 1}: {error}"
        log.write("end", reason=line)
        good = f"the last good checkpoint is {folder}" if folder else "there is no checkpoint yet"
        raise UserError(f"{line} ({good}). lower the learning rates in a new run (--out)") from None


def _evaluate(
    model: Transformer, shards: Shards, config: TrainConfig, parallel: Parallel, max_tokens: int | None
) -> Evaluation:
    extra = 1 + config.model.num_nextn_predict_layers
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "seq_len": config.seq_len, "num_extra": extra}
    batches = evaluation_batches(shards, max_tokens=max_tokens, **sizes)
    if parallel.pp > 1:  # rank 0 alone, with the whole model
        whole = gather_model(model, parallel)
        return parallel.on_main(lambda: evaluate(cast(Transformer, whole).set_precision(config.precision), batches))
    return evaluate(model, map(parallel.rows, batches), total=parallel.sum)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON can hold them, the model under its public keys."""
    shallow = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**shallow, "model": config.model.to_hf()}
