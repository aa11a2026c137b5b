"""Strong-only training on phantoms: FROC over training, for several seeds of the training.

python scripts/benchmarks/strong_training.py           3 seeds, about half an hour on 2 cores
python scripts/benchmarks/strong_training.py --steps 200 --seeds 1    a quick look

Trains on 60 mini phantoms and measures on 60 others, all made here. Writes strong_training.json,
.md and .png into results/ beside this file.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress, track

from deepem.figures import training_plot
from deepem.files import atomic_path, write_json
from deepem.fit import TrainConfig
from deepem.froc import FP_RATES
from deepem.labelled import LabelledStudy
from deepem.network import processor_has_bfloat16
from deepem.phantom import write_phantoms
from deepem.tables import read_annotations
from deepem.training import TrainResult, train
from deepem.volume import find_studies

RESULTS = Path(__file__).parent / "results"
TRAINING_SEED, TEST_SEED = 1, 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--scans", type=int, default=60, help="of training, and as many of testing")
    parser.add_argument("--work", type=Path, help="keep phantoms and checkpoints here, to resume")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        training = phantoms(work / "training", options.scans, TRAINING_SEED)
        test = phantoms(work / "test", options.scans, TEST_SEED)
        configs = [TrainConfig(steps=options.steps, seed=seed) for seed in range(options.seeds)]
        runs = [
            train(config, training, work / f"seed{config.seed}", validation=test)
            for config in track(configs, "seeds")
        ]
    nodules = {"training": count(training), "test": count(test)}
    write_report(options.out, configs, runs, options.scans, nodules)


def phantoms(folder: Path, scans: int, seed: int) -> list[LabelledStudy]:
    """Phantoms with all of their labels; made unless they are there."""
    if not (folder / "truth.json").exists():
        with Progress() as bar:
            task = bar.add_task(f"phantoms, seed {seed}", total=scans)
            write_phantoms(folder, scans, seed, on_scan=lambda _: bar.advance(task))
    annotations = read_annotations(folder / "annotations.csv")
    return [
        LabelledStudy(study, tuple(annotations.get(study.series_uid, ())))
        for study in find_studies(folder)
    ]


def count(labelled: list[LabelledStudy]) -> int:
    return sum(len(item.nodules) for item in labelled)


def write_report(
    out: Path, configs: list[TrainConfig], runs: list[TrainResult], scans: int, nodules: dict
) -> None:
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bfloat16": processor_has_bfloat16(),
        "torch": torch.__version__,
    }
    content = {
        "machine": machine,
        "scans": scans,
        "nodules": nodules,
        "runs": [
            {"config": asdict(config), "history": run.history}
            for config, run in zip(configs, runs, strict=True)
        ],
    }
    write_json(out / "strong_training.json", content)
    curves = [[(entry["step"], entry["cpm"]) for entry in run.history] for run in runs]
    training_plot({"strong only": curves}, out / "strong_training.png")
    with atomic_path(out / "strong_training.md") as part:
        part.write_text(table(runs, scans, nodules, machine), encoding="utf-8")
    print((out / "strong_training.md").read_text(encoding="utf-8"))


def table(runs: list[TrainResult], scans: int, nodules: dict, machine: dict) -> str:
    """The sensitivities after each share of the training, mean over seeds, as Markdown."""
    head = ["step", *(f"{rate:g} FP" for rate in FP_RATES), "CPM, mean (each seed)", "minutes"]
    lines = [
        f"{scans} mini phantoms to train on ({nodules['training']} nodules), {scans} others to "
        f"measure on ({nodules['test']} nodules), {len(runs)} seeds; {machine['threads']} threads, "
        f"bfloat16 {'on' if machine['bfloat16'] else 'off'}, torch {machine['torch']}. No step was "
        "chosen by these numbers.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for entries in zip(*(run.history for run in runs), strict=True):
        sensitivity = np.mean([entry["sensitivity"] for entry in entries], axis=0)
        cpm = [entry["cpm"] for entry in entries]
        minutes = np.mean([entry["minutes"] for entry in entries])
        cells = [str(entries[0]["step"]), *(f"{value:.2f}" for value in sensitivity)]
        cells.append(f"{np.mean(cpm):.3f} ({', '.join(f'{value:.3f}' for value in cpm)})")
        lines.append("| " + " | ".join([*cells, f"{minutes:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
