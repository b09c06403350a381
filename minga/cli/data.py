"""minga data: documents -> tokenized shards, ready for `minga train`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minga.data.shards import Manifest
    from minga.data.tokenizer import Tokenizer

EXAMPLE = """\
examples:
  minga data corpus/ --out shards                      every .txt, .md, .rst and .jsonl file under corpus/
  minga data 'src/**/*.py' notes.txt --out shards      a glob and a file
  cat *.txt | minga data - --out shards --vocab-size 8192
  minga data corpus/ --out shards --tokenizer MODEL    that of a model folder, a .gguf file or a tokenizer.json
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "data",
        help="tokenize documents for training",
        description="Reads documents, trains a tokenizer (or takes one), and writes the tokens for `minga train`.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input", nargs="+", metavar="INPUT", help="file, folder, glob, .jsonl file, or - for standard input"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="tokens to train (default 4096)")
    tokenizer.add_argument("--tokenizer", metavar="PATH", help="use this model's tokenizer instead of training one")
    parser.add_argument(
        "--val-fraction", type=float, default=0.05, metavar="F", help="share of the text to hold out (default 0.05)"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave out files that match; may be repeated"
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it holds other shards")
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga.data.shards import build_shards

    display = _Display()
    tokenizer = None if args.tokenizer is None else _open_tokenizer(Path(args.tokenizer))
    with display:
        manifest = build_shards(
            args.input,
            args.out,
            tokenizer=tokenizer,
            vocab_size=args.vocab_size,
            val_fraction=args.val_fraction,
            exclude=args.exclude,
            force=args.force,
            progress=display.progress,
            note=display.note,
        )
    if args.json:
        result = {"path": str(args.out), "built": "write" in display.stages, **manifest.to_json()}
        json.dump({**result, "bytes_per_token": round(manifest.bytes_per_token, 4)}, sys.stdout, ensure_ascii=False)
        sys.stdout.write("\n")
    else:
        display.print_summary(manifest, args.out)
    return 0


def _open_tokenizer(path: Path) -> Tokenizer:
    from minga.data.tokenizer import Tokenizer

    if path.suffix == ".json":
        return Tokenizer.from_file(path)
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_folder(path)
    from minga.store import load_tokenizer  # knows .gguf files and run folders as well

    return load_tokenizer(path)


class _Display:
    """Progress on stderr: one moving bar on a terminal, a line for each stage elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.stages: dict[str, Any] = {}
        self._console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description:16}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def progress(self, stage: str, done: int, total: int) -> None:
        if stage not in self.stages:
            self.stages[stage] = self._bars.add_task(stage, total=total)
            if not self._console.is_terminal:
                self.note(f"{stage}: {total / 1e6:,.2f} MB")
        self._bars.update(self.stages[stage], completed=done)

    def note(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)

    def print_summary(self, manifest: Manifest, out: str) -> None:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("split")
        for name in ("documents", "tokens", "MB"):
            table.add_column(name, justify="right")
        for name, split in manifest.splits.items():
            table.add_row(name, f"{split.num_documents:,}", f"{split.num_tokens:,}", f"{split.num_bytes / 1e6:,.2f}")
        self._console.print(table)
        origin = "trained here" if manifest.trained_vocab_size else "given"
        self.note(
            f"tokenizer   {manifest.vocab_size:,} tokens ({origin}), {manifest.bytes_per_token:.2f} bytes per token"
        )
        held_out = manifest.val_bytes / manifest.num_bytes
        self.note(f"held out    {held_out:.1%} of the bytes ({manifest.split_rule})")
        if manifest.num_duplicates:
            self.note(f"duplicates  {manifest.num_duplicates:,} copies of documents were dropped")
        self.note(f"next        minga train --data {out}")
