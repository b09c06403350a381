"""minga watermark: a secret to mark answers with, and whether a text carries its mark."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from minga.errors import UserError

EXAMPLE = """\
examples:
  minga watermark new secret.key
  minga serve runs/mine --watermark secret.key        and requests with "watermark": true
  minga watermark check essay.txt --secret secret.key --model runs/mine
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "watermark",
        help="make a watermark's secret, or look for its mark in a text",
        description="Sampled answers can carry a mark in their choice of words, which only the secret shows. Greedy answers "
        "carry none, and whoever rewrites a text removes it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["new", "check"], help="make a secret, or look for its mark")
    parser.add_argument("file", metavar="FILE", help="new: where the secret goes. check: the text; - is stdin")
    parser.add_argument("--secret", metavar="FILE", help="check: the secret")
    parser.add_argument("--model", metavar="PATH", help="check: the model that wrote the text, for its tokens")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    if args.action == "new":
        _make(args.file)
        print(
            json.dumps({"secret": args.file}) if args.json else f"a new secret is in {args.file}: keep it to yourself"
        )
        return 0
    for flag in ("secret", "model"):
        if getattr(args, flag) is None:
            raise UserError(f"--{flag} is missing (watermark check). see minga watermark --help")
    from minga.engine.watermark import detect, read_secret
    from minga.store import load_tokenizer

    secret = read_secret(args.secret)
    ids = load_tokenizer(args.model).encode(_text(args.file))
    found = detect(ids, secret)
    if args.json:
        print(json.dumps({"tokens": found.num_tokens, "p_value": found.p_value, "marked": found.p_value < 1e-4}))
    else:
        verdict = "marked" if found.p_value < 1e-4 else "no mark found"
        print(
            f"{verdict}: a text without the mark looks like this with probability {found.p_value:.2g} ({found.num_tokens} tokens)"
        )
    return 0


def _make(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(
            f"{path} is there already (watermark new). a text marked with it is found with it only: keep it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}). choose another place") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


def _text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path} ({reason}). give a text file") from None
