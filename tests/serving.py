"""The real server in a process of its own, for the tests that drive it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from monailabel.client import MONAILabelClient

APP = Path(__file__).parent.parent / "apps" / "deepem_app"
MODEL = "nodule_detection"
START_S = 90


@dataclass(frozen=True)
class Running:
    client: MONAILabelClient
    url: str
    log: Path


def copy_app(target: Path) -> Path:
    """The app as it is shipped, without what a server left in it."""
    ignore = shutil.ignore_patterns("__pycache__", "bin", "logs", MODEL, f"{MODEL}.pt")
    return shutil.copytree(APP, target, ignore=ignore)


@contextmanager
def serving(
    app: Path, studies: Path | str, root: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A server on a port of its own on the loopback, with its log and sessions in ``root``."""
    port, log = free_port(), root / "server.log"
    command = [sys.executable, "-m", "monailabel.main", "start_server"]
    command += ["--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"MONAI_LABEL_SESSION_PATH": str(root / "sessions")}
    environment |= variables or {}
    url = f"http://127.0.0.1:{port}"
    client = MONAILabelClient(url, tmpdir=str(root))

    def answers() -> bool:
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-4000:]}"
        try:
            return bool(client.info())
        except OSError:
            return False

    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_for(answers, START_S, "the server answers")
            yield Running(client, url, log)
        finally:
            kill_tree(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait(10)


def wait_for(condition, seconds: float, what: str):
    """The first true value of ``condition``; fails the test after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.3)
    pytest.fail(f"{what}: not within {seconds} s")


def stats(client: MONAILabelClient) -> dict:
    return client.info()["train_stats"][MODEL]


def ended(client: MONAILabelClient) -> dict | None:
    status = client.train_status()
    return status if status["status"] in ("DONE", "ERROR", "STOPPED") else None
