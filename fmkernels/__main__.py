# SPDX-License-Identifier: Apache-2.0
"""`python -m fmkernels doctor`: what this installation is, and whether its kernels are right on this machine."""

from __future__ import annotations

import argparse
import sys

from . import doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fmkernels", description="Kernels for foundation models.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="versions, machine, ops and a self-test of each: for bug reports")
    command.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)
    return doctor.run(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
