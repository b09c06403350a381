"""Pre-training, from shards of text to a model folder: the whole story of one run, top to bottom.

    result = pretrain(TrainConfig(data="data", out="runs/mine", hours=0.1))

The run folder holds `run.json` (the resolved settings), `run.jsonl` (what happened), `report.html` and checkpoints. A
run that was stopped goes on from its newest whole checkpoint, bit for bit as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from minga.config import TrainConfig
from minga.data.loader import Loader, evaluation_batches
from minga.data.shards import Shards, open_shards
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.kernels import cpu
from minga.model.transformer import Transformer
from minga.planner.counts import count_parameters
from minga.recipes.evaluate import Evaluation, evaluate
from minga.recipes.report import write_report
from minga.runtime.machine import describe
from minga.runtime.metrics import MetricsLog
from minga.runtime.progress import ProgressBar
from minga.store import latest_checkpoint, load
from minga.train.balance import LoadCounter, balance_rates
from minga.train.checkpoint import TrainingState, save_checkpoint
from minga.train.optim import Optimizer
from minga.train.parallel import ALONE, Parallel, processes
from minga.train.pipeline import Pipeline, keep_stages
from minga.train.schedule import lr_scale
from minga.train.sharding import gather, gather_model, optimizer_of, restore, shard
from minga.train.step import StepMetrics, forward_backward, train_step

SAMPLE_PROMPT = "\n"  # a line break: the model begins on its own
EVALUATION_SHARE = 0.04  # of `hours`, kept for evaluation, samples and checkpoints
LOAD_EVERY = 10  # steps between two records of each expert's load


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


def pretrain(config: TrainConfig, *, note: Callable[[str], None] = lambda line: None) -> Result:
    """Trains, evaluates, saves and reports. Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint.

    Under torchrun every process calls it, and they train one model together (minga/train/parallel.py).

    note: receives a line for each value that was derived and each thing that was decided. Raises `UserError`.
    """
    with processes(config) as parallel:
        return _pretrain(config, parallel, note if parallel.is_main else lambda line: None)


def _pretrain(config: TrainConfig, parallel: Parallel, note: Callable[[str], None]) -> Result:
    shards = open_shards(config.data)
    tokenizer = shards.tokenizer
    tokenizer.chat_template = (
        None  # a base model has seen no conversations; a later tuning adds the template it teaches
    )
    run = Path(config.out)
    run.mkdir(parents=True, exist_ok=True)
    config = _fit_to_tokenizer(config, shards)
    checkpoint = parallel.on_main(lambda: latest_checkpoint(run))
    config = _resolve(config, run, shards, note, parallel, resuming=checkpoint is not None)

    cpu.load(note)
    model, optimizer = _build(config, parallel)
    run_batches = forward_backward if parallel.pp == 1 else Pipeline(model, config, parallel)
    counter = LoadCounter(model.moe_layers())
    loader = _loader(shards, config, parallel)
    state = TrainingState(step=0, tokens=0, seconds=0.0, loader=loader.state_dict())
    if checkpoint is not None:
        state = restore(checkpoint, model, optimizer, parallel)
        loader.load_state_dict(state.loader)
        note(f"resuming at step {state.step} of {config.steps} from {checkpoint}")

    log = MetricsLog(run / "run.jsonl" if parallel.is_main else Path(os.devnull))
    parameters = count_parameters(config.model)
    counts = {"total": parameters.total, "active": parameters.active, "mtp": parameters.mtp}
    log.write(
        "start",
        time=time.time(),
        config=as_dict(config),
        parameters=counts,
        machine=describe(),
        step=state.step,
        processes=parallel.world,
    )
    began = time.monotonic() - state.seconds
    saved = state.step if checkpoint is not None else -1
    folder = checkpoint

    def save(state: TrainingState) -> Path:
        whole = gather(model, optimizer, parallel)  # on rank 0, which writes

        def write() -> Path:
            assert whole is not None
            return save_checkpoint(run, state, *whole, tokenizer, keep=config.keep_checkpoints)

        path = parallel.on_main(write)
        log.write("checkpoint", step=state.step, path=path.name)
        return path

    model.train()
    with _stop_requested() as stop, ProgressBar("training", config.steps, state.step, shown=parallel.is_main) as bar:
        while state.step < config.steps and not parallel.any(stop()):
            progress = state.step / config.steps
            optimizer.set_scale(lr_scale(progress, config))
            with_mtp = bool(len(model.mtp)) and progress >= config.mtp_from
            began_step = time.monotonic()
            metrics = train_step(
                model,
                [next(loader) for _ in range(config.accumulate)],
                optimizer,
                config,
                counter,
                with_mtp=with_mtp,
                balance_rates=balance_rates(config, state.step, counter.layers),
                parallel=parallel,
                run=run_batches,
            )
            now = time.monotonic()
            tokens = state.tokens + metrics.tokens
            state = TrainingState(state.step + 1, tokens, now - began, loader.state_dict())
            speed = metrics.tokens / (now - began_step)
            _log_step(log, state, metrics, config.lr_matrix * lr_scale(progress, config), speed)
            bar.update(1, f"loss {metrics.loss:.3f}  {speed:,.0f} tokens/s  experts {metrics.max_over_mean:.2f}")
            if state.step == config.steps:
                break
            if config.eval_every and state.step % config.eval_every == 0:
                evaluation = _evaluate(model, shards, config, parallel, max_tokens=config.eval_tokens)
                _log_evaluation(log, state, evaluation)
                bar.note(f"step {state.step}: {evaluation.bits_per_byte:.3f} bits a byte on held-out text")
            if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                folder, saved = save(state), state.step
    evaluation_or_none: Evaluation | None = None
    if state.step >= config.steps:
        evaluation_or_none = _evaluate(model, shards, config, parallel, max_tokens=None)
        _log_evaluation(log, state, evaluation_or_none)
    if saved != state.step or folder is None:
        folder = save(state)
    if parallel.is_main:
        whole_model = model if parallel.world == 1 else load(folder)
        sampling = SamplingParams(0.8, max_tokens=120, seed=0)
        text = LLM.from_parts(whole_model, tokenizer).generate(SAMPLE_PROMPT, sampling)[0].text
        log.write("sample", step=state.step, prompt=SAMPLE_PROMPT, text=text)
    log.write("end", reason="done" if evaluation_or_none else "stopped", seconds=state.seconds)
    log.close()
    parallel.on_main(lambda: write_report(run))
    return Result(run, folder, state.step, state.seconds, evaluation_or_none)


# ---------------------------------------------------------------------------------------------- before the first step


def _fit_to_tokenizer(config: TrainConfig, shards: Shards) -> TrainConfig:
    """The model gets the tokenizer's vocabulary (rounded up to 64, as matrix products like) and its end of text."""
    vocab_size = -(-shards.manifest.vocab_size // 64) * 64
    model = config.model.replace(vocab_size=vocab_size, eos_token_id=shards.manifest.eos_id)
    return dataclasses.replace(config, model=model)


def _resolve(
    config: TrainConfig,
    run: Path,
    shards: Shards,
    note: Callable[[str], None],
    parallel: Parallel,
    *,
    resuming: bool,
) -> TrainConfig:
    """Fills in `steps`, and keeps the settings in `run.json`. A resumed run must be the one that was begun."""
    file = run / "run.json"
    if resuming:
        begun = parallel.on_main(lambda: json.loads(file.read_text()) if file.is_file() else {})
        ours = as_dict(config)
        free = {"hours", "out", "data", "dp", "ep", "pp"} | ({"steps"} if config.hours else set())
        changed = [key for key in ours if key not in free and begun.get(key) != json.loads(json.dumps(ours[key]))]
        if changed:
            raise UserError(
                f"this run was begun with another {', '.join(changed)} ({run}). use the same settings, or another --out"
            )
        return dataclasses.replace(config, steps=begun["steps"])
    if config.hours and not config.steps:
        cpu.load(note)
        measured = _seconds_a_step(config, shards, parallel)
        seconds = parallel.on_main(lambda: measured)
        steps = max(1, int(config.hours * 3600 * (1 - EVALUATION_SHARE) / seconds))
        note(f"steps = {steps}: {config.hours * 60:.1f} minutes at {seconds:.2f} s a step, measured on this machine")
        config = dataclasses.replace(config, steps=steps)
    if parallel.is_main:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(as_dict(config), indent=2) + "\n")
        os.replace(partial, file)
    return config


def _seconds_a_step(config: TrainConfig, shards: Shards, parallel: Parallel = ALONE) -> float:
    """Times steps of a throw-away copy of the run; MTP counts for the share of the run it is trained in."""
    model, optimizer = _build(config, parallel)
    counter, loader = LoadCounter(model.moe_layers()), _loader(shards, config, parallel)
    run_batches = forward_backward if parallel.pp == 1 else Pipeline(model, config, parallel)
    model.train()

    def timed(with_mtp: bool, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            began = time.monotonic()
            batches = [next(loader) for _ in range(config.accumulate)]
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
            times.append(time.monotonic() - began)
        return sorted(times[1:])[len(times[1:]) // 2]  # the first one allocates

    if not len(model.mtp) or config.mtp_from >= 1:
        return timed(False, 4)
    with_mtp = timed(True, 4)
    return with_mtp if config.mtp_from == 0 else config.mtp_from * timed(False, 4) + (1 - config.mtp_from) * with_mtp


def _build(config: TrainConfig, parallel: Parallel) -> tuple[Transformer, Optimizer]:
    torch.manual_seed(config.seed)
    model = Transformer(config.model).init_weights().set_precision(config.precision)
    if parallel.pp > 1:
        keep_stages(model, parallel)
    elif parallel.world > 1:
        shard(model, parallel)
    return model, optimizer_of(model, config, parallel)


def _loader(shards: Shards, config: TrainConfig, parallel: Parallel) -> Loader:
    extra = 1 + config.model.num_nextn_predict_layers
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "seq_len": config.seq_len, "num_extra": extra}
    return Loader(shards, seed=config.seed, part=(parallel.data_rank, parallel.data_world), **sizes)


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


def _evaluate(
    model: Transformer, shards: Shards, config: TrainConfig, parallel: Parallel, max_tokens: int | None
) -> Evaluation:
    extra = 1 + config.model.num_nextn_predict_layers
    sizes: dict[str, Any] = {"batch_size": config.batch_size, "seq_len": config.seq_len, "num_extra": extra}
    batches = evaluation_batches(shards, max_tokens=max_tokens, **sizes)
    if parallel.pp > 1:  # rank 0 alone, with the whole model
        whole = gather_model(model, parallel)
        return parallel.on_main(lambda: evaluate(cast(Transformer, whole), batches))
    return evaluate(model, map(parallel.rows, batches), total=parallel.sum)


def _log_step(log: MetricsLog, state: TrainingState, metrics: StepMetrics, lr: float, speed: float) -> None:
    values: dict[str, Any] = {
        "loss": metrics.loss,
        "mtp_loss": metrics.mtp_loss,
        "lr": lr,
        "grad_norm": metrics.grad_norm,
    }
    values |= {"tokens": state.tokens, "tokens_per_second": speed, "seconds": state.seconds}
    values["expert_max_over_mean"] = metrics.max_over_mean
    if state.step % LOAD_EVERY == 0:
        values["expert_load"] = [[round(load, 3) for load in load_E.tolist()] for load_E in metrics.load]
    log.write("step", step=state.step, **values)


def _log_evaluation(log: MetricsLog, state: TrainingState, evaluation: Evaluation) -> None:
    values: dict[str, Any] = {"val_loss": evaluation.val_loss, "bits_per_byte": evaluation.bits_per_byte}
    values |= {"mtp_acceptance": evaluation.mtp_acceptance, "seconds": state.seconds}
    log.write("eval", step=state.step, **values)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON can hold them, the model under its public keys."""
    shallow = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {**shallow, "model": config.model.to_hf()}
