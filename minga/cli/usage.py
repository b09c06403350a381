"""minga usage: who has used a server, and what that cost in energy and money."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from minga.cli import in_columns
from minga.cli.keys import DEFAULT_FILE
from minga.errors import UserError

if TYPE_CHECKING:
    from minga.planner.cost import Rates
    from minga.planner.estimate import Estimate
    from minga.serve.meter import Total

EXAMPLE = """\
examples:
  minga usage                                    of the last 30 days, by key
  minga usage --since 2026-11-01 --until 2026-12-01 --by model
  minga usage --since 7d --by day --watts 65 --price-per-kwh 0.21 --json
"""
_SPAN = re.compile(r"([0-9]{1,9})([hdw])")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "usage",
        help="who has used a server, and what that cost",
        description="Sums the requests of a server, running or not. Energy and money are estimates, from the time that models "
        "were busy and the power of this machine; each has a low and a high end.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--keys", default=DEFAULT_FILE, metavar="FILE", help=f"the server's file (default {DEFAULT_FILE})"
    )
    parser.add_argument("--since", default="30d", metavar="WHEN", help="such as 12h, 7d or 2026-11-01 (default 30d)")
    parser.add_argument("--until", metavar="WHEN", help="as --since; this moment is not in it (default: now)")
    parser.add_argument("--by", choices=["key", "model", "day"], default="key", help="what to sum by (default key)")
    add_rates(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def add_rates(parser: argparse.ArgumentParser) -> None:
    """The flags that `rates_of` reads."""
    rates = parser.add_argument_group("what it costs")
    rates.add_argument(
        "--watts", type=float, metavar="W", help="the busy machine draws (default: estimated from its chips)"
    )
    rates.add_argument(
        "--price-per-kwh", type=float, metavar="P", help="of electricity (default 0.17, the world's mean)"
    )
    rates.add_argument("--machine-price-per-hour", type=float, metavar="P", help="for each busy hour (default 0)")
    rates.add_argument("--pue", type=float, metavar="F", help="what the room draws for each watt of it (default 1)")
    rates.add_argument("--currency", default="USD", help="of the prices, as it is shown (default USD)")


def run(args: argparse.Namespace) -> int:
    from minga.serve.meter import report
    from minga.serve.store import Store

    now = datetime.now().astimezone()
    since, until = moment(args.since, "--since", now), moment(args.until, "--until", now) if args.until else now
    if since >= until:
        raise UserError(f"--since {args.since} is not before --until {args.until or 'now'} (usage). swap them")
    rates = rates_of(args)
    store = Store(args.keys, create=False)
    try:
        totals = report(store, since=since.timestamp(), until=until.timestamp(), by=args.by)
    finally:
        store.close()
    if args.json:
        period = {"since": since.isoformat(), "until": until.isoformat()}
        rows = [document(total, rates) for total in totals]
        total = document(_sum(totals), rates)
        print(json.dumps({**period, "by": args.by, "rates": _rates(rates), "rows": rows, "total": total}))
    else:
        print(in_words(totals, rates, args.by, since))
    return 0


def moment(text: str, flag: str, now: datetime) -> datetime:
    """A time ago, such as 7d, or a date or time of the local calendar in ISO 8601."""
    try:
        if span := _SPAN.fullmatch(text):
            return now - timedelta(**{_UNITS[span[2]]: int(span[1])})
        return datetime.fromisoformat(text).astimezone()  # a time without a zone is local
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{text!r} is no time ({flag}). write 12h, 7d, 2w or a date such as 2026-11-01") from None


def rates_of(args: argparse.Namespace) -> Rates:
    from minga.planner.cost import PRICE_PER_KWH, PUE, Rates, measured_watts

    return Rates(
        watts=watts_of_this_machine() if args.watts is None else measured_watts(args.watts),
        price_per_kwh=PRICE_PER_KWH if args.price_per_kwh is None else args.price_per_kwh,
        machine_price_per_hour=args.machine_price_per_hour or 0.0,
        pue=PUE if args.pue is None else args.pue,
        currency=args.currency,
    )


def watts_of_this_machine() -> Estimate:
    """What it draws at the wall while it works, by its chips."""
    from minga.planner.cost import estimate_watts
    from minga.runtime import machine

    return estimate_watts(
        cores=machine.cores(),
        host_cores=os.cpu_count(),
        cpu_limit=machine.cpu_power_limit(),
        gpu_limit=machine.gpu_power_limit(),
    )


def document(total: Total, rates: Rates) -> dict[str, Any]:
    price = rates.price_per_million_tokens(total.busy_seconds, total.num_tokens)
    return {
        **asdict(total),
        "kwh": _ends(rates.kwh(total.busy_seconds)),
        "money": _ends(rates.money(total.busy_seconds)),
        "price_per_million_tokens": None if price is None else _ends(price),
    }


def _rates(rates: Rates) -> dict[str, Any]:
    return asdict(rates) | {"watts": _ends(rates.watts)}


def _ends(value: Estimate) -> dict[str, float]:
    """Of what a machine draws, nothing but the ends is known."""
    return {"low": value.low, "high": value.high}


def in_words(totals: list[Total], rates: Rates, by: str, since: datetime) -> str:
    if not totals:
        return f"no request since {since:%Y-%m-%d %H:%M}"
    counts = ("requests", "prompt", "cached", "completion", "reasoning", "busy hours")
    head = (by, *counts, "kWh", rates.currency, f"{rates.currency}/1M tokens")
    rows = [_row(total, rates) for total in (*totals, *([_sum(totals)] if len(totals) > 1 else []))]
    machine = f", {rates.machine_price_per_hour:g} an hour for the machine" if rates.machine_price_per_hour else ""
    return (
        f"{in_columns([head, *rows], num_texts=1)}\n\n"
        f"since {since:%Y-%m-%d %H:%M}. counted: busy time at {_range(rates.watts)} W, {rates.price_per_kwh:g} "
        f"{rates.currency} a kWh{machine}, PUE {rates.pue:g}"
    )


def _row(total: Total, rates: Rates) -> tuple[str, ...]:
    seconds = total.busy_seconds
    price = rates.price_per_million_tokens(seconds, total.num_tokens)
    return (
        total.group,
        *(f"{number:,}" for number in (total.num_requests, total.prompt_tokens, total.cached_tokens)),
        *(f"{number:,}" for number in (total.completion_tokens, total.reasoning_tokens)),
        f"{seconds / 3600:,.2f}",
        _range(rates.kwh(seconds)),
        _range(rates.money(seconds)),
        "-" if price is None else _range(price),
    )


def _sum(totals: list[Total]) -> Total:
    from minga.serve.meter import Total

    return sum(totals, Total("total"))


def _range(value: Estimate) -> str:
    """Two digits that count for an estimate, three for a number that is known."""
    exact = value.low == value.high
    return _number(value.low, 3) if exact else f"{_number(value.low, 2)} - {_number(value.high, 2)}"


def _number(value: float, digits: int) -> str:
    if 0 < value < 1e-4:
        return "<0.0001"
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"
