"""The virtual environment of this repository: made once, then reused. Standard library only.

Written so that older Pythons can still read it and say what they lack.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 11), (3, 12))
_PINS = ("requirements.txt", "constraints.txt")


class SetupError(Exception):
    """What is missing on this machine, in one line for the user."""


def check_python(version: tuple[int, int] | None = None) -> None:
    """SetupError unless ``version`` (major, minor), by default that of this Python, will do."""
    major, minor = version or sys.version_info[:2]
    if (major, minor) not in SUPPORTED:
        names = [f"{one[0]}.{one[1]}" for one in SUPPORTED]
        raise SetupError(
            f"Python {major}.{minor} is not supported: run this command with Python "
            f"{', '.join(names)}, for example python{names[-1]}"
        )
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python has no module {module}, which makes virtual environments: install it "
                f"(Debian, Ubuntu: apt install python{major}.{minor}-venv)"
            )


def ready_python(root: Path = ROOT, run: Callable = subprocess.run) -> Path:
    """Path of an interpreter with everything in `requirements.txt` installed.

    Makes `.venv` in ``root`` on the first call, installs again when the pins change, and makes it
    anew when the folder was moved or the Python is another. A stamp is written last, so that an
    interrupted installation is taken up again. ``run``: stands in for `subprocess.run`.
    """
    check_python()
    home = root / ".venv"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "installed.txt"
    origin = f"{root} with Python {sys.version_info[0]}.{sys.version_info[1]}"
    wanted = [origin, *(f"{name} {_digest(root / name)}" for name in _PINS)]
    found = stamp.read_text(encoding="utf-8").splitlines() if stamp.is_file() else []
    if found == wanted and python.is_file():
        return python
    stamp.unlink(missing_ok=True)
    if found[:1] not in ([], [origin]) or not _is_this_version(python):
        _say(f"Making the virtual environment {home}")
        if run([sys.executable, "-m", "venv", "--clear", str(home)], check=False).returncode:
            raise SetupError(f"could not make {home}: see above")
    _say("Installing what requirements.txt names: on a fresh machine 3 to 20 minutes and 8 GB")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    install += ["-c", "constraints.txt", "-r", "requirements.txt"]
    if run(install, cwd=root, check=False).returncode:
        raise SetupError("the installation failed: see above; the same command takes it up again")
    aside = stamp.with_suffix(".part")
    aside.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    os.replace(aside, stamp)
    return python


def variables(python: Path) -> dict[str, str]:
    """Environment variables for a program of the virtual environment: its tools come first."""
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(python.parent.parent)}


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with what ``main`` returns; a SetupError is one line on standard error and code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_this_version(python: Path) -> bool:
    if not python.is_file():
        return False
    ask = [str(python), "-c", "import sys; print(*sys.version_info[:2])"]
    answer = subprocess.run(ask, capture_output=True, text=True, check=False)
    return answer.stdout.split() == [str(part) for part in sys.version_info[:2]]


def _say(line: str) -> None:
    print(line, flush=True)
