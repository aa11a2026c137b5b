"""The model ``nodule_detection``: its labels, its files, and the tasks that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monailabel.interfaces.config import TaskConfig

from lib.conf import AppConf
from lib.infers import NoduleDetection as Infer
from lib.served import ServedDetector
from lib.trainers import NoduleDetection as Trainer


class NoduleDetection(TaskConfig):
    """The detector as it is: boxes, and the one that can be trained."""

    def init(
        self, name: str, model_dir: str, conf: dict[str, str], planner: Any, **kwargs: Any
    ) -> None:
        """Settle labels and files. ``conf`` has been checked by the app.

        In ``kwargs``: the ``detector`` that all tasks share, and ``studies``, the folder or address
        of the scans; beside them records are looked for.
        """
        super().init(name, model_dir, conf, planner, **kwargs)
        self.settings = AppConf.parse(conf)
        self.records = self.settings.records or kwargs["studies"]
        self.detector: ServedDetector = kwargs["detector"]
        self.labels = {"nodule": 1}
        self.path = self.detector.paths

    def infer(self) -> Infer:
        """The task that detects."""
        return Infer(self.labels, self.detector, self.settings)

    def trainer(self) -> Trainer:
        """The task that trains."""
        return Trainer(self.path, Path(self.model_dir) / self.name, self.records, self.settings)
