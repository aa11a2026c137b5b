"""Train on submitted labels and, by EM, on records; publish the result if it is better."""

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

from deepem.em import EmConfig
from deepem.errors import InputError
from deepem.files import write_json
from deepem.fit import Progress, TrainConfig
from deepem.labelled import WeakStudy
from deepem.training import TrainResult, train
from lib.conf import DEVICES, EM_METHODS, AppConf, number, one_of, whole
from lib.records import read_records
from lib.served import served
from lib.studies import labelled_studies, recorded_studies

logger = logging.getLogger(__name__)


class NoduleDetection(TrainTask):
    """Runs in a process of its own, which MONAI Label may kill at any moment.

    It reads the datastore and ``records`` and writes neither; what it writes lies in ``folder``
    and, when a model is published, at the last of ``paths``. Every file is swapped in whole.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, records: str, conf: AppConf):
        super().__init__("Trains the nodule detector on submitted labels and on records")
        self._paths = paths
        self._folder = folder
        self._records = records
        self._conf = conf

    def config(self) -> dict[str, Any]:
        """What Slicer lets the user set. ``minutes`` counts when it is not 0, else ``steps``."""
        return {
            "method": _methods(self._conf),
            "rounds": EmConfig.rounds,
            "steps": self._conf.train_steps,
            "minutes": self._conf.train_minutes,
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
            result, how = self._train(train_config(request, self._conf), datastore)
        except Exception as error:
            self._tell(f"failed: {error}")
            raise
        seconds = round(time.monotonic() - started)
        epochs = len(result.history)
        return self._tell(
            f"{result.reason}; {how}; report: {self._folder / 'report.html'}",
            epoch=epochs,
            total_epochs=epochs,
            best_metric=result.cpm,
            total_time=str(timedelta(seconds=seconds)),
        )

    def _train(self, config: TrainConfig, datastore: Datastore) -> tuple[TrainResult, str]:
        """The result, and in words what was trained on; the report page is written."""
        labelled = labelled_studies(datastore)
        weak: list[WeakStudy] = []
        rejected: list[InputError] = []
        how = "marked scans only, as asked"
        if config.em:
            weak, rejected = recorded_studies(datastore, read_records(self._records))
            marked = {item.study.series_uid for item in labelled}
            weak = [item for item in weak if item.study.series_uid not in marked]
            how = f"EM ({config.em.method}) on the records of {len(weak)} scans"
        if config.em and not weak:
            config = replace(config, em=None)
            how = f"marked scans only: no usable records of other scans in {self._records}"
        for error in rejected:
            logger.warning("not used: %s", error)
        if rejected:
            how += f", {len(rejected)} records not used (the log says why)"
        nodules = sum(len(item.nodules) for item in labelled)
        logger.info("%d marked scans with %d nodules; %s", len(labelled), nodules, how)
        logger.info("%s", config)
        model = served(self._paths)
        result = train(
            config,
            labelled,
            self._folder,
            weak=weak,
            init=model,
            served=model,
            publish_to=self._paths[-1],
            on_progress=self._on_progress,
        )
        from deepem.report import write_report

        write_report(
            self._folder / "report.html",
            title="Training of the nodule detector",
            verdict=result.reason,
            history=result.history,
            explained=result.explained,
            skipped=[*map(str, rejected), *result.skipped],
        )
        return result, how

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


def train_config(request: Mapping[str, Any], conf: AppConf) -> TrainConfig:
    """The training that a request asks for; InputError for a value that makes no sense.

    A request for a number of steps alone overrules ``conf.train_minutes``.
    """
    minutes = number(request, "minutes", 0.0 if "steps" in request else conf.train_minutes)
    method = one_of(request, "method", _methods(conf))
    rounds = whole(request, "rounds", EmConfig.rounds)
    return TrainConfig(
        steps=None if minutes else whole(request, "steps", conf.train_steps),
        minutes=minutes or None,
        seed=whole(request, "seed", 0),
        device=one_of(request, "device", DEVICES),
        em=None if method == "none" else EmConfig(method=method, rounds=rounds),
    )


def _methods(conf: AppConf) -> list[str]:
    """All choices, that of ``conf`` first."""
    return list(dict.fromkeys((conf.em_method, *EM_METHODS)))
