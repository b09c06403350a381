"""Fuzzes the readers of model files, from the repository's root:

python -m tests.fuzz                                      every reader, a minute each, random mutations
python -m tests.fuzz gguf config --minutes 10             two of them, longer
python -m tests.fuzz gguf --minutes 10 --engine atheris   guided by coverage (pip install atheris)

Each kind of finding is printed once, and its input kept in --out. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.readers import Reader

NAMES = ("gguf", "safetensors", "index", "config", "tokenizer", "settings")


class _Findings:
    """Counts the inputs and keeps one of each kind that broke the rule."""

    def __init__(self, name: str, reader: Reader, out: Path) -> None:
        self.name, self.reader, self.out = name, reader, out
        self.seen: set[str] = set()
        self.runs = 0

    def try_one(self, data: bytes) -> None:
        from tests.fuzz.readers import Finding, check

        self.runs += 1
        try:
            check(self.reader, data)
        except Finding as finding:
            kind = str(finding).partition(": ")[0]
            kind = kind if " at " in kind else str(finding)[:20]
            if kind not in self.seen:
                self.seen.add(kind)
                path = self.out / f"{self.name}-{hashlib.sha256(data).hexdigest()[:8]}"
                path.write_bytes(data)
                print(f"{self.name}: {finding}\n    kept in {path}", file=sys.stderr, flush=True)


def fuzz_plain(findings: _Findings, seconds: float, seed: int) -> None:
    """Random mutations of the seeds, some of them mutated again and again."""
    dice, reader, end = Random(seed), findings.reader, time.monotonic() + seconds
    while time.monotonic() < end:
        data = dice.choice(reader.seeds)
        for _ in range(dice.choice([1, 1, 1, 2, 5])):
            data = reader.mutate(data, dice)
            findings.try_one(data)


def fuzz_atheris(findings: _Findings, seconds: float, seed: int) -> None:
    """libFuzzer's loop: what reaches new lines of `minga` is kept and mutated further. Does not return."""
    import atheris

    reader = findings.reader

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        dice = Random(number)
        return atheris.Mutate(data, max_size) if dice.random() < 0.2 else reader.mutate(data, dice)[:max_size]

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(reader.seeds):
        (corpus / str(number)).write_bytes(data)
    flags = [f"-max_total_time={seconds:.0f}", "-max_len=1000000", "-timeout=60", "-rss_limit_mb=4096"]
    flags += [f"-seed={seed}", f"-artifact_prefix={findings.out}/{findings.name}-crash-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], findings.try_one, custom_mutator=mutate)
    atheris.Fuzz()


def _fuzz(name: str, args: argparse.Namespace) -> int:
    """One reader, in this process; with atheris it does not return."""
    if args.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["minga"]):
            from tests.fuzz.readers import make_readers, warm_up
    else:
        from tests.fuzz.readers import make_readers, warm_up
    import tracemalloc

    import torch

    torch.set_num_threads(1)
    tracemalloc.start()
    findings = _Findings(name, make_readers(Path(tempfile.mkdtemp()))[name], args.out)
    warm_up(findings.reader)
    engine = fuzz_atheris if args.engine == "atheris" else fuzz_plain
    try:
        engine(findings, args.minutes * 60, args.seed)
    finally:
        print(f"{name}: {findings.runs} files, {len(findings.seen)} kinds of findings", file=sys.stderr, flush=True)
    return int(bool(findings.seen))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="READER", help=", ".join(NAMES))
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader (%(default)s)")
    parser.add_argument("--engine", choices=["plain", "atheris"], default="plain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".fuzz"), help="where inputs of findings go (%(default)s)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # a child: libFuzzer ends its process
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"not a reader: {', '.join(sorted(unknown))}")
    args.out.mkdir(exist_ok=True)
    if args.alone:
        return _fuzz(args.names[0], args)
    flags = ["--minutes", str(args.minutes), "--engine", args.engine, "--seed", str(args.seed), "--out", str(args.out)]
    began, failed = time.time(), []
    for name in args.names or NAMES:
        status = subprocess.run([sys.executable, "-m", "tests.fuzz", name, *flags, "--alone"]).returncode
        found = any(
            file.stat().st_mtime >= began for file in args.out.glob(f"{name}-*")
        )  # libFuzzer's status is its own
        failed += [name] if status or found else []
    print(f"findings: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
