"""Train on the labels that were submitted, and publish the result if it is better."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from deepem.errors import InputError
from deepem.files import write_json
from deepem.labelled import LabelledStudy
from deepem.markups import read_label
from deepem.training import Progress, TrainConfig, TrainResult, train
from deepem.volume import find_studies
from lib.conf import DEVICES, number, text
from lib.served import served

logger = logging.getLogger(__name__)

_STEPS = 4000  # a quarter of an hour to an hour on a CPU
_UNKNOWN = "UNK"  # how MONAI Label's DICOM datastore says that a tag is not there


class NoduleDetection(TrainTask):
    """Runs in a process of its own, which MONAI Label may kill at any moment.

    It reads the datastore and never writes to it; what it writes lies in ``folder`` and, when a
    model is published, at the last of ``paths``. Every file is swapped in whole.
    """

    def __init__(self, paths: Sequence[Path], folder: Path):
        super().__init__("Trains the nodule detector on the submitted labels")
        self._paths = paths
        self._folder = folder

    def config(self) -> dict[str, Any]:
        """What Slicer lets the user set. ``minutes`` counts when it is not 0, else ``steps``."""
        return {
            "steps": _STEPS,
            "minutes": 0,
            "seed": 0,
            "device": list(DEVICES),
        }

    def stats(self) -> dict[str, Any]:
        """Where the training is, under the names that Slicer's progress bars read."""
        file = self._folder / "stats.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, publish if better, and return `stats`.

        What goes wrong is raised, which puts it into the log, and is left in `stats` too: above
        all the ValueError that says which labels are missing.
        """
        started = time.monotonic()
        self._tell("preparing")
        try:
            result = self._train(train_config(request), labelled_studies(datastore))
        except Exception as error:
            self._tell(f"failed: {error}")
            raise
        seconds = round(time.monotonic() - started)
        epochs = len(result.history)
        return self._tell(
            result.reason,
            epoch=epochs,
            total_epochs=epochs,
            best_metric=result.cpm,
            total_time=str(timedelta(seconds=seconds)),
        )

    def _train(self, config: TrainConfig, labelled: Sequence[LabelledStudy]) -> TrainResult:
        nodules = sum(len(item.nodules) for item in labelled)
        logger.info("%d labelled scans with %d nodules; %s", len(labelled), nodules, config)
        model = served(self._paths)
        return train(
            config,
            labelled,
            self._folder,
            init=model,
            served=model,
            publish_to=self._paths[-1],
            on_progress=self._on_progress,
        )

    def _on_progress(self, progress: Progress) -> None:
        line = f"{progress.stage}: step {progress.step} of {progress.steps}"
        if not math.isnan(progress.loss):
            line += f", loss {progress.loss:.4f}"
        if not math.isnan(progress.eta_s):
            line += f", {progress.eta_s:.0f} s to go"
        logger.info(line)
        best = 0.0 if math.isnan(progress.best_cpm) else progress.best_cpm
        self._tell(line, epoch=progress.epoch, total_epochs=progress.epochs, best_metric=best)

    def _tell(
        self,
        message: str,
        *,
        epoch: int = 0,
        total_epochs: int = 1,
        best_metric: float = 0.0,
        total_time: str = "",
    ) -> dict[str, Any]:
        """Write what `stats` reads. A ``total_time`` tells Slicer that the training is over."""
        stats = {
            "message": message,
            "epoch": epoch,
            "total_epochs": total_epochs,
            "best_metric": best_metric,
            "total_time": total_time,
        }
        write_json(self._folder / "stats.json", stats)
        return stats


def train_config(request: Mapping[str, Any]) -> TrainConfig:
    """The training that a request asks for; InputError for a value that makes no sense."""
    minutes = number(request, "minutes", 0)
    steps = None if minutes else round(number(request, "steps", _STEPS))
    seed = round(number(request, "seed", 0))
    device = text(request, "device", DEVICES[0])
    return TrainConfig(steps=steps, minutes=minutes or None, seed=seed, device=device)


def labelled_studies(datastore: Datastore) -> list[LabelledStudy]:
    """Every image with a final label. A label that cannot be read is logged and left out."""
    labelled = []
    for pair in datastore.datalist():
        try:
            study = find_studies(Path(pair["image"]))[0]
            patient = datastore.get_image_info(study.series_uid).get("PatientID", _UNKNOWN)
            if patient != _UNKNOWN:
                study = replace(study, patient_id=patient)
            labelled.append(LabelledStudy(study, read_label(Path(pair["label"]))))
        except InputError as error:
            logger.warning("skipped a label: %s", error)
    return labelled
