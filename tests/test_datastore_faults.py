"""Labels outlive whatever happens to the processes that write them: `datastore_faults` does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("datastore_faults.py")
OPERATIONS, SEED = 1200, 20261121

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="kills as POSIX does"),
]


@dataclass(frozen=True)
class Wreck:
    """What the killed processes left, and how often they were killed."""

    folder: Path
    kills: int
    steps: int


@pytest.fixture(scope="module")
def wreck(tmp_path_factory) -> Wreck:
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(FAULTS), str(folder), str(OPERATIONS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return Wreck(folder, **json.loads(done.stdout))


def history(studies: Path, image: str) -> list[str]:
    """Every label of an image that is on disk, in the order of the saves."""
    final = studies / "labels" / "final"
    files = [*sorted((final / "versions" / image).glob("[0-9]*.json")), final / f"{image}.json"]
    return [file.read_text() for file in files if file.exists()]


def test_every_acknowledged_label_is_there_after_a_storm_of_writers_and_kills(wreck):
    """Five processes, killed at any moment: what a writer was told to be kept is kept."""
    folder = wreck.folder / "storm"
    logs = [json.loads(line) for log in folder.glob("log*") for line in log.open()]
    counts = Counter(entry["did"] for entry in logs)
    print(f"{wreck.kills} kills; {dict(counts)}")
    assert len(logs) >= OPERATIONS
    assert wreck.kills >= 40
    assert min(counts[did] for did in ("save", "info", "scan", "learn")) >= 20

    studies = folder / "studies"
    index = json.loads((studies / "datastore_v2.json").read_text())["objects"]
    saved = defaultdict(list)
    infos: dict[tuple[str, str], list[int]] = {}
    for entry in logs:
        if entry["did"] == "save":
            saved[entry["image"]].append(entry["text"])
        elif entry["did"] == "info":
            infos[entry["image"], entry["key"]] = entry["value"]
    assert sorted(saved) == sorted(index)
    for image, texts in saved.items():
        kept = history(studies, image)
        assert set(texts) <= set(kept)
        for worker in (0, 1):  # nobody's older label came back over a newer one
            own = [json.loads(text) for text in kept]
            order = [label["at"] for label in own if label["by"] == worker]
            assert order == sorted(order)
        assert index[image]["labels"]["final"]["ext"] == ".json"
    for (image, key), value in infos.items():
        assert index[image]["image"]["info"][key] >= value


def test_a_save_that_is_killed_at_any_step_loses_no_label(wreck):
    assert wreck.steps > 8
    for step in range(wreck.steps):
        studies = wreck.folder / "steps" / str(step) / "studies"
        kept = history(studies, "1.2.0")
        assert '{"save": 1}' in kept
        assert kept[-1] in ('{"save": 1}', '{"save": 2}')  # whole, whichever it is
        json.loads((studies / "datastore_v2.json").read_text())
    studies = wreck.folder / "steps" / str(wreck.steps) / "studies"
    assert history(studies, "1.2.0") == ['{"save": 1}', '{"save": 2}']
