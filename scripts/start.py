"""Start the MONAI Label server with the nodule app, and say what to do in 3D Slicer.

python3 scripts/start.py                      on a small synthetic set, made on the first call
python3 scripts/start.py --studies FOLDER     on your own scans (or the URL of a DICOMweb server)
python3 scripts/start.py -- --conf key value  what follows -- goes to MONAI Label as it is
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

from environment import ROOT, SetupError, ready_python, run_command, variables

DEMO = ROOT / "demo"
APP = ROOT / "apps" / "deepem_app"
_PATIENCE_S = 180  # until the first answer, on a slow disk
_FAREWELL_S = 15  # to finish the request at hand
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens addresses on this computer, whatever proxy leads out of it."""

NEXT_STEPS = """
The server is ready: {url}

In 3D Slicer (extension MONAILabel), module "MONAI Label":
  1. MONAI Label server: {url}, then the refresh button beside it.
  2. Active Learning > Next Sample fetches a scan without a label.
  3. Auto Segmentation > Model nodule_detection > Run: each finding is a box (a Markups ROI)
     around a nodule, its score in the label of the box; "nothing found" is an answer, too.
  4. Delete wrong boxes, drag others right, add missed ones (Markups > ROI).
  5. Active Learning > Submit Label stores them; Train learns from what was submitted.

Ctrl-C stops the server. Research software: not a medical device, not for clinical use."""


def main(arguments: list[str]) -> NoReturn:
    """Serve until Ctrl-C. SetupError if there is no server or it ends by itself."""
    own, passed_on = split(arguments)
    options = _parser().parse_args(own)
    check_port(options.host, options.port, "--port")
    check_studies(options.studies)
    python = ready_python()
    studies = options.studies or make_demo(python)
    command = [python, "-m", "monailabel.main", "start_server", "--app", APP]
    command += ["--studies", studies, "--host", options.host, "--port", str(options.port)]
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://{host}:{options.port}"
    with running([*command, *passed_on], variables(python)) as server:
        wait_until_ready(server, url)
        print(NEXT_STEPS.format(url=url), flush=True)
        code = server.wait()
    raise SetupError(f"the server stopped by itself with code {code}: see above")


def check_port(host: str, port: int, option: str) -> None:
    """SetupError if a server could not listen there; ``option`` chooses another port."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SetupError(f"--host {host}: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        if sys.platform != "win32":  # as the server does; there it would allow a second listener
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SetupError(
                f"port {port} of {host} is not free ({error.strerror}): stop the program that uses "
                f"it, or choose another with {option} {port + 1}"
            ) from None


def check_studies(studies: str | None) -> None:
    """SetupError for a folder that is not there: MONAI Label would make an empty one."""
    if studies and not studies.startswith(("http://", "https://")) and not os.path.isdir(studies):
        raise SetupError(f"--studies {studies}: no such folder, and no http(s) address")


def make_demo(python: Path) -> Path:
    """Folder of four synthetic chests with nodules; made unless its last file is there."""
    if not (DEMO / "truth.json").is_file():
        print(f"Making four synthetic scans in {DEMO}", flush=True)
        make = [str(python), "-m", "deepem", "phantom", "--seed", "2026"]
        make += ["--out", str(DEMO), "--count", "4"]
        if subprocess.run(make, cwd=ROOT, env=variables(python), check=False).returncode:
            raise SetupError("could not make the synthetic scans: see above")
    return DEMO


@contextmanager
def running(
    command: list, env: dict[str, str], output: IO | None = None, name: str = "the server"
) -> Iterator[subprocess.Popen]:
    """A server as a process group of its own, which is gone when the block is left.

    output: a file for what it says, by default the terminal. name: for the user.
    """
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    server = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        stdout=output,
        stderr=output,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
    )
    try:
        yield server
    finally:
        signal.signal(signal.SIGTERM, previous)
        stop(server, name)


def stop(server: subprocess.Popen, name: str) -> None:
    """End a server and all that it started, also a training that outlives it."""
    if sys.platform == "win32":
        kill = ["taskkill", "/F", "/T", "/PID", str(server.pid)]
        subprocess.run(kill, capture_output=True, check=False)
        server.wait()
        return
    try:
        if server.poll() is None:
            print(f"\nStopping {name}", flush=True)
            _signal_group(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(_FAREWELL_S)
    finally:  # a second Ctrl-C, too, leaves nothing behind
        _signal_group(server.pid, signal.SIGKILL)
        server.wait()


def wait_until_ready(
    server: subprocess.Popen, url: str, path: str = "/info/", name: str = "the server"
) -> None:
    """Return once ``path`` answers; SetupError if the server ends or stays silent."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SetupError(f"{name} stopped with code {server.returncode}: see above")
        try:
            with DIRECT.open(f"{url}{path}", timeout=10):
                return
        except urllib.error.HTTPError as error:
            raise SetupError(f"{name} answers {url}{path} with {error.code}") from None
        except OSError:
            time.sleep(0.5)
    raise SetupError(f"{name} did not answer {url}{path} within {_PATIENCE_S} s")


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after ``--``."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="start.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--studies", metavar="FOLDER_OR_URL", help="(default: the synthetic set)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_command(main)
