"""Reads the arguments and calls a command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mlopt.cli.doctor import doctor
from mlopt.cli.explain import explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m mlopt`` with these arguments (default: those of the process).

    Returns:
        The exit status: 0, or 1 if a script compiles nothing or the doctor finds something that must be repaired.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mlopt", description="The compiler for multilevel optimization on PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "explain",
        help="run a script up to its mlopt.compile(...) and print the plan",
        description="Run a script up to the end of its first mlopt.compile(...), print plan.explain(), and stop there.",
    )
    command.add_argument("--draw", metavar="PATH", help="also write the problem graph as an SVG picture")
    command.add_argument("--backend", choices=("auto", "eager", "inductor"), help="in place of the script's own choice")
    command.add_argument("--all", action="store_true", help="do not stop: explain every plan that the script compiles")
    command.add_argument("script", help="the Python file")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")

    command = commands.add_parser(
        "doctor",
        help="look at torch, the compiler, the extension, CUDA and the cache, and say what to do",
        description="Look at everything mlopt needs or can use on this machine, and say what to do where it lacks.",
    )
    command.add_argument("--quick", action="store_true", help="do not compile and run a small graph (10 to 30 seconds)")

    given = parser.parse_args(arguments)
    if given.command == "doctor":
        return doctor(quick=given.quick)
    return explain(given.script, given.arguments, draw=given.draw, backend=given.backend, every=given.all)
