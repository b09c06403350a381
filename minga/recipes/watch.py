"""What a run tells while it runs: the line on the terminal, `run.jsonl`, and the sinks of `--log`.

MFU, model FLOP utilisation, is what the model's matrix products need (`minga.planner.counts`: forward, times three for
forward and backward) over what this machine's products reach in the run's precision (`peak`) in the same
seconds. The optimizer's own products are overhead to it, and so is everything that is computed twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minga.config import TrainConfig
from minga.data.shards import Manifest, Shards
from minga.data.tokenizer import Tokenizer
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.kernels import cpu
from minga.model.transformer import Transformer
from minga.planner.counts import forward_flops
from minga.recipes.evaluate import Evaluation
from minga.runtime.machine import gemm_peak, memory_used
from minga.runtime.metrics import MetricsLog
from minga.runtime.progress import ProgressBar
from minga.runtime.sinks import Sink
from minga.train.checkpoint import TrainingState
from minga.train.step import StepMetrics

SAMPLE_PROMPT = "\n"  # a line break: the model begins on its own
SAMPLE_TOKENS = 40  # of the samples along the way; the last is three times as long
LOAD_EVERY = 10  # steps between two records of each expert's load


def peak(precision: str) -> float:
    """FLOP/s (in int8: operations) of one product by the fastest means there are here: the compiled kernels', or torch's.

    Of float32 the better of the two, so that utilisation is not flattered by the slower one.
    """
    if not cpu.available() or precision not in cpu.PRECISIONS:
        return gemm_peak()
    ours = gemm_peak(product=lambda a, b: cpu.Linear.apply(a, b, cpu.PRECISIONS[precision]))
    return max(ours, gemm_peak()) if precision == "float32" else ours


class Watch:
    """Measures the machine's peak when it is made; then `step`, `evaluation` and `sample` say one thing everywhere."""

    def __init__(
        self, config: TrainConfig, manifest: Manifest, log: MetricsLog, sinks: Sequence[Sink], processes: int = 1
    ):
        self._config, self._log, self._sinks = config, log, sinks
        train = manifest.splits["train"]
        self._bits_per_nat = train.num_tokens / train.num_bytes / math.log(2)  # of a token's loss, in bits a byte
        half = (config.seq_len + 1) // 2  # keys that a token of a causal sequence attends to, on average
        self._flops = {mtp: 3 * forward_flops(config.model, half, mtp=mtp) for mtp in (False, True)}
        self.peak = processes * peak(config.precision)  # each measures at the same time

    def step(self, state: TrainingState, metrics: StepMetrics, scale: float, seconds: float, bar: ProgressBar) -> None:
        """`scale`: the schedule's factor on every learning rate; `seconds`: what this step took."""
        config, speed = self._config, metrics.tokens / seconds
        resident, on_gpu = memory_used()
        values: dict[str, Any] = {
            "loss": metrics.loss,
            "mtp_loss": metrics.mtp_loss,
            "train_bits_per_byte": metrics.loss * self._bits_per_nat,
            "lr": config.lr_matrix * scale,
            "grad_norm": metrics.grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": speed,
            "mfu": speed * self._flops[metrics.mtp_loss is not None] / self.peak,
            "seconds": state.seconds,
            "cpu_seconds": metrics.cpu_seconds,
            "seconds_left": state.seconds / state.step * (config.steps - state.step),
            "memory": resident,
            "gpu_memory": on_gpu,
            "expert_max_over_mean": metrics.max_over_mean,
        }
        self._tell(state.step, values)
        if state.step % LOAD_EVERY == 0:
            values["expert_load"] = [[round(load, 3) for load in load_E.tolist()] for load_E in metrics.load]
        self._log.write("step", step=state.step, **values)
        held = on_gpu if on_gpu is not None else resident
        bar.update(
            1,
            f"loss {metrics.loss:.3f}  {values['train_bits_per_byte']:.2f} bits/byte  {speed:,.0f} tokens/s  "
            f"MFU {values['mfu']:.0%}{'' if held is None else f'  {held / 1e9:.1f} GB'}  "
            f"experts {metrics.max_over_mean:.2f}",
        )

    def evaluation(self, state: TrainingState, evaluation: Evaluation, kind: str = "eval") -> str:
        """Returns the line for people. `kind`: "eval", or "eval_ema" for the mean of the weights."""
        acceptance = evaluation.mtp_acceptance
        values = {
            "val_loss": evaluation.val_loss,
            "bits_per_byte": evaluation.bits_per_byte,
            "mtp_acceptance": acceptance,
        }
        self._tell(state.step, values if kind == "eval" else {f"{kind}/{name}": v for name, v in values.items()})
        self._log.write(kind, step=state.step, **values, seconds=state.seconds)
        untrained = acceptance is None or state.step < self._config.mtp_from * self._config.steps
        drafts = "" if untrained else f", MTP guesses right {acceptance:.0%}"
        return f"step {state.step}: {evaluation.bits_per_byte:.3f} bits a byte on held-out text{drafts}"

    def sample(self, state: TrainingState, model: Transformer, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Writes a little text. Its randomness is its own, so the run is the same without it; the mode of `model` too."""
        was_training = model.training
        params = SamplingParams(0.8, max_tokens=max_tokens, seed=0)
        text = LLM.from_parts(model, tokenizer, speculate=False).generate(SAMPLE_PROMPT, params)[0].text
        model.train(was_training)
        self._log.write("sample", step=state.step, prompt=SAMPLE_PROMPT, text=text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._log.close()

    def _tell(self, step: int, values: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items() if value is not None}
        for sink in self._sinks:
            sink.write(step, numbers)


def data_manifest(shards: Shards) -> str:
    """What the run read, as JSON: fingerprint, tokenizer, and the sizes and hashes of sources and token files."""
    files = {
        file.name: file.stat().st_size
        for file in sorted(Path(shards.path).iterdir())
        if file.suffix in (".bin", ".idx")
    }
    document = {
        "fingerprint": shards.manifest.fingerprint,
        "path": str(Path(shards.path).resolve()),
        "file_bytes": files,
        **shards.manifest.to_json(),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
