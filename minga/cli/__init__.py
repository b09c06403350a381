"""The command line: one module for each subcommand, with `add_parser(subparsers)` and `run(args) -> int`.

`main` finds the module by the command's name and imports no other. A module imports what is heavy inside `run`.
"""
