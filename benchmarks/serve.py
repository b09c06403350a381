"""`minga serve` beside the engine that it is made of: what HTTP, streams, grammars and many clients cost.

    minga bench serve [--quick] [--only serve/overhead] [--threads 2] [--model runs/demo]

  serve/overhead/N         tokens/s of N streamed answers side by side, beside the bare engine with the same prompts (ratio)
  serve/grammar-p99        what a grammar adds to a step of one answer, 99th percentile, as a share of a step without
  serve/fairness/64        64 clients that ask again and again: the longest time to a first token, of the median
  serve/memory-growth/64   and how much the server's memory grows meanwhile, of what it had after the first sixth, in %

The models are random and in int8, unless --model names one: 29 M parameters (a), for the grammar 394 M (b, 98 M a token).
Server, client and engine share the machine: what the client costs counts as the server's.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
from common import Failed, Row, measure, row, say

ENGINE = "engine"
SYLLABLES = [f"{consonant}{vowel}" for consonant in "bcdfghjklmnprstv" for vowel in "aeiou"]
PROMPT_WORDS, PAUSE = 24, 0.3
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["village", "town", "city"]},
        "places": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9999},
            "minItems": 8,
            "maxItems": 40,
        },
    },
    "required": ["name", "kind", "places"],
    "additionalProperties": False,
}


def make_model(folder: Path, name: str) -> None:
    """Random weights with a tokenizer and a chat template of our own. name: of a model of benchmarks/engine.py."""
    import torch
    from engine import model_config

    import minga
    from minga.data.tokenizer import train_bpe
    from minga.model.transformer import Transformer

    rng, config = random.Random(0), model_config(name)
    num_texts = config.vocab_size // 16  # enough repeated pieces for so many tokens
    texts = [
        " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(400)) for _ in range(num_texts)
    ]
    tokenizer = train_bpe(texts, config.vocab_size)
    minga.save(Transformer(config).init_weights(torch.Generator().manual_seed(0)), folder)
    tokenizer.save(folder)


@contextmanager
def serving(model: str, *flags: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process id."""
    command = [sys.executable, "-m", "minga", "serve", f"model={model}", "--port", "0", "--json", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            raise Failed("the server did not start")
        yield int(json.loads(line)["url"].rpartition(":")[2]), process.pid
    finally:
        process.terminate()
        process.wait(timeout=60)


def bodies(num: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(rng.choices(SYLLABLES, k=PROMPT_WORDS)),
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": n,
        }
        for n in range(num)
    ]


# ---------------------------------------------------------------------------------------------- measurements


def measure_overhead(model: str, flags: list[str], streams: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens a second, a number a round: through the server, and without."""
    import load

    from minga.engine.llm import LLM
    from minga.engine.sampler import SamplingParams

    quant = flags[flags.index("--quant") + 1] if "--quant" in flags else None
    llm, found = LLM(model, quant=quant, speculate=False), {"ours": [], "theirs": []}
    with serving(model, *flags) as (port, _):
        for round in range(rounds + 1):
            asked = bodies(streams, tokens, seed=round)
            heard, seconds = asyncio.run(load.ask_all(port, asked, path="/v1/completions"))
            if any(each.error for each in heard):
                raise Failed(str(heard[0].error))
            rate = sum(each.num_tokens for each in heard) / seconds
            time.sleep(PAUSE)
            params = [SamplingParams(1.0, max_tokens=tokens, ignore_eos=True, seed=n) for n in range(streams)]
            began = time.perf_counter()
            llm.generate([each["prompt"] for each in asked], params)
            bare = streams * tokens / (time.perf_counter() - began)
            time.sleep(PAUSE)
            if round:  # the first one warms up
                found["ours"].append(rate)
                found["theirs"].append(bare)
    return found


def measure_grammar(model: str, flags: list[str], answers: int) -> dict[str, float]:
    """Seconds: the 99th percentile of what the rules of an answer take of a step, and the median step without any."""
    from minga.data.dialects import json_grammar
    from minga.engine.grammar import Grammar, Guide
    from minga.engine.llm import LLM
    from minga.engine.sampler import SamplingParams

    quant = flags[flags.index("--quant") + 1] if "--quant" in flags else None
    llm = LLM(model, quant=quant, speculate=False)
    grammar, spent = Grammar(json_grammar(SCHEMA)), [0.0]
    for name in ("allowed", "take", "forced"):
        setattr(Guide, name, _timed(getattr(Guide, name), spent))

    def steps(params: SamplingParams) -> list[tuple[float, float]]:
        entry, found = llm.submit("Where?", params), []
        while not entry.sequence.finished:
            spent[0], began = 0.0, time.perf_counter()
            llm.step()
            found.append((time.perf_counter() - began, spent[0]))
        return found[1:]

    rules, bare = [], []
    for seed in range(answers + 1):
        with_rules = steps(SamplingParams(1.0, max_tokens=400, seed=seed, grammar=grammar))
        # asked for log-probabilities, the engine takes single steps too
        without = steps(SamplingParams(1.0, max_tokens=100, seed=seed, ignore_eos=True, logprobs=0))
        if seed:
            rules += [seconds for _, seconds in with_rules]
            bare += [seconds for seconds, _ in without]
    return {"p99": sorted(rules)[int(0.99 * len(rules))], "step": statistics.median(bare), "steps": len(rules)}


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[0] += time.perf_counter() - began

    return timed


def measure_crowd(model: str, flags: list[str], clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered: times to the first token, errors, and the server's memory."""
    import load

    firsts: list[float] = []
    errors: list[str] = []
    memory: list[tuple[float, int]] = []

    async def client(number: int, port: int, until: float) -> None:
        turn = 0
        while time.monotonic() < until:
            (body,) = bodies(1, tokens, seed=1000 * number + turn)
            heard = await load.ask(port, body, path="/v1/completions")
            if heard.error or heard.first is None:
                errors.append(heard.error or "nothing came")
            else:
                firsts.append(heard.first)
            turn += 1

    async def watch(pid: int, began: float, until: float) -> None:
        while time.monotonic() < until:
            memory.append((time.monotonic() - began, _resident_bytes(pid)))
            await asyncio.sleep(seconds / 60)

    async def run(port: int, pid: int) -> None:
        began = time.monotonic()
        until = began + seconds
        await asyncio.gather(*(client(n, port, until) for n in range(clients)), watch(pid, began, until))

    with serving(model, *flags) as (port, pid):
        asyncio.run(run(port, pid))
    settled = [size for at, size in memory if at > seconds / 6]
    return {
        "firsts": firsts,
        "errors": errors[:3],
        "num_errors": len(errors),
        "growth": 100 * (statistics.median(settled[-5:]) / statistics.median(settled[:5]) - 1),
        "bytes": settled[-1],
    }


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------- rows


class Bench:
    def __init__(self, args: Any, folder: Path):
        self.args, self._folder = args, folder
        self.flags = ["--no-speculate"] if args.model else ["--quant", "int8", "--no-speculate"]
        self._crowd: dict[str, Any] | None = None

    def rows(self) -> dict[str, Callable[[str], Row]]:
        return {
            "serve/overhead/1": lambda id: self._overhead(id, 1),
            "serve/overhead/16": lambda id: self._overhead(id, 16),
            "serve/grammar-p99": self._grammar,
            "serve/fairness/64": self._fairness,
            "serve/memory-growth/64": self._memory,
        }

    def _model(self, name: str) -> str:
        folder = self._folder / name
        if self.args.model is None and not folder.exists():
            say(f"writing model {name} with random weights")
            make_model(folder, name)
        return self.args.model or str(folder)

    def _measure(self, name: str, *, of: str = "a", **arguments: Any) -> Any:
        model = self._model(of)
        return measure(__file__, name, threads=self.args.threads, model=model, flags=self.flags, **arguments)

    def _overhead(self, id: str, streams: int) -> Row:
        rounds, tokens = (3, 256) if self.args.quick else (7, 512)
        found = self._measure(
            "overhead", streams=streams, tokens=tokens if streams == 1 else tokens // 2, rounds=rounds
        )
        ratios = [ours / theirs for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
        ours, theirs = statistics.median(found["ours"]), statistics.median(found["theirs"])
        return row(id, ours, theirs, unit="tokens/s", peer=ENGINE, ratios=ratios)

    def _grammar(self, id: str) -> Row:
        found = self._measure("grammar", of="b", answers=4 if self.args.quick else 12)
        note = f"{1e6 * found['p99']:.0f} of {1e6 * found['step']:.0f} microseconds"
        return row(id, found["p99"] / found["step"], unit="of a step", runs=found["steps"], note=note)

    def _crowded(self) -> dict[str, Any]:
        if self._crowd is None:
            seconds = 20 if self.args.quick else 60
            self._crowd = self._measure("crowd", clients=64, seconds=seconds, tokens=64)
            if self._crowd["num_errors"]:
                raise Failed(f"{self._crowd['num_errors']} requests failed: {self._crowd['errors']}")
        return self._crowd

    def _fairness(self, id: str) -> Row:
        firsts = self._crowded()["firsts"]
        median = statistics.median(firsts)
        note = f"median {median:.3f} s, longest {max(firsts):.3f} s"
        return row(id, max(firsts) / median, unit="longest of median", runs=len(firsts), note=note)

    def _memory(self, id: str) -> Row:
        found = self._crowded()
        return row(id, found["growth"], unit="%", runs=len(found["firsts"]), note=f"{found['bytes'] / 1e6:.0f} MB")


def main() -> int:
    if common.answer(globals(), sys.argv[1:]):
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, run folder or .gguf file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return common.measure_rows("serve", Bench(args, Path(folder)).rows(), parser, args)


if __name__ == "__main__":
    sys.exit(main())
