"""What every benchmark here shares: measurements in processes of their own, rows, the table, the document at the end.

A measurement is a function `measure_NAME(**arguments)` of its script that returns something JSON can hold. `measure`
runs it in a fresh process, so that it finds clean memory and leaves none behind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from minga.runtime.machine import describe

Row = dict[str, Any]


class Failed(Exception):
    """A measurement that ended without a result."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the flags that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", action="store_true", help="stdout holds the JSON document alone; the table goes to stderr"
    )
    parser.add_argument(
        "--quick", action="store_true", help="ten minutes at most on two cores; every shortcut is noted"
    )
    parser.add_argument("--only", default="", metavar="PREFIX", help="only the rows whose id begins so")
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default 2)")
    return parser


def wanted(parser: argparse.ArgumentParser, only: str, ids: Iterable[str]) -> list[str]:
    """The rows whose ids begin with `only`; none is a mistake of the command line."""
    ids = list(ids)
    found = [id for id in ids if id.startswith(only)]
    if not found:
        parser.error(f"no row's id begins with {only!r}. the rows are {', '.join(ids)}")
    return found


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def row(
    id: str,
    ours: float | None,
    theirs: float | None = None,
    *,
    unit: str,
    peer: str | None = None,
    ratio: float | None = None,
    ratios: Sequence[float] = (),
    runs: int = 1,
    spread: Sequence[float] | None = None,
    note: str | None = None,
) -> Row:
    """One line of the result. `ratios`: one for each pair of runs; their median is the ratio, their range the spread."""
    if ratios:
        ratio, runs, spread = statistics.median(ratios), len(ratios), (min(ratios), max(ratios))
    values = {"id": id, "ours": ours, "theirs": theirs, "peer": peer, "unit": unit, "ratio": ratio, "runs": runs}
    values["spread"] = list(spread) if spread else None
    return values | ({"note": note} if note else {})


# ---------------------------------------------------------------------------------------------- measurements


def measure(script: str, name: str, *, threads: int, **arguments: Any) -> Any:
    """Runs `measure_NAME(**arguments)` of `script` in a fresh process. Raises `Failed`; its stderr is ours."""
    threads_of = {key: str(threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads_of, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, script, "--measure", name, json.dumps({**arguments, "threads": threads})]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Failed(f"{name} ended with exit code {done.returncode}")
    return json.loads(lines[-1])


def answer(functions: Mapping[str, Any], argv: Sequence[str]) -> bool:
    """The other half of `measure`, in the fresh process: whether `argv` asked for a measurement, which is then done."""
    if list(argv[:1]) != ["--measure"]:
        return False
    import torch

    arguments = json.loads(argv[2])
    torch.set_num_threads(arguments.pop("threads"))
    print(json.dumps(functions[f"measure_{argv[1]}"](**arguments)), flush=True)
    return True


# ---------------------------------------------------------------------------------------------- results


def measure_rows(
    bench: str, rows_of: Mapping[str, Callable[[str], Row]], parser: argparse.ArgumentParser, args: argparse.Namespace
) -> int:
    """Measures the rows that `--only` wants, each shown as it comes, and ends as `finish` does. A row that fails fails alone."""
    rows, failures = [], []
    for id in wanted(parser, args.only, rows_of):
        say(id)
        try:
            rows.append(rows_of[id](id))
            print_table(rows[-1:], file=sys.stderr)
        except Failed as error:
            failures.append(f"{id}: {error}")
    return finish(bench, rows, as_json=args.json, failures=failures)


def finish(bench: str, rows: Sequence[Row], *, as_json: bool, failures: Sequence[str] = ()) -> int:
    """Prints the table, then the document as the last line of stdout. Returns the exit code: 1 if a measurement failed."""
    machine = describe()
    versions = machine.pop("versions")
    document = {"bench": bench, "machine": machine, "versions": versions, "commit": machine.get("commit")}
    print_table(rows, file=sys.stderr if as_json else sys.stdout)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(json.dumps({**document, "rows": list(rows)}), flush=True)
    return 1 if failures else 0


def print_table(rows: Sequence[Row], *, file: Any) -> None:
    width = max((len(row["id"]) for row in rows), default=0)
    for r in rows:
        theirs = "" if r["theirs"] is None else f"   {r['peer']} {number(r['theirs'])}"
        ratio = "" if r["ratio"] is None else f"   {r['ratio']:.2f}x"
        spread = (
            "" if r["spread"] is None else f" ({r['runs']} runs, {number(r['spread'][0])} - {number(r['spread'][1])})"
        )
        note = f"   {r['note']}" if r.get("note") else ""
        print(f"{r['id']:{width}}   minga {number(r['ours'])} {r['unit']}{theirs}{ratio}{spread}{note}", file=file)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
