"""minga keys: makes, lists and revokes the API keys of a server, running or not."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from minga.cli import in_columns
from minga.errors import UserError

if TYPE_CHECKING:
    from minga.serve.keys import KeyRecord

EXAMPLE = """\
examples:
  minga keys add ana                                       prints the key, this once
  minga keys add shop --requests-per-minute 60 --tokens-per-minute 20000 --concurrent 2
  minga keys list
  minga keys revoke ana                                    a running server refuses it at once
"""
DEFAULT_FILE = "minga.db"
# flag -> name of the limit in minga/serve/keys.py
_LIMITS = {
    "requests_per_minute": "requests_per_minute",
    "tokens_per_minute": "tokens_per_minute",
    "concurrent": "max_concurrent",
    "max_output_tokens": "max_output_tokens",
}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "keys",
        help="API keys of a server, and their limits",
        description="Makes, lists and revokes API keys. The file holds their hashes: a lost key cannot be shown again.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["add", "list", "revoke"], help="what to do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="whose key it is: a person, a team, a program")
    parser.add_argument("--file", default=DEFAULT_FILE, metavar="FILE", help=f"where keys are (default {DEFAULT_FILE})")
    limits = parser.add_argument_group("limits of a new key (default: none)")
    limits.add_argument("--requests-per-minute", type=int, metavar="N", help="requests a minute")
    limits.add_argument("--tokens-per-minute", type=int, metavar="N", help="tokens a minute, of prompts and answers")
    limits.add_argument("--concurrent", type=int, metavar="N", help="requests at once")
    limits.add_argument("--max-output-tokens", type=int, metavar="N", help="tokens of one answer")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from minga.serve.keys import Keys
    from minga.serve.store import Store

    _check(args)
    store = Store(args.file, create=args.action == "add")
    try:
        keys = Keys(store)
        if args.action == "add":
            limits = {name: getattr(args, flag) for flag, name in _LIMITS.items()}
            _show_new(args, keys.add(args.name, **limits))
        elif args.action == "revoke":
            keys.revoke(args.name)
            print(json.dumps({"revoked": args.name}) if args.json else f"{args.name} is revoked")
        else:
            records = keys.list()
            print(json.dumps({"keys": [document(r) for r in records]}) if args.json else in_words(records))
    finally:
        store.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.action == "list" and args.name is not None:
        raise UserError(f"list takes no name, and {args.name!r} is given (keys list). leave it out")
    if args.action != "list" and args.name is None:
        raise UserError(f"{args.action} needs a name (keys {args.action}). give it: `minga keys {args.action} NAME`")
    given = next((flag for flag in _LIMITS if getattr(args, flag) is not None), None)
    if args.action != "add" and given is not None:
        flag = f"--{given.replace('_', '-')}"
        raise UserError(f"{flag} is for a new key (keys {args.action}). leave it out; to change limits, revoke and add")


def _show_new(args: argparse.Namespace, key: str) -> None:
    if args.json:
        print(json.dumps({"name": args.name, "key": key}))
    else:
        print(key)
        print(f"the key of {args.name}. it is shown this once: keep it now", file=sys.stderr)


def document(record: KeyRecord) -> dict[str, Any]:
    return {**asdict(record.key), "id": record.id, "created": record.created, "revoked": record.revoked}


def in_words(records: list[KeyRecord]) -> str:
    if not records:
        return "there is no key; `minga keys add NAME` makes one"
    head = ("name", "key", "created", "revoked", "requests/min", "tokens/min", "at once", "output tokens")
    rows = [
        (
            *(record.key.name, f"mk-{record.id}...", _day(record.created), _day(record.revoked)),
            *(_limit(getattr(record.key, name)) for name in _LIMITS.values()),
        )
        for record in records
    ]
    return in_columns([head, *rows], num_texts=4)


def _day(time: float | None) -> str:
    return "-" if time is None else datetime.fromtimestamp(time).date().isoformat()


def _limit(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
