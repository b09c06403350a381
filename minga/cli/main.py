"""minga: finds the subcommand, runs it, and turns what goes wrong into one line and an exit code.

    0    done
    2    the user's to mend: one line `error: ...` on stderr, and with --json {"error": {"message": ...}} on stdout
    130  stopped with Ctrl-C, and with --json a document like that one
    1    a bug of ours, with its traceback

Only the chosen subcommand's module is imported: `minga --help` takes no longer than Python itself.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from minga.errors import UserError

COMMANDS = {
    "plan": "what a model costs, before anything is spent",
    "data": "tokenize documents for training",
    "train": "train a model from scratch",
    "quantize": "store a model in 8 or 4 bits",
    "eval": "measure a model on held-out text",
    "generate": "continue a prompt",
    "chat": "talk with a model in the terminal",
    "serve": "an OpenAI-compatible API and a web page",
    "guard": "judge a text, or train the classifier that judges",
    "keys": "API keys of a server, and their limits",
    "usage": "who has used a server, and what that cost",
    "watermark": "make a watermark's secret, or look for its mark in a text",
    "bench": "measure what it claims on this machine, beside its peers",
    "doctor": "what this machine has and what is missing",
    "completion": "print a shell's completion script",
}

EXAMPLE = """\
examples:
  minga data corpus/ --out shards              from plain text
  minga train --data shards --out runs/first   to a model of one's own
  minga chat runs/first                        that talks
`minga COMMAND --help` shows the flags of a command, with examples.
"""

# What to do about an error of the operating system that is the user's to mend.
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the name",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ENOTDIR: "check the name",
    errno.EISDIR: "give the name of a file",
    errno.ELOOP: "check the link",
}


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line; subcommands' parsers are of this class too."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False} | options)  # a flag added later must not change what a script means

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog}). `{self.prog} --help` shows what it takes")


def main(argv: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else list(argv)
    _never_fail_at_letters()
    try:
        try:
            return run_command(args)
        finally:
            if sys.stdout is not None:  # closed by `>&-`
                sys.stdout.flush()  # a reader that has gone away is noticed here, not by the interpreter's exit
    except UserError as error:
        return _fail(str(error), args)
    except BrokenPipeError:  # `minga ... | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a shell reports SIGPIPE
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
        return _fail(f"{error.strerror}{where}. {_REMEDIES[error.errno]}", args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        _answer("stopped", args)
        return 130


def _never_fail_at_letters() -> None:
    """An output that is not in UTF-8 (LANG=C, an old console) shows ? for what it lacks, and ends no command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="replace")


def run_command(argv: list[str]) -> int:
    name = next((arg for arg in argv if not arg.startswith("-")), None)
    parser, choices = build_parser([] if name is None else [name])
    if name is None:
        _refuse_unknown_flags(parser, argv)
        parser.parse_args(argv)
        parser.print_help(sys.stderr)
        return 2
    if name not in choices:
        raise UserError(f"{name!r} is not a command (minga). {_nearest(name, choices, 'minga --help')}")
    split = argv.index(name)
    _refuse_unknown_flags(parser, argv[:split])
    _refuse_unknown_flags(*_innermost(choices[name], argv[split + 1 :]))
    args, extra = parser.parse_known_args(argv)
    if extra:
        choices[name].error(f"unexpected argument {extra[0]!r}")
    status: int = args.run(args)
    return status


def build_parser(names: Iterable[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its subcommands. Only those in `names` know their flags; the rest are names."""
    parser = Parser(
        prog="minga",
        description="Train, adapt and serve language models of your own, on the machines you already have.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        if name in names:
            importlib.import_module(f"minga.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, subparsers.choices


class _Version(argparse.Action):
    """argparse's own action wants the version in advance; looking it up is half the time of `minga --help`."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from minga import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()


def _innermost(parser: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of the command's own action, where it has actions and one is named, and what is left to read."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and args and args[0] in action.choices:
            return action.choices[args[0]], args[1:]
    return parser, args


def _refuse_unknown_flags(parser: argparse.ArgumentParser, args: list[str]) -> None:
    """Before argparse reads them: it would rather complain about the flag that the misspelt one was meant to be."""
    known = parser._option_string_actions
    for arg in args:
        if arg == "--":
            return
        flag = arg.partition("=")[0]
        if arg.startswith("--") and " " not in flag and flag not in known:
            help_command = f"{parser.prog} --help"
            raise UserError(f"{flag} is not a flag ({parser.prog}). {_nearest(flag, known, help_command)}")


def _nearest(name: str, known: Iterable[str], help_command: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"`{help_command}` shows them all"


def _fail(message: str, argv: list[str]) -> int:
    line = " ".join(message.splitlines())
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes that torchrun started here, one is enough
        print(f"error: {line}", file=sys.stderr)
    _answer(line, argv)
    return 2


def _answer(message: str, argv: list[str]) -> None:
    """Who asked for JSON gets a document also when there is no result."""
    if "--json" in argv:
        print(json.dumps({"error": {"message": message}}, ensure_ascii=False))
