"""minga bench: measure the claims on this machine, side by side with the peers."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from minga.errors import UserError
from minga.runtime.machine import CHECKOUT

# Scripts of the folder `benchmarks`; in an installed package it lies inside `minga`.
BENCHES = {
    "train": "what training costs, against transformers and a 2023-style baseline",
    "ablation": "what each part of the training recipe gives, at equal CPU time",
    "engine": "reading and writing beside llama.cpp and transformers, memory, and what MTP drafts gain (of --model)",
    "serve": "what the server adds to the engine, to a step with a grammar, and under 64 clients (of --model)",
    "plan": "what the planner predicts, beside published measurements and runs",
    "quant": "how far weights in few bits are from the floats, beside llama.cpp's types (of --model)",
}

EXAMPLE = """\
benchmarks:
{benches}

examples:
  minga bench train --quick --json                  ten minutes at most, one JSON document as the last line
  minga bench train --only train/tokens-per-second  a part of the rows
  minga bench train --data shards --minutes 10      text of one's own, shorter baselines
  minga bench engine --only decode/b                beside llama.cpp, from the extra `bench`
  minga bench engine --only speculate --model runs/demo
  minga bench quant --model runs/demo --data shards
The first lines of benchmarks/NAME.py say what its rows mean; run as a script it has a few more flags.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    width = max(map(len, BENCHES)) + 2
    benches = "\n".join(f"  {name:{width}}{summary}" for name, summary in BENCHES.items())
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure what it claims on this machine, beside its peers",
        description="Runs one benchmark. Both sides are measured in one call; what it finds ends with a JSON document.",
        epilog=EXAMPLE.format(benches=benches),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=list(BENCHES), help=f"benchmark: {' or '.join(BENCHES)}")
    parser.add_argument("--json", action="store_true", help="print the document alone on stdout")
    parser.add_argument("--quick", action="store_true", help="ten minutes at most on two cores")
    parser.add_argument("--only", metavar="PREFIX", help="only the rows whose id begins so")
    parser.add_argument("--data", metavar="DIR", help="shards that `minga data` wrote (default: a corpus it fetches)")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="length of a baseline run, or of each run of the ablation"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of both sides (default 2)")
    parser.add_argument("--model", metavar="PATH", help="trained model or run folder (engine, quant, serve)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    command = [sys.executable, str(script(args.name))]
    command += [f"--{flag}" for flag in ("json", "quick") if getattr(args, flag)]
    for flag in ("only", "data", "minutes", "threads"):
        if getattr(args, flag) is not None:
            command += [f"--{flag}", str(getattr(args, flag))]
    return subprocess.run([*command, *([args.model] if args.model else [])]).returncode


def script(name: str) -> Path:
    """Where a benchmark lies: in the checkout that runs, else inside the installed package."""
    for folder in (CHECKOUT / "benchmarks", Path(__file__).parents[1] / "benchmarks"):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise UserError(f"the script of benchmark {name!r} is missing (bench). install minga again, or run a checkout")
