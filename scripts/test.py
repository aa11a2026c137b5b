"""Run the tests in the repository's own virtual environment, which is made on the first call.

python3 scripts/test.py                  style, types, then every test
python3 scripts/test.py tests/test_x.py  only pytest, with these arguments
"""

from __future__ import annotations

import subprocess

from environment import ROOT, ready_python, run_command, variables

EVERYTHING = ("pytest", "-n", "2", "--dist", "loadfile")
"""Two at once, tests of one file one after the other, since they share what is slow to make."""

CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))


def main(arguments: list[str]) -> int:
    """Return the exit code of the first check that fails, else that of pytest."""
    python = ready_python()
    commands = [("pytest", *arguments)] if arguments else [*CHECKS, EVERYTHING]
    for command in commands:
        print("$ python -m", *command, flush=True)
        done = subprocess.run(
            [python, "-m", *command], cwd=ROOT, env=variables(python), check=False
        )
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    run_command(main)
