"""Which scan next? Simulated annotation campaigns, one for each strategy of ranking.

python scripts/benchmarks/campaign.py --work WORK     3 seeds, hours on 2 cores; started again with
                                                      the same --work it goes on where it was
python scripts/benchmarks/campaign.py --work WORK --studies LUNA --annotations annotations.csv

Half of the pool of phantoms is as they come, four of five with nodules, half is without; records
name every nodule. Of folders, every seed draws patients to label, to choose steps by and to test
on. All strategies begin with the same labelled scans and the same model, and go on from their own
last model. Writes campaign.json, .md and .png into results/ beside this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import em_study
import numpy as np
import torch
from em_study import PATCH, RESULTS, in_words, machine, marked, paired, run_all

from deepem.detector import Detector
from deepem.errors import InputError
from deepem.figures import training_plot
from deepem.files import atomic_path, write_json
from deepem.fit import TrainConfig
from deepem.judging import by_nodules
from deepem.labelled import LabelledStudy, load_labelled, weak_studies
from deepem.model import load_model
from deepem.phantom import write_phantoms
from deepem.ranking.evidence import ScanEvidence
from deepem.ranking.scoring import EvidenceFile, Told, gather, told_by
from deepem.ranking.strategies import STRATEGIES, rank
from deepem.scan import ScanCache
from deepem.tables import read_annotations, read_patients, read_series
from deepem.training import train
from deepem.volume import find_studies
from deepem.weak_labels import Records, read_weak_labels

CLEAN_SEED = 800
BASELINES = ("shuffle", "foreground")
FULL = "all labels"
"""Not a strategy: every scan of the pool is labelled from the first round on."""


@dataclass(frozen=True)
class Size:
    """How large a campaign is: scans, and steps of training at the start and in every round."""

    pool: int = 40
    start: int = 4
    per_round: int = 6
    rounds: int = 2
    validation: int = 8
    test: int = 40
    start_steps: int = 400
    steps: int = 120


@dataclass(frozen=True)
class Source:
    """Where scans and labels lie: phantoms in ``work``, or folders with their tables."""

    work: Path
    studies: Path | None = None
    annotations: Path | None = None
    weak_labels: Path | None = None
    series: Path | None = None
    patients: Path | None = None


@dataclass(frozen=True)
class Cast:
    """The scans of one seed by role, without a patient in two. records: of the pool, by series."""

    pool: list[LabelledStudy]
    start: list[str]
    validation: list[LabelledStudy]
    test: list[LabelledStudy]
    told: dict[str, Told]


def cast_of(source: Source, size: Size, seed: int) -> Cast:
    """Who plays which role in ``seed``; the start has nodules, as a lab would begin with."""
    if source.studies:
        pool, validation, test = _split(source, size, seed)
        table = source.weak_labels
    else:
        folder = source.work / "phantoms"
        pool = marked(folder / f"seed{seed}", size.pool // 2)
        pool += marked(folder / f"clean{seed}", size.pool - len(pool))
        validation = marked(folder / "validation", size.validation)
        test = marked(folder / "test", size.test)
        table = folder / f"seed{seed}" / "weak_labels.csv"
    records = read_weak_labels(table) if table else Records()
    weak, _ = weak_studies(records, {item.study.series_uid: item.study for item in pool})
    told = told_by(records, weak)
    if not source.studies:  # their records name every nodule
        told |= {item.study.series_uid: Told((), ()) for item in pool if not item.nodules}
    order = np.random.default_rng([seed, 7]).permutation(len(pool))
    start = [pool[at].study.series_uid for at in order if pool[at].nodules][: size.start]
    return Cast(pool, start, validation, test, told)


def _split(
    source: Source, size: Size, seed: int
) -> tuple[list[LabelledStudy], list[LabelledStudy], list[LabelledStudy]]:
    """Patients in a random order: to test on, to choose steps by, and the pool."""
    assert source.studies and source.annotations
    annotations = read_annotations(source.annotations)
    patients = read_patients(source.patients) if source.patients else {}
    complete = set(read_series(source.series)) if source.series else set(annotations)
    of_patient: dict[str, list[LabelledStudy]] = {}
    for study in sorted(find_studies(source.studies), key=lambda one: one.series_uid):
        if study.series_uid in complete:
            patient = patients.get(study.series_uid, study.patient_id)
            item = LabelledStudy(study, tuple(annotations.get(study.series_uid, ())))
            of_patient.setdefault(patient, []).append(item)
    names = sorted(of_patient)
    roles: list[list[LabelledStudy]] = [[], [], []]
    wanted = (size.test, size.validation, size.pool)
    for at in np.random.default_rng([seed, 8]).permutation(len(names)):
        role = next((n for n, count in enumerate(wanted) if len(roles[n]) < count), None)
        if role is not None:
            roles[role] += of_patient[names[at]]
    test, validation, pool = roles
    if len(pool) < size.start + size.rounds * size.per_round:
        raise InputError(source.studies, "scans", f"about {sum(wanted)} with labels, of many "
                         "patients", sum(map(len, of_patient.values())))  # fmt: skip
    return pool, validation, test


def train_and_test(
    out: Path, config: TrainConfig, labelled: Sequence[str], cast: Cast, cache: Path,
    init: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """One model of a campaign and its FROC, or what an earlier run found."""
    file = out / "result.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    known = [item for item in cast.pool if item.study.series_uid in set(labelled)]
    result = train(config, known, out, validation=cast.validation, init=init, cache=cache)
    if not (out / "model.pt").exists():  # no step was better on the validation scans than the start
        if init is None:
            raise ValueError(f"{out}: expected a model that finds something, got {result.reason}")
        shutil.copy(init / "model.pt", out)
    test, _ = load_labelled(cast.test, ScanCache(cache))
    froc = by_nodules(load_model(out)[0], test, torch.device("cpu"))
    report = {
        "labelled": list(labelled),
        "nodules": sum(len(item.nodules) for item in known),
        "test": froc.report(),
    }
    write_json(file, report)
    return report


def next_scans(
    strategy: str, model: Path, labelled: Sequence[str], cast: Cast, cache: Path, count: int,
    seed: int,
) -> list[str]:  # fmt: skip
    """The scans that ``strategy`` would hand out next."""
    flip = STRATEGIES[strategy].flips
    known = EvidenceFile(model / "evidence.jsonl")
    studies = [item.study for item in cast.pool]
    found = gather(Detector.load(model, "cpu"), studies, cast.told, known, ScanCache(cache),
                   flip=flip, keep=True)  # fmt: skip
    evidence = {one.series_uid: one for _, one in found if isinstance(one, ScanEvidence)}
    known_features = [evidence.pop(uid) for uid in labelled]
    ranking = rank(strategy, list(evidence.values()), known_features, seed=seed, batch=count)
    return [one.series_uid for one in ranking[:count]]


def run_campaign(source: Source, size: Size, seed: int, strategy: str) -> list[dict[str, Any]]:
    """All models of one strategy in one seed: after the start, and after every round."""
    cast, cache = cast_of(source, size, seed), source.work / "cache"
    folder = source.work / f"seed{seed}"
    model, labelled = folder / "start", cast.start
    config = TrainConfig(steps=size.start_steps, patch=PATCH, seed=seed, validate_times=1)
    results = [train_and_test(model, config, labelled, cast, cache, None)]
    for number in range(1, size.rounds + 1):
        out = folder / strategy / f"round{number}"
        chosen_file = out / "labelled.json"
        if chosen_file.exists():
            labelled = json.loads(chosen_file.read_text(encoding="utf-8"))
        elif strategy == FULL:
            labelled = [item.study.series_uid for item in cast.pool]
        else:
            torch.set_num_threads(1)
            draw = seed * 1000 + number
            labelled = labelled + next_scans(strategy, model, labelled, cast, cache,
                                             size.per_round, draw)  # fmt: skip
        write_json(chosen_file, labelled)
        config = TrainConfig(
            steps=size.steps, patch=PATCH, seed=seed * 100 + number, validate_times=1
        )
        results.append(train_and_test(out, config, labelled, cast, cache, model))
        model = out
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="phantoms, models, results")
    parser.add_argument("--studies", type=Path, help="scans instead of phantoms")
    parser.add_argument("--annotations", type=Path, help="their nodules")
    parser.add_argument("--weak-labels", type=Path, help="their records")
    parser.add_argument("--series", type=Path, help="those that were read completely (default: "
                        "those with nodules)")  # fmt: skip
    parser.add_argument("--patients", type=Path, help="seriesuid,patient_id")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES, FULL], metavar="NAME",
                        help="some of them, shuffle and foreground among them")  # fmt: skip
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--jobs", type=int, default=2, help="campaigns at once, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if (options.studies is None) != (options.annotations is None):
        parser.error("--studies and --annotations: expected both or none")
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    source = Source(options.work, options.studies, options.annotations, options.weak_labels,
                    options.series, options.patients)  # fmt: skip
    _same_size(options.work / "size.json", size)
    seeds = range(options.seeds)
    if not source.studies:
        em_study.make_phantoms(options.work, em_study.Size(), seeds, options.jobs)
        clean = {seed: options.work / "phantoms" / f"clean{seed}" for seed in seeds}
        run_all([(_clean_phantoms, (folder, size.pool - size.pool // 2, seed))
                 for seed, folder in clean.items() if not (folder / "truth.json").exists()],
                options.jobs, "phantoms without nodules")  # fmt: skip
    start = [(run_campaign, (source, replace(size, rounds=0), seed, "start")) for seed in seeds]
    run_all(start, options.jobs, "starts")
    tasks = [(run_campaign, (source, size, seed, name))
             for seed in seeds for name in options.strategies]  # fmt: skip
    results = run_all(tasks, options.jobs, "campaigns")
    named = [(name, seed) for seed in seeds for name in options.strategies]
    write_report(options.out, size, dict(zip(named, results, strict=True)))


def _clean_phantoms(folder: Path, count: int, seed: int) -> None:
    write_phantoms(folder, count, CLEAN_SEED + seed, nodule_count=0)


def _same_size(file: Path, size: Size) -> None:
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != asdict(size):
        raise ValueError(
            f"{file}: expected {size}, got another campaign; another --work keeps both"
        )
    write_json(file, asdict(size))


def write_report(
    out: Path, size: Size, results: Mapping[tuple[str, int], list[dict[str, Any]]]
) -> None:
    names = list(dict.fromkeys(name for name, _ in results))
    curves = {
        name: {seed: [(len(one["labelled"]), one["test"]["cpm"]) for one in rounds]
               for (other, seed), rounds in results.items() if other == name}
        for name in names
    }  # fmt: skip
    full = {seed: curve[-1][1] for seed, curve in curves.pop(FULL, {}).items()}
    with_all = f"{np.mean(list(full.values())):.3f}" if full else "not measured"
    areas = {name: {seed: area(one) for seed, one in of_seed.items()}
             for name, of_seed in curves.items()}  # fmt: skip
    gains = {name: {base: paired(areas[name], areas[base]) for base in BASELINES if base != name}
             for name in curves}  # fmt: skip
    content = {
        "machine": machine(), "size": asdict(size), "areas": areas, "gains": gains, "full": full,
        "runs": [{"strategy": name, "seed": seed, "rounds": rounds}
                 for (name, seed), rounds in results.items()],
    }  # fmt: skip
    write_json(out / "campaign.json", content)
    training_plot({name: list(of_seed.values()) for name, of_seed in curves.items()},
                  out / "campaign.png", "labelled scans")  # fmt: skip
    test = next(iter(results.values()))[0]["test"]
    rounds = [len(one["labelled"]) for one in results[next(iter(curves)), 0]]
    head = ["strategy", *(f"CPM at {count} labels" for count in rounds), "area",
            *(f"area beyond {base} (95 %)" for base in BASELINES), "labels to 95 % of full",
            "nodules labelled"]  # fmt: skip
    lines = [
        f"{len(areas[BASELINES[0]])} seeds; a pool of {size.pool} scans, {size.start} labelled at "
        f"the start and {size.per_round} more in each of {size.rounds} rounds; "
        f"{size.start_steps} steps, then {size.steps} per round; {test['scans']} test scans with "
        f"{test['nodules']} nodules. With all of the pool labelled CPM is {with_all} after as "
        f"many steps. One thread, bfloat16 {'on' if machine()['bfloat16'] else 'off'}, torch "
        f"{machine()['torch']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for name, of_seed in curves.items():
        cells = [name]
        cells += [f"{np.mean(values):.3f}"
                  for values in zip(*([cpm for _, cpm in curve] for curve in of_seed.values()),
                                    strict=True)]  # fmt: skip
        cells.append(f"{np.mean(list(areas[name].values())):.3f}")
        for base in BASELINES:
            gain = gains[name].get(base)
            cells.append(in_words(gain) if gain else "")
        needed = [labels_needed(of_seed[seed], 0.95 * cpm) for seed, cpm in full.items()]
        cells.append(", ".join("not reached" if count is None else f"{count:.0f}"
                               for count in needed))  # fmt: skip
        nodules = [rounds[-1]["nodules"] for (other, _), rounds in results.items() if other == name]
        cells.append(f"{np.mean(nodules):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    with atomic_path(out / "campaign.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Under CPM against labels, as the mean CPM over the labels of the campaign."""
    labels, cpm = np.array(curve, float).T
    return float(((cpm[1:] + cpm[:-1]) / 2 * np.diff(labels)).sum() / (labels[-1] - labels[0]))


def labels_needed(curve: Sequence[tuple[int, float]], cpm: float) -> float | None:
    """Labels at which the curve, linear between its points, first reaches ``cpm``."""
    for (before, low), (after, high) in zip(curve, curve[1:], strict=False):
        if low >= cpm:
            return float(before)
        if high >= cpm:
            return before + (after - before) * (cpm - low) / (high - low)
    return None


if __name__ == "__main__":
    main()
