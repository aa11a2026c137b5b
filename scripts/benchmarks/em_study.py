"""What the EM benchmarks share: phantoms in their roles, a warm start, arms that can be resumed.

Every seed has phantoms of its own: a few whose nodules are marked and many with records alone. One
set to choose steps by and one to test on serve all seeds. What is done lies in a working folder.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.spatial.distance import cdist

import deepem
from deepem.em import EmConfig
from deepem.files import write_json
from deepem.fit import TrainConfig
from deepem.froc import evaluate
from deepem.judging import predictions_of
from deepem.labelled import LabelledStudy, WeakStudy, load_labelled, weak_studies
from deepem.model import load_model
from deepem.network import processor_has_bfloat16
from deepem.nodule import Nodule, Proposal
from deepem.phantom import write_phantoms
from deepem.rounds import from_rows
from deepem.scan import ScanCache
from deepem.tables import read_annotations
from deepem.training import train
from deepem.volume import find_studies
from deepem.weak_labels import read_weak_labels

RESULTS = Path(__file__).parent / "results"
TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 500, 600, 700
PATCH = 48

Records = Callable[[Sequence[WeakStudy], np.random.Generator], list[WeakStudy]]
"""Makes the records of a seed worse."""


@dataclass(frozen=True)
class Size:
    """How large a study is."""

    strong: int = 3
    weak: int = 60
    validation: int = 16
    test: int = 150
    warm_steps: int = 1200
    steps: int = 1200


@dataclass(frozen=True)
class Seed:
    """The scans of one seed. hidden: the weak scans with the truth that only the oracle sees."""

    number: int
    strong: list[LabelledStudy]
    hidden: list[LabelledStudy]
    weak: list[WeakStudy]


def marked(folder: Path, most: int | None = None) -> list[LabelledStudy]:
    """Phantoms of a folder with all of their nodules, sorted by name, at most as many."""
    annotations = read_annotations(folder / "annotations.csv")
    return [
        LabelledStudy(study, tuple(annotations.get(study.series_uid, ())))
        for study in sorted(find_studies(folder), key=lambda study: study.series_uid)[:most]
    ]


def make_phantoms(work: Path, size: Size, seeds: Sequence[int], jobs: int) -> None:
    """All phantoms of a study; what is there stays."""
    sets = [("validation", size.validation, VALIDATION_SEED), ("test", size.test, TEST_SEED)]
    sets += [(f"seed{seed}", size.strong + size.weak + 5, TRAINING_SEED + seed) for seed in seeds]
    folder = work / "phantoms"
    missing = [one for one in sets if not (folder / one[0] / "truth.json").exists()]
    tasks = [(write_phantoms, (folder / name, count, seed)) for name, count, seed in missing]
    run_all(tasks, jobs, "phantoms")


def scans_of(work: Path, size: Size, seed: int) -> Seed:
    """The first scans with nodules are marked, the others, clean ones too, have records."""
    folder = work / "phantoms" / f"seed{seed}"
    scans = marked(folder)
    strong = [item for item in scans if item.nodules][: size.strong]
    names = {item.study.series_uid for item in strong}
    hidden = [item for item in scans if item.study.series_uid not in names][: size.weak]
    records = read_weak_labels(folder / "weak_labels.csv")
    weak, _ = weak_studies(records, {item.study.series_uid: item.study for item in hidden})
    return Seed(seed, strong, hidden, weak)


def warm_start(work: Path, size: Size, seed: int) -> Path:
    """A model of the marked scans alone, the start of every arm of a seed."""
    out = work / f"seed{seed}" / "warm"
    if not (out / "model.pt").exists():
        _one_thread()
        config = TrainConfig(steps=size.warm_steps, patch=PATCH, seed=seed, validate_times=2)
        train(config, scans_of(work, size, seed).strong, out, cache=work / "cache",
              validation=marked(work / "phantoms" / "validation", size.validation))  # fmt: skip
    return out


@dataclass(frozen=True)
class Arm:
    """One way to go on from the warm start. oracle: weak scans come with their true boxes."""

    name: str
    em: EmConfig | None = None
    oracle: bool = False
    records: Records | None = None


def run_arm(work: Path, size: Size, seed: int, arm: Arm) -> dict[str, Any]:
    """Train one arm of one seed, test it, and keep the result in the working folder."""
    out = work / f"seed{seed}" / arm.name
    file = out / "result.json"
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
        if report["size"] != asdict(size) or report["em"] != (arm.em and asdict(arm.em)):
            raise ValueError(f"{file}: expected a result of {size} and {arm}, got one of another "
                             "study; another --work keeps both")  # fmt: skip
        return report
    _one_thread()
    scans = scans_of(work, size, seed)
    labelled, weak = scans.strong, scans.weak
    if arm.records:
        weak = arm.records(weak, np.random.default_rng([seed, 1]))
    if arm.oracle:  # as many of the patches are of strong scans as in EM
        odds = (1 - EmConfig.weak_share) / EmConfig.weak_share
        often = round(odds * len(scans.hidden) / len(scans.strong))
        labelled = scans.strong * often + scans.hidden
    config = TrainConfig(
        steps=size.steps, patch=PATCH, seed=seed, validate_times=EmConfig.rounds, em=arm.em
    )
    init, validation = (
        warm_start(work, size, seed),
        marked(work / "phantoms" / "validation", size.validation),
    )
    started = time.monotonic()
    result = train(config, labelled, out, weak=weak, validation=validation, init=init,
                   cache=work / "cache")  # fmt: skip
    minutes = round((time.monotonic() - started) / 60, 2)
    test, _ = load_labelled(
        marked(work / "phantoms" / "test", size.test), ScanCache(work / "cache")
    )
    # Where no step was better on the validation scans than the start, the start is the result. An
    # arm that was stopped during its test is trained again, and is then no better than itself.
    network, _ = load_model(out if (out / "model.pt").exists() else init)
    predictions = predictions_of(network, test, torch.device("cpu"))
    annotations = {item.scan.series_uid: list(item.nodules) for item in test}
    froc = evaluate(annotations, predictions, list(annotations))
    report = {
        "arm": arm.name,
        "seed": seed,
        "size": asdict(size),
        "em": arm.em and asdict(arm.em),
        "test": froc.report(),
        "validation_cpm": result.cpm,
        "minutes": minutes,
        "rounds": [
            entry["em"] | picks(out / "rounds" / f"{entry['em']['round']:02d}.json", scans)
            for entry in result.history
            if "em" in entry
        ],
    }
    write_json(file, report)
    return report


def picks(file: Path, scans: Seed) -> dict[str, float]:
    """What a round of EM chose, against the truth.

    recall: share of labels whose nodule is among the proposals at all. coverage: share of labels
    that teach a nodule. precision: share of these whose most probable proposal hits the nodule.
    That is the one that the record was made from, whatever an arm made of the record.
    """
    truth = {item.study.series_uid: item.nodules for item in scans.hidden}
    nodules = {
        label.source: nodule_of(label.z_lps_mm, truth[item.study.series_uid])
        for item in scans.weak
        for label in item.labels
        if label.z_lps_mm is not None
    }
    there, used, right = [], [], []
    for scan in json.loads(file.read_text(encoding="utf-8"))["scans"]:
        proposals = from_rows(scan["proposals"])
        for label in scan["labels"]:
            hits = hits_of(proposals, nodules[label["source"]])
            there.append(hits.any())
            used.append(bool(label["chosen"]))
            if label["chosen"]:
                right.append(hits[int(np.argmax(label["posterior"]))])
    return {
        "recall": float(np.mean(there)),
        "coverage": float(np.mean(used)),
        "precision": float(np.mean(right)) if right else float("nan"),
    }


def nodule_of(z_lps_mm: float, nodules: Sequence[Nodule]) -> Nodule:
    """The nodule that a label was made from: the one nearest to its slice."""
    return min(nodules, key=lambda nodule: abs(nodule.center_lps_mm[2] - z_lps_mm))


def hits_of(proposals: Sequence[Proposal], nodule: Nodule) -> np.ndarray:
    """(P,) bool: whose centre lies in the nodule."""
    centers = np.reshape([one.nodule.center_lps_mm for one in proposals], (-1, 3))
    return cdist(centers, [nodule.center_lps_mm])[:, 0] < nodule.diameter_mm / 2


def run_all(tasks: Sequence[tuple[Callable, tuple]], jobs: int, title: str) -> list[Any]:
    """Call functions in processes of their own, ``jobs`` at once; results in order."""
    if not tasks:
        return []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        for _ in track(as_completed(futures), title, total=len(futures)):
            pass
    return [future.result() for future in futures]


Gain = tuple[float, float | None, float | None]
"""Mean, and the ends of its 95 % interval, None for a single seed."""


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Gain:
    """Mean difference over the seeds of both, and its 95 % interval (Student's t)."""
    from scipy.stats import t

    difference = np.array([values[seed] - base[seed] for seed in sorted(values.keys() & base)])
    if len(difference) < 2:
        return float(difference.mean()), None, None
    half = t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return tuple((difference.mean() + np.array([0, -half, half])).tolist())


def in_words(gain: Gain) -> str:
    """Mean and interval for a table."""
    mean, low, high = gain
    return f"{mean:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")


def machine() -> dict[str, Any]:
    """What the minutes were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "bfloat16": processor_has_bfloat16(),
        "torch": torch.__version__,
        "deepem": deepem.__version__,
    }


def _one_thread() -> None:
    torch.set_num_threads(1)
