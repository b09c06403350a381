"""minga completion: a script that lets a shell complete commands, flags and files, made from the parsers by shtab."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = """\
examples:
  minga completion bash > ~/.local/share/bash-completion/completions/minga
  minga completion zsh > ~/.zfunc/_minga       with fpath+=~/.zfunc before compinit in ~/.zshrc
  minga completion fish > ~/.config/fish/completions/minga.fish
  minga completion tcsh > ~/.minga.tcsh        with `source ~/.minga.tcsh` in ~/.tcshrc
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "completion",
        help="print a shell's completion script",
        description="Prints a script that lets a shell complete minga's commands, flags and files.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"], help="the shell to write for")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    import shtab

    from minga.cli.main import build_parser

    parser, choices = build_parser()
    for subparser in choices.values():
        _complete_paths(subparser)
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """An argument that the help calls a file or a folder is completed as one."""
    import shtab

    kinds = {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE, "INPUT": shtab.FILE, "MODEL": shtab.FILE, "PATH": shtab.FILE}
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]  # how shtab is told
