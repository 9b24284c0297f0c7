"""`python -m thunder COMMAND`: the command line of the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from thunder import conformance


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="thunder", description="A deep-learning compiler for PyTorch programs.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="compile a sentence encoder with real weights and compare it with eager")
    demo.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the comparison")
    demo.add_argument("--seconds", type=float, default=6.0, help="how long to measure (default: 6)")
    demo.add_argument("--out", default="out", metavar="FOLDER", help="where the trace is written (default: out)")
    demo.set_defaults(run=_demo)
    conformance.add_command(commands)
    options = parser.parse_args(argv)
    return options.run(options)


def _demo(options: argparse.Namespace) -> int:
    from thunder import demo as program

    return program.run(compare=not options.no_compile, seconds=options.seconds, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
