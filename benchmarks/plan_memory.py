"""Predicted and measured peak memory of our own commands, for `minga bench plan`.

  plan/memory/train   predicted peak resident memory of `minga train`, beside the measured one, in MB
  plan/memory/serve   the same for `minga serve` while it answers requests

Three sizes each; the row shows the one that is predicted worst, its note all three. What is measured is the largest resident
memory of the process, as the system counts it; children, such as a compiler, are not in it. The model of
`minga/planner/own_memory.py` was made by looking at other sizes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import load
from common import Failed, Row, row, say
from serve import SYLLABLES, bodies, serving

from minga.config import TrainConfig
from minga.data.tokenizer import Tokenizer
from minga.planner.counts import count_parameters
from minga.planner.dial import architecture
from minga.planner.own_memory import own_serving_memory, own_training_memory

STEPS = 4
# Of a server: while weights are rounded the heap's holes differ from start to start, by a fifth of a small peak.
STARTS = 3


class Training(NamedTuple):
    width: int
    batch_size: int
    seq_len: int
    precision: str


class Serving(NamedTuple):
    width: int
    quant: str | None
    running: int
    tokens: int  # of an answer


TRAININGS = (Training(128, 16, 128, "float32"), Training(320, 8, 512, "int8"), Training(512, 4, 256, "int8"))
SERVINGS = (Serving(256, None, 8, 200), Serving(320, "int8", 16, 100), Serving(640, "int8", 4, 60))
QUICK_TRAININGS = (Training(64, 8, 64, "int8"), Training(128, 16, 128, "float32"), Training(192, 4, 128, "int8"))
QUICK_SERVINGS = (Serving(128, None, 8, 100), Serving(192, "int8", 16, 60), Serving(256, None, 4, 60))
PROMPT = 150  # words


def rows(*, quick: bool = False, threads: int = 2) -> dict[str, Callable[[str], Row]]:
    """Row by id, as `common.measure_rows` takes them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return {
        "plan/memory/train": lambda id: train_row(id, QUICK_TRAININGS if quick else TRAININGS, environment),
        "plan/memory/serve": lambda id: serve_row(id, QUICK_SERVINGS if quick else SERVINGS, environment),
    }


def train_row(id: str, sizes: tuple[Training, ...], environment: dict[str, str]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder), environment)
        vocab_size = json.loads((shards / "manifest.json").read_text())["vocab_size"]
        found = []
        for n, size in enumerate(sizes):
            model = architecture(size.width, -(-vocab_size // 64) * 64)
            sizes_of = size._asdict()
            del sizes_of["width"]
            config = TrainConfig(model=model, steps=STEPS, mtp_from=0.0, **sizes_of)
            predicted = own_training_memory(config).total
            settings = {**sizes_of, "mtp_from": 0, "eval_every": 0, "checkpoint_every": 0}
            settings |= {f"model.{name}": value for name, value in _changes(model)}
            flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
            command = ["train", "--data", str(shards), "--out", f"{folder}/run{n}", "--steps", str(STEPS), *flags]
            name = f"width {size.width}, {size.batch_size} x {size.seq_len} tokens, {size.precision}"
            found.append((name, predicted, _peak_of(command, environment)))
            say(f"{name}: predicted {predicted / 1e6:.0f} MB, measured {found[-1][2] / 1e6:.0f} MB")
    return _row(id, found)


def serve_row(id: str, sizes: tuple[Serving, ...], environment: dict[str, str]) -> Row:
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            made = subprocess.run([sys.executable, __file__, "--make", folder, str(size.width)], env=environment)
            if made.returncode:
                raise Failed("no model was made")
            flags = ["--quant", size.quant] if size.quant else []
            words = [[_words(random.Random(100 * turn + n), PROMPT) for n in range(size.running)] for turn in range(2)]
            tokenizer = Tokenizer.from_folder(folder)
            prompt = max(len(tokenizer.encode(text)) for turn in words for text in turn)
            measured = statistics.median(_served(folder, flags, size, words) for _ in range(STARTS))
            model = architecture(size.width, 4096)
            context = prompt + size.tokens
            predicted = own_serving_memory(model, quant=size.quant, context=context, running=size.running).total
        millions = count_parameters(model).total_with_mtp / 1e6
        name = f"{millions:.0f} M parameters{', ' + size.quant if size.quant else ''}, {size.running} requests"
        found.append((name, predicted, measured))
        say(f"{name}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    return _row(id, found)


def _served(folder: str, flags: list[str], size: Serving, words: list[list[str]]) -> float:
    """Peak bytes of a server that answers these prompts, those of a turn side by side."""
    with serving(folder, *flags) as (port, process):
        for turn in words:  # other prompts: those of before stay in the cache
            asked = zip(bodies(size.running, size.tokens), turn, strict=True)
            heard, _ = asyncio.run(
                load.ask_all(port, [b | {"prompt": text} for b, text in asked], path="/v1/completions")
            )
            if any(each.error for each in heard):
                raise Failed(str(heard[0].error))
        return _peak(process)


def _row(id: str, found: list[tuple[str, float, float]]) -> Row:
    worst = max(found, key=lambda each: abs(each[1] / each[2] - 1))
    note = "; ".join(f"{name}: {ours / 1e6:.0f} of {theirs / 1e6:.0f} MB" for name, ours, theirs in found)
    return row(
        id,
        worst[1] / 1e6,
        worst[2] / 1e6,
        unit="MB",
        peer="measured",
        ratio=worst[1] / worst[2],
        runs=len(found),
        spread=sorted(ours / theirs for _, ours, theirs in found),
        note=note,
    )


def _peak_of(arguments: list[str], environment: dict[str, str]) -> float:
    """Bytes, of a command that ends well."""
    process = subprocess.Popen([sys.executable, "-m", "minga", *arguments], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise Failed(f"minga {arguments[0]} ended with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _peak(process: int) -> float:
    """Bytes, of a process that still runs."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _changes(model: Any) -> list[tuple[str, Any]]:
    """What differs from the preset that `minga train --steps` starts from; the vocabulary is the tokenizer's."""
    base = TrainConfig(steps=1).model
    pairs = [(f.name, getattr(model, f.name)) for f in dataclasses.fields(model) if f.name != "vocab_size"]
    return [(name, value) for name, value in pairs if value != getattr(base, name)]


def _words(rng: random.Random, num: int) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(num))


def _shards(folder: Path, environment: dict[str, str]) -> Path:
    """Half a million tokens of no meaning in many documents, few of which are held out."""
    rng, text, out = random.Random(0), folder / "text.jsonl", folder / "shards"
    text.write_text("".join(json.dumps({"text": _words(rng, 400)}) + "\n" for _ in range(1000)))
    command = ["data", str(text), "--out", str(out), "--vocab-size", "4096", "--val-fraction", "0.01"]
    made = subprocess.run([sys.executable, "-m", "minga", *command], stdout=subprocess.DEVNULL, env=environment)
    if made.returncode:
        raise Failed("no shards were made")
    return out


def _make(folder: Path, width: int) -> None:
    """Random weights of one of the dial's architectures, with a tokenizer."""
    import torch

    import minga
    from minga.data.tokenizer import train_bpe
    from minga.model.transformer import Transformer

    rng = random.Random(0)
    minga.save(Transformer(architecture(width, 4096)).init_weights(torch.Generator().manual_seed(0)), folder)
    train_bpe([_words(rng, 400) for _ in range(256)], 4096).save(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        _make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        from common import measure_rows, parser

        arguments = parser(__doc__)
        args = arguments.parse_args()
        sys.exit(measure_rows("plan", rows(quick=args.quick, threads=args.threads), arguments, args))
