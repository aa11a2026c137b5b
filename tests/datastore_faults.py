"""Processes that write one datastore at once while they are killed; run by `test_datastore_faults`.

    datastore_faults.py FOLDER OPERATIONS SEED

In ``storm``, several write, scan and learn at once, and are killed at random. In ``steps``, a save
is killed before each of its steps, one after the other. It prints how often either was done.

What a worker was told to have succeeded it appends to a log of its own, which outlives it. At the
end the folder and the logs are for the test to judge.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps" / "deepem_app"))

from lib.datastore.local import LocalStore

IMAGES = [f"1.2.{number}" for number in range(6)]
ROLES = ("save", "save", "info", "scan", "learn")


def prepare(folder: Path) -> Path:
    studies = folder / "studies"
    studies.mkdir(parents=True)
    for image in IMAGES:
        (studies / f"{image}.nii.gz").write_bytes(b"a scan")
    LocalStore(studies)
    return studies


def note(log: int, **what: object) -> None:
    os.write(log, (json.dumps(what) + "\n").encode())


def work(studies: Path, worker: int, life: int, seed: str) -> None:
    """Do one thing after the other until killed."""
    rng = random.Random(seed)
    role = ROLES[worker]
    log = os.open(studies.parent / f"log{worker}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    mine = studies.parent / f"label{worker}.json"
    store = LocalStore(studies, read_only=role == "learn")
    for number in range(1_000_000):
        image = rng.choice(IMAGES)
        if role == "save":
            text = json.dumps(
                {"by": worker, "at": [life, number], "pad": "x" * rng.randrange(9999)}
            )
            mine.write_text(text)
            store.save_label(image, str(mine), "final", {"by": worker})
            note(log, did="save", image=image, text=text)
        elif role == "info":
            store.update_image_info(image, {f"by{worker}": [life, number]})
            note(log, did="info", image=image, key=f"by{worker}", value=[life, number])
        elif role == "scan":
            store = LocalStore(studies)
            assert store.list_images() == IMAGES
            note(log, did="scan")
        else:  # as a training does: read all labels, and never half of one
            for pair in store.datalist():
                json.loads(Path(pair["label"]).read_text())
            note(log, did="learn")
        if role != "save":
            time.sleep(0.02)


def storm(folder: Path, operations: int, seed: int) -> int:
    """How often a process was killed before they had done so many operations."""
    studies = prepare(folder)
    rng = random.Random(seed)
    lives = [0] * len(ROLES)
    children: dict[int, int] = {}

    def start(worker: int) -> None:
        lives[worker] += 1
        child = os.fork()
        if child == 0:
            try:
                work(studies, worker, lives[worker], f"{seed} {worker} {lives[worker]}")
            finally:
                os._exit(1)  # only an error ends here
        children[worker] = child

    for worker in range(len(ROLES)):
        start(worker)
    kills = 0
    while sum(len(log.read_bytes().splitlines()) for log in folder.glob("log*")) < operations:
        time.sleep(rng.uniform(0.002, 0.06))
        worker = rng.randrange(len(ROLES))
        os.kill(children[worker], signal.SIGKILL)
        status = os.waitpid(children[worker], 0)[1]
        assert os.WIFSIGNALED(status), f"the {ROLES[worker]} worker failed by itself: see above"
        kills += 1
        start(worker)
    for child in children.values():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return kills


def steps(folder: Path) -> int:
    """Replace an acknowledged label, killed before the first, second, ... step; how many it has."""
    step = 0
    while True:
        studies = prepare(folder / str(step))
        label = folder / "label.json"
        label.write_text('{"save": 1}')
        LocalStore(studies).save_label(IMAGES[0], str(label), "final", {})
        label.write_text('{"save": 2}')
        child = os.fork()
        if child == 0:
            store = LocalStore(studies)
            kill_at(step)
            store.save_label(IMAGES[0], str(label), "final", {})
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return step
        step += 1


def kill_at(step: int) -> None:
    """Die before the ``step``-th call of anything that changes what is on disk."""
    left = step

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "replace"), (os, "unlink"), (os, "fsync"), (os, "mkdir"),
        (shutil, "copyfile"), (shutil, "copy2"),
    ):  # fmt: skip
        setattr(module, name, dying(getattr(module, name)))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    killed = storm(root / "storm", int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"kills": killed, "steps": steps(root / "steps")}))
